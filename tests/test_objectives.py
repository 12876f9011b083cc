"""The objectives that climb, transport and amortise, against their closed forms."""

import inspect

import pytest
import torch

import steer
from benchmarks.tuning_oracles import bump, mean_reward, objective, transport, transport_optimum
from steer.adapters.inject import adapt
from steer.flow import FlowMap
from steer.noise import Draws
from steer.objectives.amortise import Amortise
from steer.objectives.batch import Batch
from steer.objectives.direct import Direct, Draft
from steer.objectives.parts import (
    action,
    consistency,
    noise_displacement,
    self_distillation,
    squared,
)
from steer.objectives.table import OBJECTIVES, TABLE, build, name_of, options_of
from steer.objectives.transport import Transport
from steer.path import Linear, as_time, like
from steer.reward import LinearReward, wrap
from steer.testing import Corrected

QUICK = {"progress": False, "precision": "32-true", "accelerator": "cpu"}
NORMAL = steer.GaussianMixture(torch.tensor([[0.5]]), 0.49)


def batch(student, reward, temperature=1.0, n=64, step=0, base=None):
    base = student.base if base is None else base
    draws = Draws(0, step, (0, n), dtype=torch.float64)
    return Batch(student, base, student, wrap(reward), temperature, draws, unbound=base)


class Shifted(FlowMap):
    """N(m, S) with a drift towards a, at strength theta: at 1 a known optimum, at 0 the base.

    Transport by a linear reward, R = a x: `u_t = a Φ_1 / Φ_t`, `Φ_t = sqrt((1-t)² + S t²)`, so
    `X(s,t,x) = base + Φ_t a Φ_1 ∫_s^t dτ / Φ_τ²`.
    """

    def __init__(self, base, a, theta):
        super().__init__()
        self.base, self.a, self.path, self.event_shape = base, a, Linear(), base.event_shape
        self.theta = torch.nn.Parameter(torch.tensor(float(theta), dtype=torch.float64))

    def norm(self, t):
        return ((1 - t) ** 2 + float(self.base.variances[0, 0]) * t**2).sqrt()

    def angle(self, t):
        sd = float(self.base.variances[0, 0]) ** 0.5
        return torch.atan2(sd * t, 1 - t) / sd

    def velocity(self, x, t):
        t = as_time(t).to(x)
        push = self.a * self.norm(torch.ones(())) / self.norm(t)
        return self.base.velocity(x, t) + self.theta * like(push, x)

    def jump(self, x, s, t):
        s, t = as_time(s).to(x), as_time(t).to(x)
        moved = self.norm(t) * self.a * self.norm(torch.ones(())) * (self.angle(t) - self.angle(s))
        return self.base.jump(x, s, t) + self.theta * like(moved, x)


def slopes(rule, theta, reward, temperature, count=40, n=64):
    """Return the loss's derivative in theta over batches: mean and standard error."""
    student = Shifted(NORMAL, 0.8 / temperature, theta)
    values = []
    for step in range(count):
        b = batch(student, reward, temperature, n, step, base=NORMAL)
        (g,) = torch.autograd.grad(rule(b)["loss"], student.theta)
        values.append(float(g))
    v = torch.tensor(values)
    return float(v.mean()), float(v.std()) / count**0.5


@pytest.mark.parametrize("distil", [0.0, 1.0])
def test_transport_is_at_rest_at_its_optimum_alone(distil):
    reward = LinearReward(torch.tensor([0.8]))
    rule = Transport(distil=distil, step=(0.004, 0.008))  # the discrete rule's own error is O(h²)
    mean, error = slopes(rule, 1.0, reward, 0.5)
    assert abs(mean) < 4 * error + 1e-5
    mean, error = slopes(rule, 0.7, reward, 0.5)
    assert abs(mean) > 10 * error


