"""The door of a reward: what goes in, what comes out, and what is left as it was."""

import pytest
import torch
from torch import nn

import steer
from steer.reward import Reward, score, wrap
from steer.sampling.methods import TABLE
from tests.test_sample import Network


class Brightness(Reward):
    def forward(self, images, prompts=None, metadata=None):
        return images.mean((1, 2, 3))


def images(*shape):
    return torch.rand(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reward", [Brightness(), wrap(lambda x: x.mean((1, 2, 3)))])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((255 * images()).byte(), "images are torch.uint8: .* divide bytes by 255"),
        ((65535 * images()).int(), "images are torch.int32: .* 16 bits by 65535"),
        (images(2, 4, 4, 3), r"images.permute\(0, 3, 1, 2\)"),
        (images(2, 8, 8, 4), r"images.permute\(0, 3, 1, 2\)"),
        (images(2, 4, 8, 8), "paste transparent ones on white"),
        (images(2, 1, 8, 8), r"images.expand\(-1, 3, -1, -1\)"),
        (images(2, 16, 8, 8), "decode the samples"),
    ],
)
def test_what_is_no_picture_is_refused(reward, given, words):
    for call in (reward, lambda x: score(reward, x), lambda x: (2 * reward + reward)(x)):
        with pytest.raises(ValueError, match=words):
            call(given)


def test_no_tensor_is_refused():
    with pytest.raises(TypeError, match="got a list: give a tensor"):
        Brightness()([images()])


def test_a_reward_of_something_else_says_so():
    latents = images(2, 16, 8, 8) - 3
    assert torch.allclose(
        wrap(lambda x: x.mean((1, 2, 3)), clamp=False)(latents), latents.mean((1, 2, 3))
    )


def test_callables_see_pictures_in_range_and_keep_the_gradient():
    seen = []

    def reward(x):
        seen.append(x.detach())
        return x.sum((1, 2, 3))

    given = (4 * images() - 2).requires_grad_()
    (gradient,) = torch.autograd.grad(wrap(reward)(given).sum(), given)
    assert float(seen[0].min()) >= 0 and float(seen[0].max()) <= 1  # noqa: PT018
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_what_changes_its_images_is_refused_and_a_callable_has_its_own():
    class InPlace(Reward):
        def forward(self, images, prompts=None, metadata=None):
            return images.mul_(2).mean((1, 2, 3))

    with pytest.raises(ValueError, match=r"'InPlace' changes its input images .* images.clone"):
        score(InPlace(), images())
    given = images()
    score(wrap(lambda x: x.mul_(2).mean((1, 2, 3))), given)
    assert torch.equal(given, images())


def test_vectors_are_watched_too():
    with pytest.raises(ValueError, match="changes its input images"):
        score(wrap(lambda x: x.add_(1).sum(1)), torch.zeros(2, 3))


def test_scores_come_out_as_floats():
    assert score(wrap(lambda x: torch.arange(len(x))), images()).dtype == torch.float32


