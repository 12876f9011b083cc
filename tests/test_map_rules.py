"""Every rule of `steer.RULES` against a closed form: where its gradient vanishes."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch

import steer
from steer.models.loading import save
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.models.two_time_mlp import TwoTimeMLP
from steer.objectives.regression import mean_square
from steer.path import as_time, like
from steer.training.rules import MapObjective, build, guided_velocity
from steer.training.rules.along import along, differentiable_forward
from steer.training.rules.base import Look
from steer.training.rules.eulerian import AlphaFlow
from steer.training.rules.table import TABLE
from steer.training.rules.times import PAIRS
from steer.training.rules.weights import LearnedWeight, huber, weight_named
from tests.test_rules import Gaussian as Exact


class Gaussian(Exact):
    """The exact map of a Gaussian in the plane, its displacement scaled by 1 + shift (t - s)."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.event_shape = (2,)
        self.shift = torch.nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def jump(self, x, s, t):
        there, gap = super().jump(x, s, t), as_time(t) - as_time(s)
        return x + like(1 + self.shift * gap, x) * (there - x)


def gradients(name, error, replicates=24, n=512):
    """The gradient of a rule's loss with respect to the error, a replicate each."""
    flow, rule, found = Gaussian(error), build(name), []
    for k in range(replicates):
        g = torch.Generator().manual_seed(1000 * k + 7)
        x_0 = torch.randn(n, 2, generator=g).double()
        x_1 = 0.7 + 0.4 * torch.randn(n, 2, generator=g).double()
        s, t = (u.double() for u in PAIRS[rule.pairs](n, g))
        t = torch.maximum(t, s + 0.02).clamp(max=1.0)
        s = torch.minimum(s, t - 0.02)  # away from the diagonal, where the quotient is rough
        teacher = Gaussian().velocity
        look = Look(
            flow, flow, flow.velocity, teacher, flow.path.interpolate(x_0, x_1, s),
            flow.path.slope(x_0, x_1, s), s, t, torch.rand(n, generator=g).double(), 1.0, "jvp",
        )  # fmt: skip
        loss = mean_square(rule.error(look)).mean()
        found.append(torch.autograd.grad(loss, flow.shift)[0])
    return torch.stack(found)


@pytest.mark.parametrize("name", TABLE)
def test_a_rule_pushes_towards_the_true_map_and_rests_there(name):
    """Mean gradients: within 4 standard errors of zero at the map, beyond 10 of it off the map."""
    at_rest, pushed = gradients(name, 0.0), gradients(name, 0.3)
    error = at_rest.std() / len(at_rest) ** 0.5
    # discrete targets (a Heun step, two Euler steps) leave a bias that the noise does not hide
    bias = 1e-3 if name in ("heun", "progressive") else 1e-9
    assert abs(at_rest.mean()) < 4 * error + bias
    assert pushed.mean() > 10 * pushed.std() / len(pushed) ** 0.5
    assert pushed.mean() > 10 * abs(at_rest.mean())


def test_the_table_is_the_catalogue_and_says_what_each_rule_is():
    assert set(steer.RULES) == set(TABLE)
    for name in TABLE:
        rule = build(name)
        assert rule.family in ("Lagrangian", "Eulerian", "semigroup")
        assert all((rule.target, rule.stopped, rule.source, rule.fails))
        assert rule.cost >= 4
        assert "Stopped" in type(rule).__doc__
        assert rule.pairs in PAIRS


@pytest.mark.parametrize("name", ["lsd", "lmd", "tvm", "ayf-lmd", "heun"])
def test_lagrangian_rules_refuse_the_velocity_of_the_pair(name):
    with pytest.raises(
        ValueError, match=r"no pair of noise and data is known whose path passes there"
    ):
        build(name, {"velocity": "conditional"})


def test_eulerian_rules_take_any_velocity():
    for field in ("conditional", "own", "teacher"):
        assert build("meanflow", {"velocity": field}).field == field