def test_the_optimum_of_the_transport_test_is_one():
    """Its map is the map of its velocity, and its velocity the optimal control's."""
    flow = Shifted(NORMAL, 1.6, 1.0)
    x = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, h = x, 1 / 400
    for k in range(400):
        y = y + h * flow.velocity(y + h / 2 * flow.velocity(y, k * h), k * h + h / 2)
    assert torch.allclose(y, flow.jump(x, 0.0, 1.0), atol=1e-5)


def test_direct_is_at_rest_at_its_optimum_alone():
    """One jump with an anchor: X_b + a / anchor. Exact, so no bound on an error is needed."""
    reward = LinearReward(torch.tensor([0.8], dtype=torch.float64))

    class Moved(Shifted):
        def jump(self, x, s, t):
            gap = as_time(t).to(x) - as_time(s).to(x)
            return self.base.jump(x, s, t) + self.theta * like(gap, x) * self.a / 2

    for theta, at_rest in ((1.0, True), (0.8, False)):
        student = Moved(NORMAL, 1.6, theta)
        b = batch(student, reward, 0.5, base=NORMAL)
        (g,) = torch.autograd.grad(Direct(jumps=[1], anchor=2.0)(b)["loss"], student.theta)
        assert (abs(float(g)) < 1e-6) is at_rest


