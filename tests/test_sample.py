"""`steer.sample`: shapes, temperatures, errors at the door, and costs counted to the unit."""

import pytest
import torch

import steer
from steer.sampling.forecast import plan
from steer.sampling.methods import TABLE, method_options
from tests.test_flow import mixture

METHODS = list(steer.METHODS)
TEMPERED = {name for name, method in TABLE.items() if method.tempered}
every_method = pytest.mark.parametrize("method", METHODS)


def reward(x):
    return torch.tanh(x).sum(1)


def blind(differentiable=False):
    return steer.reward.wrap(lambda x: reward(x).detach(), differentiable=differentiable)


def sample(*args, particles=5, steps=3, temperature=0.5, **options):
    options.setdefault("method", "fmtt")
    if options["method"] not in {"none", "best-of-n", *TEMPERED}:
        temperature = None
    return steer.sample(
        *(args or (mixture(), reward)),
        particles=particles,
        steps=steps,
        temperature=temperature,
        **options,
    )


class Network(steer.FlowMap):
    """Like a network: parameters, velocity and jump alone, prompts, and a count of its rows."""

    def __init__(self, counts=None, shift=0.0):
        super().__init__()
        self.exact, self.shift = mixture(), shift
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.path, self.event_shape = self.exact.path, self.exact.event_shape
        self.counts = {"forward": 0, "backward": 0} if counts is None else counts

    def _count(self, y):
        self.counts["forward"] += len(y)
        if torch.is_grad_enabled() and y.requires_grad:
            y.register_hook(
                lambda g: self.counts.__setitem__("backward", self.counts["backward"] + len(y))
            )
        return y + self.parameter

    def velocity(self, x, t):
        return self._count(self.exact.velocity(x, t))

    def jump(self, x, s, t):
        return self._count(self.exact.jump(x, s, t))

    def given(self, prompts):
        return Network(self.counts)


@every_method
def test_shapes(method):
    listed = sample(prompts=["a", "b"], method=method)
    assert listed.x.shape == (2, 5, 3)
    assert listed.rewards.shape == listed.log_w.shape == (2, 5)
    assert listed.ess.shape == listed.best.shape == (2,)
    assert listed.trace["ess"].shape == (3, 2)
    assert listed.prompts == ["a", "b"]
    for prompts in ("a", None):
        one = sample(prompts=prompts, method=method)
        assert one.x.shape == (5, 3)
        assert one.rewards.shape == one.log_w.shape == (5,)
        assert one.ess.shape == one.best.shape == ()
        assert torch.allclose(one.x, listed.x[0], atol=1e-5)
        assert (one.log_z is not None) == TABLE[method].weighted
        assert (one.temperature is not None) == TABLE[method].tempered
        assert one.log_z is None or one.log_z.shape == ()
        assert one.temperature is None or one.temperature.shape == ()
    assert one.images is None
    assert torch.allclose(listed.rewards, reward(listed.x.flatten(0, 1)).reshape(2, 5), atol=1e-6)
    assert torch.equal(listed.best, listed.rewards.argmax(1))


def test_every_method_has_a_line_and_a_builder():
    assert set(TABLE) == set(steer.METHODS)


def test_methods_are_listed_with_a_line():
    assert set(METHODS) <= set(steer.METHODS)
    assert all(line and "\n" not in line for line in steer.METHODS.values())


@pytest.mark.parametrize("method", ["none", "best-of-n"])
def test_unguided_methods_are_composed_jumps(method):
    result = sample(method=method)
    x = steer.Noise(0, particles=5, step="start").normal((3,))
    flow = mixture()
    for s, t in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)):
        x = flow.jump(x, s, t)
    assert torch.allclose(result.x, x, atol=1e-6)
    assert not result.log_w.any()
    assert float(result.ess) == pytest.approx(5)


TILTED = (mixture(), steer.LinearReward(torch.tensor([0.6, -0.3, 0.4])))


def evidence(method, steps, particles):
    """Return log Z_hat - log Z of 8 populations, with its standard error."""
    _, log_z = TILTED[0].tilt(TILTED[1], 0.7)
    result = steer.sample(*TILTED, [""] * 8, particles, steps, method, 0.7)
    ratio = (result.log_z.double() - log_z).exp()
    return float(ratio.mean().log()), float(ratio.std() / ratio.mean()) / 8**0.5


