"""One wrapper: each keeps the contract of the flow inside, and forwards or means to change."""

import importlib
import pkgutil

import pytest
import torch
from torch import nn

import steer
from steer.adapters.inject import adapt
from steer.backends.second_time import SecondTime
from steer.batches import Batched
from steer.flow import FlowMap, Wrapped
from steer.guidance.state import State
from steer.models.second_timed import SecondTimed
from steer.sampling.counts import Counted, Counts
from steer.testing import Corrected, FlowMapContract
from steer.tuning.counts import Metered, TuningCounts
from tests.test_flow import mixture


class Prompted(FlowMap):
    """A mixture that is moved by the prompt's length: one that takes prompts and stays a map."""

    def __init__(self, prompt=""):
        super().__init__()
        means = torch.tensor([[-1.0, 0.5], [1.0, 0.0]]) + len(prompt) / 4
        self.exact = steer.GaussianMixture(means, 0.4)
        self.path, self.event_shape = self.exact.path, self.exact.event_shape

    def velocity(self, x, t):
        return self.exact.velocity(x, t)

    def jump(self, x, s, t):
        return self.exact.jump(x, s, t)

    def given(self, prompts):
        (prompt,) = prompts
        return Prompted(prompt)


class Layered(FlowMap):
    """A closed form with a linear layer: its adapters change nothing while B is zero."""

    def __init__(self):
        super().__init__()
        self.exact = mixture()
        self.path, self.event_shape = self.exact.path, self.exact.event_shape
        self.layer = nn.Linear(3, 3)
        self.layer.weight.data, self.layer.bias.data = torch.eye(3), torch.zeros(3)

    def velocity(self, x, t):
        return self.layer(self.exact.velocity(x, t))

    def jump(self, x, s, t):
        return self.exact.jump(x, s, t)

    def denoise(self, x, t):
        return self.exact.denoise(x, t)

    def score(self, x, t):
        return self.layer(self.exact.score(x, t))

    def log_prob(self, x, t=1.0):
        return self.exact.log_prob(self.layer(x), t)


class TestAdapted(FlowMapContract):
    def create_flow(self):
        return adapt(Corrected(mixture()))


class TestAdaptedClosedForm(FlowMapContract):
    def create_flow(self):
        return adapt(Layered())


class TestMixed(FlowMapContract):
    """At scale 1, the prompt's own flow: at other scales the jumps do not compose."""

    def create_flow(self):
        return steer.ClassifierFree(Prompted(), 1.0, "away").given(["long prompt"])


class TestBatched(FlowMapContract):
    def create_flow(self):
        return Batched(mixture(), 4)

    test_kinds_of_times = None  # one time for all rows


class TestCounted(FlowMapContract):
    def create_flow(self):
        return Counted(mixture(), Counts())


# ------------------------------------------------------------------ what was dropped


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_adapters_keep_closed_forms():
    """The score at t = 1 is finite where the base's is, and the density is known."""
    flow = Layered()
    tuned = adapt(flow)
    assert torch.equal(tuned.base.score(X, 1.0), flow.score(X, 1.0))
    assert tuned.score(X, 1.0).isfinite().all()
    assert torch.equal(tuned.base.log_prob(X, 0.7), flow.log_prob(X, 0.7))
    for p in tuned.adapters().values():
        p.data += 0.1
    for name, times in (("velocity", (0.3,)), ("score", (0.3,)), ("log_prob", (0.3,))):
        base, view = (getattr(v, name)(X, *times) for v in (tuned.base, tuned))
        assert torch.equal(base, getattr(flow, name)(X, *times))
        assert float((view - base).detach().abs().max()) > 1e-2, name


def test_a_mixed_field_has_no_density_and_its_own_score():
    mixed = steer.ClassifierFree(Prompted(), 3.0, "away").given(["x"])
    assert mixed.log_prob(torch.zeros(2, 2)) is None
    assert mixed.derives("denoise")
    assert mixed.derives("score")
    assert mixed.evaluations == mixed.given(["abc"]).evaluations == 2
    assert mixed.calls("jump", 0.0, 1.0) == 2
    assert steer.ClassifierFree(mixed, 2.0).given(["a"]).evaluations == 4
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    c, u = Prompted("x"), Prompted("away")
    velocity = u.velocity(x, 0.4) + 3 * (c.velocity(x, 0.4) - u.velocity(x, 0.4))
    denoised = mixed.path.denoised(x, velocity, torch.tensor(0.4))
    torch.testing.assert_close(mixed.denoise(x, 0.4), denoised)
    torch.testing.assert_close(mixed.score(x, 0.4), mixed.path.score(x, denoised, 0.4))


# ------------------------------------------------------------------ every wrapper