def test_direct_with_an_anchor_reaches_its_optimum():
    """N(.5, .49) and R = x / .5: the mean moves by a / anchor, the deviation stays; within 2 %."""
    tuned = steer.finetune(
        Corrected(NORMAL), LinearReward(torch.tensor([1.0])), None, "direct", 160, 0.5, rank=16,
        batch_size=128, learning_rate=1e-2, options={"jumps": [1], "anchor": 2.0}, **QUICK,
    )  # fmt: skip
    x = torch.randn(20000, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, base = tuned.jump(x, 0.0, 1.0), tuned.base.jump(x, 0.0, 1.0)
    assert float(y.mean() - base.mean()) == pytest.approx(2.0 / 2.0, rel=0.02)
    assert float(y.std()) == pytest.approx(float(base.std()), rel=0.02)


def test_transport_leaves_guidance_behind():
    """A short run of the toy: better than the base's own lookahead guidance, .460 and 2.109."""
    assert transport_optimum() == pytest.approx((0.6168, 2.3505), abs=2e-4)
    tuned = transport(250)
    reward, value = objective(tuned, 50, 4000)
    assert reward > 0.52
    assert value > 2.2
    assert mean_reward(tuned, 1) > 0.52


@pytest.mark.slow
def test_transport_reaches_the_transport_optimum():
    tuned = transport(1500)
    reward, value = objective(tuned)
    assert reward == pytest.approx(0.617, abs=0.02)
    assert value >= 2.30
    assert mean_reward(tuned, 1) == pytest.approx(0.617, abs=0.03)


def test_amortised_pairs_are_learned():
    """fmrg-j's picture is a function of its noise: one jump draws what guidance drew."""
    base = Corrected(NORMAL)
    options = {"method": "fmrg-j", "particles": 256, "group": 64, "guide_steps": 8}
    rule = build("amortise", options)
    tuned = steer.finetune(
        base, bump, None, rule, 200, 0.2, batch_size=64, rank=16, learning_rate=1e-2, **QUICK
    )
    drawn = rule._drawn["", 0]
    with torch.no_grad():
        y, plain = tuned.jump(drawn["x_0"], 0.0, 1.0), base.jump(drawn["x_0"], 0.0, 1.0)
    before, after = (squared(x - drawn["x_1"]).mean() for x in (plain, y))
    assert after < 0.05 * before


def test_an_amortised_population_is_drawn_once_and_again():
    """It is a function of (seed, prompt, round): a resumed run gets the same."""
    rule, again = (Amortise(particles=8, group=4, guide_steps=2) for _ in range(2))
    tuned = adapt(Corrected(NORMAL), 2)
    drawn = [r.population(batch(tuned, bump, 0.3, 8), 0, 1) for r in (rule, rule, again)]
    assert drawn[0] is drawn[1]
    assert torch.equal(drawn[0]["x_1"], drawn[2]["x_1"])
    assert not torch.equal(
        drawn[0]["x_1"], rule.population(batch(tuned, bump, 0.3, 8), 0, 2)["x_1"]
    )
    assert not drawn[0]["x_1"].requires_grad


def test_amortise_follows_the_weights():
    """Rows come in proportion to exp(log_w)."""
    rule = Amortise(particles=4, group=4)
    rule._drawn["", 0] = {
        "x_0": torch.zeros(4, 1), "x_1": torch.arange(4.0)[:, None],
        "log_w": torch.tensor([0.1, 0.2, 0.3, 0.4]).log(),
    }  # fmt: skip
    _, x = rule.rows(batch(adapt(Corrected(NORMAL), 2), bump, n=8000))
    share = torch.bincount(x[:, 0].long(), minlength=4) / 8000
    assert torch.allclose(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=4 * (0.25 / 8000) ** 0.5)


def test_draft_has_the_gradient_of_its_last_steps():
    tuned = adapt(Corrected(NORMAL), 4)
    with torch.no_grad():
        for k, p in enumerate(tuned.adapters().values()):
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    for p in tuned.adapters().values():
        p.requires_grad_(True)
    tuned = tuned.at(1.0)

    def gradient(last, anchor=0.0):
        b = Batch(tuned, tuned.base, tuned, wrap(bump), 1.0, Draws(0, 0, (0, 16)))
        parts = torch.autograd.grad(
            Draft(4, last, anchor)(b)["loss"], list(tuned.adapters().values())
        )
        return torch.cat([p.flatten() for p in parts])

    def by_hand(last):
        x = Batch(tuned, tuned.base, tuned, wrap(bump), 1.0, Draws(0, 0, (0, 16))).noise()
        for k in range(4):
            x = x + tuned.velocity(x, k / 4) / 4
            x = x.detach() if k < 4 - last else x
        parts = torch.autograd.grad(-bump(x).mean(), list(tuned.adapters().values()))
        return torch.cat([p.flatten() for p in parts])

    for last in (1, 2, 4):
        assert torch.allclose(gradient(last), by_hand(last), atol=1e-6)
    assert not torch.allclose(gradient(1), gradient(4), atol=1e-6)
    assert not torch.allclose(gradient(2), gradient(2, anchor=1.0), atol=1e-6)


# ------------------------------------------------------------------ the penalties


def test_action_of_one_jump_is_half_the_squared_displacement():
    student = Shifted(NORMAL, 1.0, 1.0)
    x = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = student.jump(x, 0.0, 1.0) - NORMAL.jump(x, 0.0, 1.0)
    assert torch.allclose(action(student, NORMAL, x, 0.0, 1.0), squared(moved) / 2)


def test_action_of_many_jumps_is_the_control_energy():
    """Summed along the path: ½ ∫ |u|² dt = ½ a² Φ_1² ∫ dt / Φ_t²."""
    student = Shifted(NORMAL, 1.0, 1.0)
    x = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total, k = 0.0, 400
    for i in range(k):
        y = student.jump(x, i / k, (i + 1) / k)
        total = total + action(student, NORMAL, x, i / k, (i + 1) / k, y)
        x = y
    one = torch.ones((), dtype=torch.float64)
    energy = 0.5 * student.norm(one) ** 2 * student.angle(one)
    assert torch.allclose(total, energy.expand(6), rtol=1e-3)


def test_noise_displacement_inverts_the_jump():
    x = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [noise_displacement(NORMAL, NORMAL.jump(x, 0.0, 1.0), steps) for steps in (4, 8, 16)]
    errors = [float((z - x).abs().max()) for z in found]
    assert errors[2] < errors[1] / 3 < errors[0] / 9  # second order
    assert errors[0] < 0.1


def test_consistency_is_zero_on_a_flow_map_and_not_elsewhere():
    s, u, t = (torch.tensor([v, v]) for v in (0.1, 0.4, 0.9))
    x = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    good, bad = Shifted(NORMAL, 1.0, 1.0), Corrected(NORMAL)
    assert consistency(good, x, s, u, t).max() < 1e-10
    for p in bad.network.parameters():
        p.data.fill_(0.1)
    assert consistency(bad, x.float(), s, u, t).min() > 1e-6


def test_self_distillation_is_small_on_a_flow_map_and_not_elsewhere():
    s, t, h = (torch.tensor([v, v]) for v in (0.1, 0.9, 0.05))
    x = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)

    class Torn(Shifted):
        """Its jumps know nothing of its velocity's drift."""

        def jump(self, x, s, t):
            return self.base.jump(x, s, t)

    good, bad = Shifted(NORMAL, 1.0, 1.0), Torn(NORMAL, 1.0, 1.0)
    assert self_distillation(good, NORMAL, x, (s, t), h).max() < 1e-7
    assert self_distillation(bad, NORMAL, x, (s, t), h).min() > 1e-4
    assert self_distillation(bad, bad, x, (s, t), h).max() == 0  # what the base has stays


