import pytest
import torch

import steer
from steer.guidance.kernel import Jump, Langevin, Sde
from steer.guidance.potential import Evaluation, Lookahead, Potential, Terminal
from steer.guidance.weights import Continuous, Ratio
from tests.test_flow import ByVelocity, mixture


def start(n=64, p=None):
    shape = (n, 3) if p is None else (p, n, 3)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def reward(x):
    return torch.tanh(x).sum(1)


def half_jump(flow):
    return Jump(flow, 0.5)


@pytest.mark.parametrize("view", [Lookahead, steer.Denoised, steer.Naive, Terminal])
@pytest.mark.parametrize(
    "make",
    [Jump, lambda f: Jump(f, 0.5), lambda f: Jump(f, 1.0), Sde],
    ids=["0", ".5", "1", "sde"],
)
def test_unguided_weights_telescope(view, make):
    """Ratio, scale 0, no resampling: log_w == reward / temperature, to rounding."""
    flow = mixture()
    guide = steer.Guidance(view(flow, reward, temperature=0.4), make(flow), threshold=0.0)
    last = guide(start())
    assert torch.allclose(last.log_w, reward(last.x) / 0.4, atol=1e-5)
    assert torch.allclose(last.reward, reward(last.x), atol=1e-5)
    expected = (reward(last.x) / 0.4).exp().mean().log()
    assert float(last.log_z) == pytest.approx(float(expected), abs=1e-5)


def test_weights_telescope_with_every_ramp_and_from_a_later_start():
    flow = mixture()
    potential = Lookahead(flow, reward, ramp=lambda t: t**3)
    guide = steer.Guidance(potential, Jump(flow, 0.3), times=[0.25, 0.5, 1.0], threshold=0.0)
    last = guide(flow.jump(start(), 0.0, 0.25))
    assert torch.allclose(last.log_w, reward(last.x), atol=1e-5)


def test_published_weights_from_a_later_start_pay_for_it():
    """r at times[0] counts as 0, so the first step pays r(x, times[0]) with either weights."""
    flow = mixture()
    x = flow.jump(start(4096), 0.0, 0.5)
    times = [0.5 + 0.5 * k / 40 for k in range(41)]
    estimates = [
        float(
            steer.Guidance(
                Lookahead(flow, reward), Sde(flow), w, times=times, scale=1.0, threshold=0.0
            )(x).log_z
        )
        for w in (Continuous(), Ratio())
    ]
    assert estimates[0] == pytest.approx(estimates[1], abs=0.1)
    assert abs(estimates[1]) > 0.2


def test_log_z_is_banked_at_each_resampling():
    """With a resampling at every step, the product of the mean weights; else their sum."""
    flow = mixture()
    guide = steer.Guidance(Lookahead(flow, reward), Jump(flow, 0.5), threshold=1.0)
    banked, before = 0.0, None
    for population in guide.steps(start(512), seed=3):
        if population.time < 1:
            assert not population.log_w.any()  # just resampled
            assert float(population.ess) == pytest.approx(512, rel=1e-4)
            before = float(population.log_z)
        else:  # never after the last step
            assert population.log_w.std() > 0
            banked = before + float(population.log_w.exp().mean().log())
            assert float(population.log_z) == pytest.approx(banked, abs=1e-5)


def test_resampling_at_given_times():
    flow = mixture()
    guide = steer.Guidance(
        Lookahead(flow, reward), Jump(flow, 0.5), times=[0, 0.25, 0.5, 0.75, 1], threshold=(0.5,)
    )
    fresh = [not population.log_w.any() for population in guide.steps(start())]
    assert fresh == [False, True, False, False]


def test_resampling_leaves_the_estimate_as_it_was():
    flow, times = mixture(), [0, 0.25, 0.5, 1]
    potential = Lookahead(flow, reward, temperature=0.3)
    runs = [
        [
            (float(population.log_z), float(population.log_w.std()))
            for population in steer.Guidance(
                potential, Jump(flow, 0.5), times=times, threshold=threshold
            ).steps(start())
        ]
        for threshold in ((0.5,), 0.0)
    ]
    for (banked, _), (whole, _) in zip(runs[0][:2], runs[1][:2], strict=True):
        assert banked == pytest.approx(whole, abs=1e-5)
    assert abs(runs[1][1][0]) > 0.1
    assert runs[0][1][1] == 0 < runs[1][1][1]


def test_prompts_resample_by_themselves():
    """A prompt with a flat reward never resamples, beside one that always does."""
    flow = mixture()

    def asked(x, prompts):
        return torch.tensor([6.0 if p == "hard" else 0.0 for p in prompts]) * reward(x)

    potential = Lookahead(flow, asked, ["flat", "hard"])
    guide = steer.Guidance(potential, Jump(flow, 0.5), threshold=0.5)
    alone = steer.Guidance(Lookahead(flow, asked, ["flat"]), Jump(flow, 0.5))(start())
    x0 = torch.stack([start(), start()])
    resampled = []
    for population in guide.steps(x0):
        assert not population.log_w[0].any()
        resampled.append(population.time < 1 and not population.log_w[1].any())
    assert any(resampled)
    assert torch.allclose(population.x[0], alone.x, atol=1e-6)
    assert population.log_z.shape == population.ess.shape == (2,)
    assert population.reward.shape == population.log_w.shape == (2, 64)