class Recording(FlowMap):
    """Closed forms of everything, which write down what was called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.path, self.event_shape, self.name = steer.Linear(), (2,), "recording"
        self.seen = []
        self.adapter_targets, self.component = ("layer",), "transformer"

    @property
    def lacks(self):
        return {"encode": "cannot encode a picture"}

    def _note(self, name, y):
        self.seen.append(name)
        return y

    def velocity(self, x, t):
        return self._note("velocity", self.layer(x))

    def jump(self, x, s, t):
        return self._note("jump", self.layer(x))

    def mean_velocity(self, x, s, t):
        return self._note("mean_velocity", self.layer(x))

    def denoise(self, x, t):
        return self._note("denoise", self.layer(x))

    def score(self, x, t):
        return self._note("score", self.layer(x))

    def log_prob(self, x, t=1.0):
        return self._note("log_prob", x.sum(1))

    def decode(self, x):
        return self._note("decode", x)

    def encode(self, images):
        return self._note("encode", images)

    def along(self, times):
        return self._note("along", self)

    def reuses(self, s, t):
        return self._note("reuses", True)

    def given(self, prompts):
        bound = Recording()
        bound.seen, bound.layer = self._note("given", self.seen), self.layer
        return bound


CALLS = {
    "velocity": lambda f, x: f.velocity(x, 0.5),
    "jump": lambda f, x: f.jump(x, 0.25, 0.5),
    "mean_velocity": lambda f, x: f.mean_velocity(x, 0.25, 0.5),
    "lookahead": lambda f, x: f.lookahead(x, 0.5),
    "denoise": lambda f, x: f.denoise(x, 0.5),
    "score": lambda f, x: f.score(x, 0.5),
    "log_prob": lambda f, x: f.log_prob(x, 0.5),
    "decode": lambda f, x: f.decode(x),
    "encode": lambda f, x: f.encode(x),
    "given": lambda f, x: f.given(["a"]),
    "derives": lambda f, x: f.derives("score"),
    "denoiser": lambda f, x: f.denoiser,
    "calls": lambda f, x: f.calls("jump", 0.0, 1.0),
    "times": lambda f, x: f.times(2),
    "along": lambda f, x: f.along([0.0, 1.0]),
    "reuses": lambda f, x: f.reuses(0.5, 1.0),
}
ATTRIBUTES = {
    "evaluations", "name", "kind", "churn", "lacks", "adapter_targets", "component", "about",
    "posterior_map",
}  # fmt: skip
MADE = {
    "Adapted": lambda flow: adapt(flow, targets=["layer"]),
    "ClassifierFree": lambda flow: steer.ClassifierFree(flow, 2.0),
    "Batched": lambda flow: Batched(flow, 2),
    "Counted": lambda flow: Counted(flow, Counts()),
    "Metered": lambda flow: Metered(adapt(flow, targets=["layer"]), TuningCounts()),
    "SecondTimed": lambda flow: SecondTimed(flow, SecondTime("layer", 2)),
    "KnownFlow": lambda flow: State(
        torch.zeros(1, 2), 0.5, flow, steer.Terminal(flow, sum)
    ).views()[0],
}
MEANT = {
    ("ClassifierFree", "denoise"): {"velocity"},
    ("ClassifierFree", "score"): {"velocity"},
    ("ClassifierFree", "log_prob"): set(),
    ("SecondTimed", "reuses"): set(),
    **{(name, "lookahead"): {"jump"} for name in MADE},
    **{("SecondTimed", call): {"velocity"} for call in ("lookahead", "jump", "mean_velocity")},
    **{(name, call): set() for name in MADE for call in ("derives", "denoiser", "calls", "times")},
}
"""(Wrapper, method) -> what it calls of the flow inside instead of the method of that name."""


def wrappers():
    for found in pkgutil.walk_packages(steer.__path__, "steer."):
        importlib.import_module(found.name)
    waiting, classes = [Wrapped], []
    while waiting:
        own = [c for c in waiting.pop().__subclasses__() if c.__module__.startswith("steer.")]
        classes, waiting = classes + own, waiting + own
    return classes


def test_every_wrapper_is_here():
    assert {c.__name__ for c in wrappers()} == MADE.keys(), "say in MADE how it is made"


def test_every_public_method_is_called():
    public = {n for n in vars(FlowMap) if not n.startswith("_")}
    assert public - ATTRIBUTES == CALLS.keys()


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("name", MADE)
def test_every_method_is_forwarded_or_changed_on_purpose(name, method):
    flow = Recording()
    wrapper = MADE[name](flow)
    inner = wrapper.flow
    while isinstance(inner, Wrapped):
        inner = inner.flow
    flow.seen.clear()
    inner.seen.clear()
    found = CALLS[method](wrapper, torch.ones(2, 2))
    seen = set(inner.seen) | set(flow.seen)
    assert seen == MEANT.get((name, method), {method})
    if method == "given":
        # what a state knows is of its own prompts alone
        assert type(found) is (Recording if name == "KnownFlow" else type(wrapper))
    if method == "reuses":
        assert found is (name != "SecondTimed")
    if method == "derives":
        assert found is (name == "ClassifierFree")
    if method == "calls":
        assert found == (2 if name == "ClassifierFree" else 1)
    if method == "denoiser":
        assert found is inner


@pytest.mark.parametrize("name", MADE)
def test_attributes_are_those_of_the_flow(name):
    wrapper = MADE[name](Recording())
    assert (wrapper.event_shape, wrapper.name) == ((2,), "recording")
    assert wrapper.lacks == {"encode": "cannot encode a picture"}
    assert (wrapper.adapter_targets, wrapper.component) == (("layer",), "transformer")
    assert wrapper.evaluations == (2 if name == "ClassifierFree" else 1)
    assert isinstance(wrapper.path, steer.Linear)