def test_split_has_the_evidence_at_few_steps():
    off, error = evidence("split", 6, 512)
    assert error < 0.04
    assert abs(off) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fmtt", "denoiser", "naive"])
def test_published_schemes_have_it_in_the_limit(method):
    """Their error is of first order in the step, so `2 log Z(2k) - log Z(k)` has none of it."""
    (coarse, a), (fine, b) = (evidence(method, k, 1024) for k in (32, 64))
    error = (a**2 + 4 * b**2) ** 0.5
    assert error < 0.08
    assert abs(2 * fine - coarse) < 4 * error


@pytest.mark.parametrize("method", ["fmtt", "denoiser", "naive", "split", "fmrg-j", "reno"])
def test_methods_raise_the_reward(method):
    plain = steer.sample(*TILTED, None, 256, 4, "none").rewards
    temperature = 0.5 if method in TEMPERED else None
    steered = steer.sample(*TILTED, None, 256, 8, method, temperature).rewards
    assert steered.mean() > plain.mean() + 4 * plain.std() / 16


def test_automatic_temperature():
    """Per prompt, the standard deviation over 32 one-jump samples / strength."""
    flow, prompts = mixture(), ["a", "bb"]

    def asked(x, prompts):
        return reward(x) * torch.tensor([float(len(p)) for p in prompts])

    for strength in (None, 6.0):
        result = sample(flow, asked, prompts, temperature=None, strength=strength, method="split")
        x0 = steer.Noise(0, range(2), 32, step="temperature").normal((3,))
        scores = asked(flow.lookahead(x0, 0.0), ["a"] * 32 + ["bb"] * 32).reshape(2, 32)
        assert torch.allclose(result.temperature, scores.std(1) / (strength or 3.0), rtol=1e-4)
        assert result.costs["temperature_nfe_per_prompt"] == 32
    longer = sample(flow, asked, ["zz", *prompts], temperature=None, method="split")
    assert longer.temperature.shape == (3,)
    second = sample(flow, asked, ["bb"], temperature=None, method="split", position=2)
    assert torch.allclose(second.temperature, longer.temperature[2:])


def test_a_flat_reward_has_no_temperature():
    def flat(x):
        return 0 * x[:, 0] + 7

    with pytest.raises(
        ValueError, match=r"standard deviation of zero .* prompt 4 .*'a'.*temperature="
    ):
        sample(mixture(), flat, ["a"], temperature=None, position=4)
    for method in ("none", "best-of-n"):  # these need none
        assert sample(mixture(), flat, temperature=None, method=method).temperature is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "fmt"}, r"unknown method 'fmt': did you mean fmtt"),
        ({"strength": 2.0}, "temperature and strength both"),
        ({"temperature": 0.0}, "temperature must be a number above zero"),
        ({"temperature": float("nan")}, "temperature must be a number above zero"),
        ({"temperature": None, "strength": -1.0}, "strength must be a number above zero"),
        ({"particles": 0}, "particles must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"prompts": []}, "list of prompts is empty"),
        ({"method": "split", "scale": 2.0}, r"'split' takes no option 'scale': it takes moves"),
        ({"method": "none", "moves": 2}, r"'none' takes no option 'moves': it takes churn"),
        ({"prompts": ["a", "b"], "reward_prompts": ["x"]}, "1 reward_prompts for 2 prompts"),
        ({"threshold": (0.4,)}, "cannot resample at"),
        ({"window": (0.6, 0.2)}, "a guidance window from 0.6 to 0.2"),
        ({"window": (0.6,)}, "a guidance window is two times"),
        ({"every": 0}, "every must be at least 1"),
        ({"clip": 0.0}, "bound must be above zero"),
        ({"method": "denoiser", "lookahead": 2}, "'denoiser' takes no option 'lookahead'"),
        ({"init_time": 0.5}, "give init_image as well"),
        ({"init_image": torch.zeros(3), "init_time": 1.0}, r"init_time must be in \[0, 1\)"),
        ({"method": "reno", "init_image": torch.zeros(3)}, "begins with pure noise"),
        ({"method": "none", "target": 1.0}, "cannot stop at a target"),
        ({"budget": 3.0}, "a budget of 3 NFE a particle is too small.* at least 6"),
        ({"method": "none", "target": float("nan")}, "cannot stop at a target"),
        ({"target": float("nan")}, "target must be a finite reward"),
        ({"method": "reno", "rate": -1.0}, "rate must be above zero"),
        ({"method": "reno", "finish": 0}, "finish must be at least 1"),
        ({"method": "fmrg-j", "scale": -0.1}, "scale must not be negative"),
        (
            {"method": "fmrg-j", "window": (0.4, 0.5)},
            r"no step would be guided: .* 0, 0.333, 0.66",
        ),
        ({"method": "split", "moves": -1}, "moves must not be negative"),
        ({"init_image": torch.full((3,), 255, dtype=torch.uint8)}, "divide bytes by 255"),
    ],
)
def test_errors_at_the_door(options, words):
    with pytest.raises(ValueError, match=words):
        sample(**options)