@pytest.mark.parametrize("penalty", ["anchor", "data_anchor", "noise_anchor"])
def test_each_penalty_holds_the_reward_back(penalty):
    tuned = adapt(Corrected(NORMAL), 4)
    student = Shifted(NORMAL, 1.0, 0.5)
    weights = {"anchor": 0.0, "data_anchor": 0.0, "noise_anchor": 0.0}
    slope = []
    for weight in (0.0, 3.0):
        rule = Direct(jumps=[2], **{**weights, penalty: weight})
        (g,) = torch.autograd.grad(
            rule(batch(student, LinearReward(torch.ones(1)), base=NORMAL))["loss"], student.theta
        )
        slope.append(float(g))
    assert slope[0] < 0 < slope[1]
    assert tuned.adapters()


def test_a_normalised_reward_has_its_direction_alone():
    student = Shifted(NORMAL, 1.0, 0.5)
    steep = [LinearReward(torch.tensor([a])) for a in (1.0, 30.0)]
    rule = Direct(jumps=[1], anchor=0.0, normalise=2.0)
    found = [
        torch.autograd.grad(rule(batch(student, r, base=NORMAL))["loss"], student.theta)[0]
        for r in steep
    ]
    assert torch.allclose(found[0], found[1])


def test_names():
    assert set(OBJECTIVES) == {
        "direct", "transport", "value", "amortise", "nft", "grpo", "adjoint", "draft"
    }  # fmt: skip
    assert steer.OBJECTIVES is OBJECTIVES
    assert set(TABLE) == set(OBJECTIVES)
    for name in TABLE:
        rule = build(name)
        assert name_of(rule) == name
        assert set(options_of(rule)) == set(inspect.signature(type(rule)).parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Direct(jumps=[0]), "jumps must be"),
        (lambda: Direct(anchor=-1.0), "anchor must not be negative"),
        (lambda: Direct(reference="bas"), "reference must be"),
        (lambda: Draft(4, 5), "last must be between"),
        (lambda: Amortise("fmttt"), "fmtt"),
        (lambda: Amortise(particles=2, group=4), "draw at least as many"),
        (lambda: Amortise(options={"scal": 1}), "takes no option 'scal'"),
        (lambda: build(Direct(), {"anchor": 1}), "options are for an objective by name"),
        (lambda: build("direct", {"data": 1}), "it is called data_anchor now"),
        (lambda: build("value", {"clip": 1}), "it is called max_log_w now"),
        (lambda: build("nft", {"clip": 1}), "it is called max_advantage now"),
    ],
)
def test_wrong_options_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