class Trained(Reward):
    """Left in training mode: dropout, batch statistics, and weights that ask for gradients."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.train()

    def forward(self, images, prompts=None, metadata=None):
        return self.layers(images)[:, 0]


@pytest.mark.parametrize("method", ["none", "split", "fmrg-j"])
def test_a_reward_in_training_mode_is_held_at_rest(method):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = Trained()
    before = {k: v.clone() for k, v in reward.state_dict().items()}
    heat = {"temperature": 0.5} if method == "split" else {}
    flow = steer.GaussianMixture(torch.zeros(2, 3), 1.0)
    first, second = (steer.sample(flow, reward, None, 4, 3, method, **heat) for _ in range(2))
    assert torch.equal(first.rewards, second.rewards)
    assert all(torch.equal(before[k], v) for k, v in reward.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in reward.parameters())
    assert all(m.training for m in reward.modules())


SIGNATURES = [
    (lambda images: 0, ("images",)),
    (lambda x, p: 0, ("images", "prompts")),
    (lambda images, prompts=None: 0, ("images", "prompts")),
    (lambda images, prompt=None: 0, ("images", "prompts")),
    (lambda images, captions=None: 0, ("images", "prompts")),
    (lambda images, scale=2.0, prompts=None: 0, ("images", "prompts")),
    (lambda images, *, prompts: 0, ("images", "prompts")),
    (lambda images, **kwargs: 0, ("images", "prompts", "metadata")),
    (lambda images, prompt=None, **kwargs: 0, ("images", "prompts", "metadata")),
    (lambda *args: 0, ("images", "prompts", "metadata")),
    (lambda images, scale=2.0: 0, ("images",)),
    (lambda images, p, m: 0, ("images", "prompts", "metadata")),
]


@pytest.mark.parametrize(("f", "takes"), SIGNATURES)
def test_what_a_callable_takes(f, takes):
    assert wrap(f).takes == takes
    assert ", ".join(takes) in repr(wrap(f))


def test_prompts_arrive_whatever_they_are_called():
    def reward(images, prompt=None, **kwargs):
        seen.append((prompt, kwargs))
        return images.mean((1, 2, 3))

    seen = []
    wrap(reward)(images(), ["a", "b"], ["m", "n"])
    assert seen == [(["a", "b"], {"metadata": ["m", "n"]})]


SEEDS = [1, 1.0, True, torch.tensor(1), torch.tensor(1.0)]


@pytest.mark.parametrize("seed", SEEDS, ids=repr)
def test_a_seed_is_the_number_that_it_is(seed):
    import numpy as np

    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    for same in (seed, np.int64(1)):
        found = steer.sample(flow, lambda x: x.sum(1), None, 2, 2, "none", seed=same)
        assert torch.equal(
            found.x, steer.sample(flow, lambda x: x.sum(1), None, 2, 2, "none", seed=1).x
        )
        assert found.seed == 1


@pytest.mark.parametrize("seed", [1.5, "1", None, torch.tensor([1, 2])], ids=repr)
def test_what_is_no_seed(seed):
    flow = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="a seed must be a whole number"):
        steer.sample(flow, lambda x: x.sum(1), None, 2, 2, "none", seed=seed)


# ------------------------------------------------------------------ ambient states


class Ambient:
    """States of torch in which somebody may call."""

    @staticmethod
    def inference():
        return torch.inference_mode()

    @staticmethod
    def no_grad():
        return torch.no_grad()

    @staticmethod
    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    @staticmethod
    def deterministic():
        return _set(
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
        )

    @staticmethod
    def default_dtype():
        return _set(torch.get_default_dtype, torch.set_default_dtype, torch.float64)


class _set:
    def __init__(self, get, put, value):
        self.get, self.put, self.value = get, put, value

    def __enter__(self):
        self.before = self.get()
        self.put(self.value)

    def __exit__(self, *_):
        self.put(self.before)


STATES = ["inference", "no_grad", "autocast", "deterministic", "default_dtype"]


def call(method, flow=None):
    heat = {"strength": 2.0} if TABLE[method].tempered else {}
    flow = Network() if flow is None else flow
    return steer.sample(
        flow, lambda x: torch.tanh(x).sum(1), ["a", "b"], 3, 3, method, seed=4, **heat
    )


@pytest.mark.parametrize("method", list(steer.METHODS))
@pytest.mark.parametrize("state", STATES)
def test_the_callers_state_changes_nothing(method, state):
    flow, plain = Network(), call(method)
    with getattr(Ambient, state)():
        found = call(method, flow)
    for name in ("x", "rewards", "log_w"):
        assert torch.equal(getattr(found, name).clone(), getattr(plain, name)), name


@pytest.mark.parametrize("method", list(steer.METHODS))
def test_threads_asyncio_and_training_mode_change_nothing(method):
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    plain = call(method)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(call, [method] * 3))

    async def inside():
        return call(method)

    found.append(asyncio.run(inside()))
    found.append(call(method, Network().train()))
    assert all(torch.equal(each.x, plain.x) for each in found)