@every_method
def test_rewards_without_gradient(method):
    if TABLE[method].gradient:
        with pytest.raises(ValueError, match="use one of none, best-of-n, split"):
            sample(mixture(), blind(), method=method)
    else:
        assert sample(mixture(), blind(), method=method).rewards.shape == (5,)


@every_method
def test_a_reward_of_another_shape(method):
    with pytest.raises(ValueError, match="return one number per image"):
        sample(mixture(), lambda x: x.mean(), method=method)


@every_method
def test_a_reward_that_is_not_a_number(method):
    def broken(x, prompts):
        found = torch.tensor([p == "pear" for p in prompts])
        found[:-1] = False
        return reward(x).masked_fill(found, torch.nan)

    words = r"nan for prompt 8 \('pear'\), particle 4, .*step"
    with pytest.raises(FloatingPointError, match=words):
        sample(mixture(), broken, ["apple", "pear"], method=method, position=7)


def test_what_the_reward_is_asked():
    seen = set()

    def asked(x, prompts):
        seen.update(prompts)
        return reward(x)

    sample(mixture(), asked, ["a", "b"], method="none")
    assert seen == {"a", "b"}
    seen.clear()
    sample(mixture(), asked, ["a", "b"], method="split", reward_prompts="c")
    assert seen == {"c"}
    seen.clear()
    sample(mixture(), asked, None, method="split", reward_prompts="d")
    assert seen == {"d"}


CASES = [
    ("none", {}),
    ("best-of-n", {}),
    ("fmtt", {}),
    ("fmtt", {"scale": 2.0}),
    ("fmtt", {"scale": 0.0}),
    ("denoiser", {}),
    ("denoiser", {"scale": 2.0}),
    ("naive", {}),
    ("naive", {"scale": 2.0}),
    ("fmtt", {"settle": False}),
    ("fmtt", {"window": (0.2, 0.7), "every": 2, "lookahead": 2}),
    ("fmtt", {"clip": 3.0, "scale": 2.0}),
    ("denoiser", {"settle": False}),
    ("naive", {"normalise": 1.0}),
    ("split", {}),
    ("split", {"moves": 0}),
    ("split", {"lookahead": 2}),
    ("fmrg-j", {}),
    ("fmrg-j", {"window": (0.0, 0.5), "every": 2, "lookahead": 3}),
    ("reno", {}),
    ("reno", {"jumps": 2, "finish": 3}),
    ("split", {"moves": 3, "threshold": 1.0}),
]


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_costs_are_counted_and_foretold(method, options, batch_size):
    """NFE is what the network itself saw, per particle, and what `plan` said before."""
    flow, scored = Network(), []

    def counted(x):
        scored.append(len(x))
        return reward(x)

    result = sample(
        flow, counted, ["a", "b"], particles=4, steps=6, method=method, batch_size=batch_size,
        **options,
    )  # fmt: skip
    seen = flow.counts["forward"] + flow.counts["backward"]
    assert result.nfe == seen / 8
    assert result.costs["network_gradients"] == flow.counts["backward"] / 8
    assert result.costs["reward_calls"] == sum(scored) / 8
    expected = plan(method, 6, True, **options)
    assert result.nfe == expected["nfe"]
    assert result.costs["reward_calls"] == expected["reward_calls"]