class Counting(steer.FlowMap):
    """A flow that counts its calls, with no closed form for score and denoiser."""

    def __init__(self, exact):
        super().__init__()
        self.exact, self.path, self.event_shape = exact, exact.path, exact.event_shape
        self.calls = {"velocity": 0, "jump": 0, "backward": 0}

    def _count(self, kind, y):
        self.calls[kind] += 1
        if y.requires_grad:
            y.register_hook(
                lambda g: self.calls.__setitem__("backward", self.calls["backward"] + 1)
            )
        return y

    def velocity(self, x, t):
        return self._count("velocity", self.exact.velocity(x, t))

    def jump(self, x, s, t):
        return self._count("jump", self.exact.jump(x, s, t))


@pytest.mark.parametrize(
    ("kernel", "weights", "scale", "view", "expected"),
    [
        (Sde, Continuous(), 1.0, Lookahead, {"velocity": 10, "jump": 10, "backward": 9}),
        (Sde, Continuous(), 1.0, steer.Denoised, {"velocity": 20, "jump": 0, "backward": 9}),
        (Sde, Ratio(), 2.0, Lookahead, {"velocity": 10, "jump": 10, "backward": 10}),
        (half_jump, Ratio(), 2.0, Lookahead, {"velocity": 0, "jump": 20, "backward": 10}),
        (half_jump, Ratio(), 0.0, Lookahead, {"velocity": 0, "jump": 19, "backward": 0}),
        (Langevin, Ratio(), 0.0, Lookahead, {"velocity": 27, "jump": 28, "backward": 18}),
    ],
)  # fmt: skip
def test_everything_is_evaluated_once(kernel, weights, scale, view, expected):
    """Ten steps: each (x, t) is looked at once, whoever asks; no gradient where r is 0 or done."""
    flow = Counting(mixture())
    guide = steer.Guidance(
        view(flow, reward), kernel(flow), weights, times=[k / 10 for k in range(11)],
        scale=scale, threshold=1.0,
    )  # fmt: skip
    guide(start())
    if scale == 2.0:  # the gradient at t = 0 is asked for, and is 0: no network is needed
        expected = {**expected, "backward": 9}
        expected["jump"] = {"Sde": 10, "Jump": 20}[type(guide.kernel).__name__]
    assert flow.calls == expected


def test_the_callers_grad_mode_is_left_alone():
    flow = mixture()
    guide = steer.Guidance(Lookahead(flow, reward), Jump(flow))
    for _ in guide.steps(start()):
        assert torch.is_grad_enabled()


class Halved(Potential):
    """A wrapped potential."""

    def __init__(self, inner):
        self.inner = inner

    def evaluate(self, x, t, derivatives=False):
        seen = self.inner.evaluate(x, t, derivatives)
        return Evaluation(seen.value / 2, seen.reward, seen.gradient)


def test_parts_that_do_not_fit():
    flow = mixture()
    look, sde = Lookahead(flow, reward), Sde(flow)
    blind = Lookahead(flow, steer.reward.wrap(reward, differentiable=False))
    cases = [
        ((look, sde), {"times": [0, 0.5, 0.5]}, "increase"),
        ((look, sde), {"times": [0.0]}, "at least two"),
        ((look, sde), {"times": [0.0, 1.5]}, r"within \[0, 1\]"),
        ((look, sde), {"threshold": (0.33,)}, "not among the times"),
        ((look, sde), {"batch_size": 0}, "batch_size"),
        ((blind, sde), {"scale": 1.0}, "not differentiable"),
        ((look, Jump(flow), Continuous()), {"scale": 1.0}, "Sde"),
        ((look, sde, Continuous()), {"scale": 2.0}, "scale=1"),
        ((look, Sde(flow, clip=1.0), Continuous()), {"scale": 1.0}, "without clip"),
        ((Halved(look), sde, Continuous()), {"scale": 1.0}, "not wrapped"),
        ((Terminal(flow, reward), sde, Continuous()), {"scale": 1.0}, "not Terminal"),
    ]
    for parts, options, words in cases:
        with pytest.raises(ValueError, match=words):
            steer.Guidance(*parts, **options)


def test_a_wrapped_potential_is_fine_with_ratio_weights():
    flow = mixture()
    last = steer.Guidance(Halved(Lookahead(flow, reward)), Jump(flow, 0.5), scale=1.0)(start())
    assert torch.isfinite(last.log_w).all()


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4, 5), (1, 2, 4, 3), (0, 3)])
def test_starts_of_another_shape(shape):
    flow = mixture()
    guide = steer.Guidance(Lookahead(flow, reward), Jump(flow))
    with pytest.raises(ValueError, match=r"events of shape \(3,\)"):
        guide(torch.zeros(shape))