def test_unknown_names_and_options_are_named():
    with pytest.raises(ValueError, match=r"did you mean 'lsd'|lsd"):
        build("lssd")
    with pytest.raises(ValueError, match=r"takes no option 'hight'.*high"):
        build("heun", {"hight": 0.2})
    with pytest.raises(ValueError, match="follows a teacher"):
        MapObjective(build("lmd"))
    with pytest.raises(ValueError, match="finds its median"):
        MapObjective(build("meanflow", {"velocity": "conditional"}), Gaussian(), distance="huber")
    with pytest.raises(ValueError, match="PSD asks for no velocity off the diagonal"):
        build("psd-m", {"velocity": "teacher"})
    with pytest.raises(ValueError, match="TVM asks for no velocity off the diagonal"):
        build("tvm", {"velocity": "teacher"})
    with pytest.raises(ValueError, match="takes central differences"):
        MapObjective(build("anyflow"), derivative="jvp")
    with pytest.raises(ValueError, match="a batch of one row"):
        MapObjective(build("lsd"))(None, None, torch.randn(1, 2), [""], torch.Generator())
    with pytest.raises(ValueError, match="between 0 and 1"):
        MapObjective(build("lsd"), diagonal=1.5)
    with pytest.raises(ValueError, match="adaptive"):
        weight_named("adaptve")


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    flow = TwoTimeMLP(width=32, depth=2)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return flow


@pytest.mark.parametrize("direction", [(None, 0.0, 1.0), ("x", 1.0, 0.0), ("x", 0.0, 0.0)])
def test_both_derivatives_agree_and_so_do_their_gradients(mlp, direction):
    g = torch.Generator().manual_seed(1)
    x, s = torch.randn(64, 2, generator=g).double(), torch.rand(64, generator=g).double() * 0.5
    t = s + 0.05 + 0.4 * torch.rand(64, generator=g).double()
    s[0], t[1] = 0.0, 1.0  # one-sided there
    flow = mlp.double()
    dx = None if direction[0] is None else torch.randn(64, 2, generator=g).double()
    found = []
    for how in ("jvp", "difference"):
        v, d = along(flow, x, s, t, (dx, *direction[1:]), how, 1e-4)
        loss = (v + d).square().mean()
        found.append((v, d, *torch.autograd.grad(loss, list(flow.parameters()))))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*(f[1:] for f in found), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


class NoForward(torch.autograd.Function):
    """A layer without a forward-mode formula, as fused kernels are."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Fused(TwoTimeMLP):
    def mean_velocity(self, x, s, t):
        return NoForward.apply(super().mean_velocity(x, s, t))


def test_a_network_without_forward_derivatives_is_differenced(mlp):
    x, s, t = torch.randn(4, 2), torch.full((4,), 0.2), torch.full((4,), 0.8)
    assert differentiable_forward(mlp, x, s, t) == "jvp"
    assert differentiable_forward(Fused(width=16), x, s, t) == "difference"
    objective = MapObjective(build("imf"))
    terms = objective(Fused(width=16), mlp, x, [""] * 4, torch.Generator().manual_seed(0))
    assert objective.derivative == "difference"
    assert terms["loss"].isfinite()


def test_the_curriculum_goes_from_flow_matching_to_meanflow():
    rule = AlphaFlow()
    alphas = [rule.alpha(k / 20) for k in range(21)]
    assert alphas[0] == 1.0
    assert alphas[-1] == 0.0
    assert alphas == sorted(alphas, reverse=True)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_ordered_and_in_range(name):
    s, t = PAIRS[name](2000, torch.Generator().manual_seed(0))
    assert (s >= 0).all()
    assert (s < t).all()
    assert (t <= 1).all()
    if name == "dyadic":
        steps = (s / (t - s)).round() * (t - s)
        assert torch.equal(steps, s)


def test_weights():
    loss = torch.tensor([1e-4, 1.0, 4.0], requires_grad=True)
    s, t = torch.zeros(3), torch.ones(3)
    even = torch.autograd.grad(weight_named("adaptive")(loss, s, t), loss)[0]
    torch.testing.assert_close(even, (loss.detach() + 1e-3) ** -0.75 / 3)
    learned = LearnedWeight()
    assert learned(loss, s, t) == loss.mean()
    optimizer = torch.optim.Adam(learned.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        learned(torch.full((3,), 5.0), s, t).backward()
        optimizer.step()
    log = learned(torch.zeros(3), s, t)  # w alone
    assert float(log) == pytest.approx(torch.tensor(5.0).log().item(), abs=0.05)
    assert float(huber(torch.full((1, 2), 3.0))) == pytest.approx(3 - 0.03, abs=1e-3)


def test_guidance_is_fused_into_what_the_pair_says(mlp):
    """`w x' + (1-w) v(x,t,t | "")` where there is a prompt, x' where there is none."""
    objective = MapObjective(build("imf"), guidance=3.0)
    x, slope, t = torch.randn(2, 2), torch.randn(2, 2), torch.tensor([0.3, 0.6])
    scale = torch.full((2,), 3.0)
    pair = objective._pair(mlp, x, slope, t, ["fox", ""], scale)
    free = mlp.velocity(x, t)
    torch.testing.assert_close(pair[0], 3 * slope[0] - 2 * free[0])
    assert torch.equal(pair[1], slope[1])