def test_costs_by_hand():
    """Published: a velocity, a lookahead forward and backward a step, less one at t = 0."""
    assert plan("none", 6) == {"nfe": 6, "reward_calls": 1}
    assert plan("fmtt", 6)["nfe"] == 6 * 3 - 1
    assert plan("naive", 6, settle=False)["nfe"] == 6
    assert plan("fmrg-j", 6) == {"nfe": 18, "reward_calls": 7}
    assert plan("reno", 6) == {"nfe": 12, "reward_calls": 7}
    assert plan("split", 6, moves=0)["nfe"] == 6 + 5
    assert plan("split", 6, moves=0)["reward_calls"] == 6


def test_options_of_a_method():
    assert method_options("none") == {"churn": None}
    controls = {"window", "every", "clip", "normalise", "settle", "scale", "threshold", "noise"}
    assert set(method_options("denoiser")) == controls
    assert set(method_options("fmtt")) == {*controls, "lookahead"}
    with pytest.raises(ValueError, match="did you mean"):
        method_options("splitt")


def test_resampling_at_a_methods_own_times():
    trace = sample(steps=5, method="fmtt", threshold=(0.4,)).trace["ess"]
    assert float(trace[1]) == pytest.approx(5)
    assert float(trace[0]) < 4.999
    assert float(trace[2]) < 4.999


def test_callback_sees_each_step():
    times = []
    sample(callback=lambda population: times.append(population.time), method="split")
    assert times == pytest.approx([1 / 3, 2 / 3, 1])