def test_temperatures_per_row_do_not_travel():
    flow = mixture()
    potential = Lookahead(flow, reward, temperature=torch.linspace(1, 2, 64))
    assert torch.isfinite(steer.Guidance(potential, Jump(flow), threshold=0)(start()).log_w).all()
    with pytest.raises(ValueError, match="threshold=0"):
        steer.Guidance(potential, Jump(flow))(start())


def test_prompts_that_do_not_fit_the_start():
    flow = mixture()
    guide = steer.Guidance(Lookahead(flow, reward, ["a", "b", "c"]), Jump(flow))
    with pytest.raises(ValueError, match=r"\(3, n"):
        guide(start(4, p=2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_names_the_sample(bad):
    flow = mixture()

    def broken(x, prompts):
        rows = torch.arange(len(x)) == 5
        return reward(x).masked_fill(rows, bad)

    guide = steer.Guidance(Lookahead(flow, broken, ["a", "pear"]), Jump(flow))
    words = r"(nan|inf) for prompt 1 \('pear'\), particle 1, step 1 of 16"
    with pytest.raises(FloatingPointError, match=words):
        guide(start(4, p=2))


def test_micro_batches_change_nothing():
    flow = ByVelocity(mixture())
    x0, times = start(12, p=3), [0, 0.3, 0.7, 1]
    potential = Lookahead(flow, reward, temperature=torch.tensor([1.0, 0.5, 0.1]))
    runs = [
        steer.Guidance(potential, Langevin(flow), times=times, batch_size=size)(x0)
        for size in (None, 20, 6)
    ]
    for other in runs[1:]:
        assert torch.allclose(runs[0].x, other.x, atol=1e-5)
        assert torch.allclose(runs[0].log_z, other.log_z, atol=1e-5)


@pytest.mark.parametrize("kernel", [steer.Jump, steer.Langevin])
def test_an_offset_of_the_reward_moves_log_z_by_as_much(kernel):
    """In float32, with an offset of 1e6: to what float32 leaves of the reward, and no worse."""
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    x0 = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))

    def log_z(offset):
        def reward(x):
            return x.sum(1) + offset

        options = {"moves": 0} if kernel is steer.Langevin else {"churn": 0.5}
        potential = steer.Lookahead(flow, reward, temperature=2.0)
        return steer.Guidance(potential, kernel(flow, **options), threshold=0.5)(x0).log_z

    assert float(log_z(1e6) - log_z(0.0)) == pytest.approx(1e6 / 2, abs=0.02)


# ------------------------------------------------------------------ kernels of one's own


def test_a_kernel_keeps_its_own_state_during_a_run_and_not_after():
    class Counting(steer.Kernel):
        def __init__(self, flow):
            self.flow, self.steps = flow, 0

        def propose(self, x, s, t, potential, scale, noise):
            self.steps += 1
            seen.append(self.steps)
            return steer.Jump(self.flow).propose(x, s, t, potential, scale, noise)

    seen, kernel = [], Counting(mixture())
    guide = steer.Guidance(steer.Terminal(mixture(), reward), kernel, times=[0.0, 0.3, 0.6, 1.0])
    for _ in range(2):
        guide(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert seen == [1, 2, 3, 1, 2, 3]
    assert kernel.steps == 0


def test_moves_of_one_s_own_are_made():
    class Mine(steer.Langevin):
        def move(self, x, t, potential, noise, run=None):
            seen.append(t)
            return super().move(x, t, potential, noise, run)

    seen = []
    guide = steer.Guidance(
        steer.Lookahead(mixture(), reward), Mine(mixture()), times=[0.0, 0.4, 0.7, 1.0]
    )
    plain = steer.Guidance(
        steer.Lookahead(mixture(), reward), steer.Langevin(mixture()), times=[0.0, 0.4, 0.7, 1.0]
    )
    x0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(guide(x0).x, plain(x0).x, atol=1e-5)
    assert seen == [0.4, 0.7, 1.0]


def test_what_a_proposal_looks_at_is_not_evaluated_again():
    class Looking(steer.Kernel):
        def __init__(self, flow):
            self.flow = flow

        def propose(self, x, s, t, potential, scale, noise):
            y, log_ratio = steer.Jump(self.flow).propose(x, s, t, potential, scale, noise)
            potential(y, t)
            return y, log_ratio

    def watched(x):
        calls.append(len(x))
        return reward(x)

    calls = []
    guide = steer.Guidance(
        steer.Lookahead(mixture(), watched), Looking(mixture()), times=[0.0, 0.5, 1.0]
    )
    guide(torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    assert len(calls) == 2


def test_other_prompts_are_not_told_this_states_velocity():
    from steer.guidance.state import State

    class Moved(steer.GaussianMixture):
        def given(self, prompts):
            return steer.GaussianMixture(torch.ones(1, 3), 1.0)

    flow = Moved(torch.zeros(1, 3), 1.0)
    x = torch.zeros(2, 3)
    here = State(x, 0.5, flow, steer.Terminal(flow, reward))
    here.velocity  # noqa: B018
    view, _ = here.views()
    assert torch.equal(view.velocity(x, 0.5), flow.velocity(x, 0.5))
    bound = flow.given(["a"])
    assert torch.equal(view.given(["a"]).velocity(x, 0.5), bound.velocity(x, 0.5))