@pytest.mark.parametrize("name", ["meanflow", "imf", "alphaflow", "anyflow", "sct"])
def test_a_rule_of_the_pair_follows_the_teacher_that_the_diagonal_has(name, mlp):
    """Guided or not; told to follow the pair, that is guided by the teacher's own."""
    teacher = copy.deepcopy(mlp)
    assert MapObjective(build(name), teacher, guidance=3.0).rule.field == "teacher"
    assert MapObjective(build(name), guidance=3.0).rule.field == "conditional"
    rule = build(name)
    MapObjective(rule, teacher)
    assert MapObjective(rule).rule.field == "conditional"  # the caller's rule is as it was
    told = MapObjective(build(name, {"velocity": "conditional"}), teacher, guidance=3.0)
    x, slope, t = torch.randn(2, 2), torch.randn(2, 2), torch.tensor([0.3, 0.6])
    for p in mlp.parameters():
        torch.nn.init.zeros_(p)
    pair = told._pair(mlp, x, slope, t, ["fox", "owl"], torch.full((2,), 3.0))
    torch.testing.assert_close(pair, 3 * slope - 2 * teacher.velocity(x, t))


@pytest.mark.parametrize("name", ["psd-m", "psd-u", "splitmf", "progressive", "heun"])
def test_two_times_that_are_one_give_a_finite_loss(name, mlp):
    def tied(n, generator):
        s = torch.rand(n, generator=generator)
        return s, torch.where(torch.arange(n) % 2 == 0, s, 1.0)

    objective = MapObjective(build(name), mlp, pairs=tied)
    terms = objective(mlp, mlp, torch.randn(16, 2), [""] * 16, torch.Generator().manual_seed(0))
    assert terms["loss"].isfinite()


def test_a_map_is_learned_in_the_plane():
    """900 steps of psd-m, from data alone, beat the true denoiser three times."""
    from recipes.data.points import POINTS
    from steer.training.average import follow
    from steer.training.map_metric import lookahead_error

    law = POINTS["mixture"]()
    torch.manual_seed(0)
    flow, mean = TwoTimeMLP(width=96), TwoTimeMLP(width=96)
    mean.load_state_dict(flow.state_dict())
    objective = MapObjective(build("psd-m"))
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 900)
    for k in range(900):
        g = torch.Generator().manual_seed(k)
        terms = objective(flow, mean, law.sample(512, g).float(), [""] * 512, g, k / 900)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        schedule.step()
        follow(mean.parameters(), flow.parameters(), 0.99, k + 1)
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(5)).double()
    for t in (0.0, 0.25):
        ours, denoiser = lookahead_error(mean, law, noise, t)
        assert denoiser > 3 * ours, (t, ours, denoiser)