def test_seeds():
    a, b, c = (sample(method="split", seed=s).x for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class Pixels(Network):
    """Pictures of 1 x 1 pixels, which are the mixture's points."""

    def __init__(self, counts=None):
        super().__init__(counts)
        self.event_shape = (3, 1, 1)

    def velocity(self, x, t):
        return super().velocity(x.flatten(1), t).reshape(x.shape)

    def jump(self, x, s, t):
        return super().jump(x.flatten(1), s, t).reshape(x.shape)

    def given(self, prompts):
        return Pixels(self.counts)


@pytest.mark.parametrize("method", ["none", "fmtt", "split", "fmrg-j"])
def test_a_start_from_a_picture(method):
    """It is beta x + alpha z at init_time, and near 1 the picture comes back."""
    flow, image = Pixels(), torch.tensor([0.3, 0.1, 0.5]).reshape(3, 1, 1)
    light = steer.reward.wrap(lambda x: x.mean((1, 2, 3)))
    late = steer.sample(
        flow, light, None, 4, 2, method, temperature=0.5 if method in TEMPERED else None,
        init_image=image, init_time=0.995,
    )  # fmt: skip
    assert (late.x - image).abs().max() < 0.06
    early = steer.sample(flow, light, None, 4, 2, "none", init_image=image, init_time=0.2)
    z = steer.Noise(0, particles=4, step="start").normal((3, 1, 1))
    x = flow.jump(flow.jump(0.8 * z + 0.2 * image, 0.2, 0.6), 0.6, 1.0)
    assert torch.allclose(early.x, x, atol=1e-5)


def test_a_picture_for_each_prompt():
    flow, images = Pixels(), torch.rand(2, 3, 1, 1)
    light = steer.reward.wrap(lambda x: x.mean((1, 2, 3)))
    both = steer.sample(flow, light, ["a", "b"], 3, 2, "none", init_image=images, batch_size=3)
    second = steer.sample(
        flow, light, ["b"], 3, 2, "none", init_image=images[1], position=1, batch_size=3
    )
    assert torch.allclose(both.x[1:], second.x)
    with pytest.raises(ValueError, match="2 init images for 3 prompts"):
        steer.sample(flow, light, ["a", "b", "c"], 3, 2, "none", init_image=images)
    with pytest.raises(ValueError, match="resize the image"):
        steer.sample(flow, light, None, 3, 2, "none", init_image=torch.rand(3, 4, 4))


def test_a_flow_that_cannot_start_from_a_picture():
    class OneWay(Pixels):
        def decode(self, x):
            return x.sigmoid()

    with pytest.raises(NotImplementedError, match="OneWay cannot encode a picture"):
        steer.sample(
            OneWay(), lambda x: x.sum((1, 2, 3)), None, 2, 2, "none",
            init_image=torch.rand(3, 1, 1),
        )  # fmt: skip


@pytest.mark.parametrize("method", ["fmtt", "split", "fmrg-j", "reno"])
def test_stop_at_a_target(method):
    """It ends as soon as the best of every prompt is seen there, and spends no more."""
    whole = sample(steps=8, method=method)
    target = float(whole.trace["reward"][2].max()) - 0.5
    seen = []
    early = sample(steps=8, method=method, target=target, callback=lambda p: seen.append(p))
    assert early.nfe < whole.nfe
    stopped = seen[-2] if method != "reno" else seen[-1]
    assert stopped.reward.max() >= target
    assert all(p.reward.max() < target for p in seen[:-2])
    assert seen[-1].time == 1
    assert torch.allclose(early.rewards, reward(early.x), atol=1e-6)
    assert early.rewards.max() >= target - 1e-4  # the jump leads where the lookahead saw


def test_an_early_end_is_weighted_exactly():
    """Without resampling, Ratio weights telescope whenever the run ends."""
    flow, view = mixture(), steer.Lookahead(mixture(), reward, temperature=0.4)
    guide = steer.Guidance(view, steer.Jump(flow, 0.5), threshold=0.0)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    for population in guide.steps(x):
        if population.time > 0.4:
            population.stop()
    last = population
    assert last.time == 1
    assert torch.allclose(last.log_w, reward(last.x) / 0.4, atol=1e-5)


BUDGETS = [
    ("none", {}), ("fmtt", {}), ("fmtt", {"settle": False}), ("denoiser", {}), ("split", {}),
    ("fmrg-j", {}), ("fmrg-j", {"window": (0.5, 0.8), "lookahead": 3}), ("reno", {}),
    ("reno", {"jumps": 2, "finish": 7}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), BUDGETS, ids=str)
def test_stop_at_a_budget(method, options):
    """It is never exceeded, and as many steps are made as fit."""
    whole = sample(Network(), reward, particles=2, steps=6, method=method, **options)
    last = 0.0
    for share in (0.5, 0.9):
        budget = share * whole.nfe
        part = sample(
            Network(), reward, particles=2, steps=6, method=method, budget=budget, **options
        )
        listed = sample(
            Network(), reward, ["a", "b"], particles=2, steps=6, method=method, budget=budget,
            batch_size=2, **options,
        )  # fmt: skip
        assert listed.nfe == part.nfe
        assert last <= part.nfe <= budget
        last = part.nfe
    assert last > 0.5 * whole.nfe
    spent = sample(
        Network(), reward, particles=2, steps=6, method=method, budget=whole.nfe, **options
    )
    assert torch.equal(spent.x, whole.x)


def test_prompts_reach_their_target_by_themselves():
    """What one prompt has reached does not hang on the others, nor on micro-batches."""
    flow, target = mixture(), float(sample(steps=8, method="fmrg-j").trace["reward"][2]) + 0.1
    both = sample(flow, reward, ["a", "b"], steps=8, method="fmrg-j", target=target)
    one = sample(flow, reward, ["b"], steps=8, method="fmrg-j", target=target, position=1)
    assert torch.allclose(both.x[1:], one.x, atol=1e-5)
    small = sample(flow, reward, ["a", "b"], steps=8, method="fmrg-j", target=target, batch_size=5)
    assert torch.allclose(small.x, both.x, atol=1e-5)


def test_counting_keeps_no_graph_alive():
    """What was differentiated is freed at once, not when the garbage collector comes by."""
    import gc
    import weakref

    from steer.sampling.counts import Counted, Counts

    gc.disable()
    try:
        flow, x = Counted(mixture(), Counts()), torch.zeros(2, 3, requires_grad=True)
        y = flow.velocity(x, 0.5)
        kept = weakref.ref(y)
        torch.autograd.grad(y.sum(), x)
        del y
        assert kept() is None
        assert flow.counts.backward == 2
    finally:
        gc.enable()