SCRIPT = """
    import lightning as L, torch
    from steer.models.two_time_mlp import TwoTimeMLP
    from steer.training.data import step_loader
    from steer.training.module import FlowTraining
    from steer.training.rules import MapObjective, build

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            g = torch.cat([p.grad.flatten() for p in module.flow.parameters()])
            both = module.all_gather(g)
            assert both.shape[0] == 2 and torch.equal(both[0], both[1]), "gradients differ"
            assert g.abs().sum() > 0
            x = module.batches(0)[0][trainer.global_rank :: 2]
            seen = module.all_gather(x)
            assert not torch.equal(seen[0], seen[1]), "both processes saw the same rows"
            print("synchronised", flush=True)

    torch.manual_seed(0)
    law = lambda k: (torch.randn(16, 2, generator=torch.Generator().manual_seed(k)), [""] * 16)
    module = FlowTraining(TwoTimeMLP(width=16), MapObjective(build("lsd")), law, steps=2)
    trainer = L.Trainer(max_steps=2, max_epochs=-1, accelerator="cpu", devices=2, strategy="ddp",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        use_distributed_sampler=False, enable_model_summary=False, callbacks=[Watch()])
    trainer.fit(module, step_loader(2))
"""


def test_gradients_through_jvp_are_synchronised_under_two_processes(tmp_path):
    file = tmp_path / "two.py"
    file.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("synchronised") == 4


@pytest.fixture
def scaled():
    """A network that takes the scale of guidance, and one without, of the same other weights."""
    torch.manual_seed(0)
    plain = TwoTimeUNet(["apple", "fox"], (8, 8), (1, 1), size=8, width=16, groups=4)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.2)
    told = TwoTimeUNet(**{**plain.config, "guidance": [1.0, 5.0]})
    told.load_state_dict(plain.state_dict(), strict=False)
    return NetworkFlow(told), NetworkFlow(plain)


def test_the_scale_of_guidance_is_an_input_that_is_inert_at_first(scaled):
    flow, plain = (f.given(["fox", ""]) for f in scaled)
    x = torch.randn(2, 3, 8, 8)
    for scale in (1.0, 5.0, torch.tensor([1.0, 4.0])):
        assert torch.equal(flow.guided(scale).jump(x, 0.2, 0.9), plain.jump(x, 0.2, 0.9))
    with pytest.raises(ValueError, match="was trained for scales from 1 to 5, got 7"):
        flow.guided(7.0)
    with pytest.raises(ValueError, match="has no guidance scale as an input"):
        plain.guided(2.0)
    with pytest.raises(ValueError, match="two scales above 0, the smaller first"):
        TwoTimeUNet(**{**plain.network.config, "guidance": [5.0, 1.0]})


@pytest.mark.parametrize("name", ["imf", "heun"])
def test_a_map_learns_its_scale_of_guidance(scaled, name):
    flow, plain = scaled
    teacher = plain if name == "heun" else None
    objective = MapObjective(build(name), teacher, (1.0, 5.0))
    x_1, prompts = torch.rand(6, 3, 8, 8), ["fox", "apple", "", "fox", "apple", "fox"]
    terms = objective(flow, flow, x_1, prompts, torch.Generator().manual_seed(0))
    terms["loss"].backward()
    assert flow.network.scale.mlp[-1].weight.grad.abs().sum() > 0


def test_guidance_may_differ_by_row(scaled):
    plain, prompts = scaled[1], ["fox", "apple"]
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6])
    both = guided_velocity(plain, prompts, torch.tensor([2.0, 4.0]))(x, t)
    for row, scale in enumerate((2.0, 4.0)):
        alone = guided_velocity(plain, prompts, scale)(x, t)
        torch.testing.assert_close(both[row], alone[row])


def test_a_map_with_a_scale_is_saved_and_loaded(scaled, tmp_path):
    flow, _ = scaled
    torch.nn.init.normal_(flow.network.scale.mlp[-1].weight)
    save(flow, tmp_path / "map")
    found = steer.load(tmp_path / "map").given(["fox"])
    x = torch.randn(1, 3, 8, 8)
    weak, strong = (found.guided(s).jump(x, 0.0, 1.0) for s in (1.0, 5.0))
    assert not torch.equal(weak, strong)
    assert torch.equal(strong, flow.given(["fox"]).guided(5.0).jump(x, 0.0, 1.0))
