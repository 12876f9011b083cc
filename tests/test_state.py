"""What a step knows of its rows, and micro-batches of flow and potential."""

import pytest
import torch

import steer
from steer.batches import Batched, in_batches, join_rows
from steer.guidance.state import BatchedPotential, State
from tests.test_flow import ByVelocity, mixture


def reward(x):
    return torch.tanh(x).sum(1)


def points(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=g, dtype=torch.float64)


class Watched(ByVelocity):
    """A flow that notes what it is asked."""

    def __init__(self):
        super().__init__(mixture())
        self.asked = []

    def velocity(self, x, t):
        self.asked.append("velocity")
        return super().velocity(x, t)


def state(t=0.5):
    flow = Watched()
    return State(points(), t, flow, steer.Denoised(mixture(), reward, temperature=0.3))


def test_what_is_asked_twice_is_computed_once():
    here = state()
    first = here.evaluation()
    assert here.evaluation() is first
    whole = here.evaluation(derivatives=True)
    assert whole.gradient is not None
    assert here.evaluation() is here.evaluation(derivatives=True) is whole
    assert here.score is here.score
    assert here.velocity is here.velocity
    assert here.flow.asked == ["velocity"]  # the score is of the same velocity
    exact = mixture()
    assert torch.allclose(here.score, exact.score(here.x, 0.5))
    assert torch.allclose(here.velocity, exact.velocity(here.x, 0.5))
    assert torch.allclose(here.value, here.potential(here.x, 0.5))
    closed = State(points(), 0.5, exact, here.potential)
    assert torch.equal(closed.score, exact.score(closed.x, 0.5))
    assert closed._velocity is None


def test_rows_take_along_what_is_known():
    here, index = state(), torch.tensor([4, 0, 0])
    assert here.rows(index)._seen is here.rows(index)._score is None
    here.evaluation(derivatives=True)
    here.score  # noqa: B018  asked, so known
    some = here.rows(index)
    assert some.t == here.t
    assert torch.equal(some.x, here.x[index])
    assert torch.equal(some._seen.gradient, here._seen.gradient[index])
    assert torch.equal(some._velocity, here._velocity[index])
    assert torch.equal(some._score, here._score[index])


def test_views_tell_what_is_known_of_these_rows_and_ask_for_others():
    here = state()
    flow, potential = here.views()
    x, y = here.x, points(seed=1)
    assert flow.velocity(x, 0.5) is here.velocity
    assert flow.score(x, torch.tensor(0.5)) is here.score
    assert potential.evaluate(x, 0.5, derivatives=True) is here.evaluation()
    assert here.flow.asked == ["velocity"]
    for z, t in ((y, 0.5), (x, 0.7), (x.clone(), 0.5), (x, torch.full((6,), 0.5))):
        assert not here.is_of(z, t)
        assert torch.equal(flow.velocity(z, t), here.flow.velocity(z, t))
        assert torch.allclose(flow.score(z, t), here.flow.score(z, t))
        seen, plain = (p.evaluate(z, t, derivatives=True) for p in (potential, here.potential))
        assert torch.equal(seen.value, plain.value)
        assert torch.equal(seen.gradient, plain.gradient)
    assert torch.equal(flow.jump(x, 0.5, 0.8), here.flow.jump(x, 0.5, 0.8))
    assert (potential.temperature, potential.prompts, potential.differentiable) == (
        0.3,
        None,
        True,
    )


def test_a_potential_in_parts_is_the_whole():
    potential, checked, sizes = steer.Naive(mixture(), reward, temperature=0.3), [], []
    inner = potential.evaluate
    potential.evaluate = lambda x, *rest: sizes.append(len(x)) or inner(x, *rest)
    parts = BatchedPotential(potential, 4, 2, lambda *found: checked.append(found))
    x = points(12)
    seen, plain = parts.evaluate(x, 0.5, derivatives=True), inner(x, 0.5, True)
    assert sizes == [4, 4, 4]
    for name in ("value", "reward", "gradient", "partial"):
        assert torch.allclose(getattr(seen, name), getattr(plain, name)), name
    assert [name for name, _ in checked] == ["reward", "gradient"]
    assert torch.equal(checked[0][1], seen.value)
    assert torch.equal(checked[1][1], seen.gradient.sum(1))
    assert parts.evaluate(x, 0.5).gradient is None
    eager = BatchedPotential(potential, None, 2, lambda *found: None, eager=True)
    assert eager.evaluate(x, 0.5).gradient is not None
    assert eager.evaluate(x, 1.0).gradient is None


@pytest.mark.parametrize(
    ("size", "rows"), [(None, [12]), (12, [12]), (11, [9, 3]), (6, [6, 6]), (1, [3, 3, 3, 3])]
)
def test_parts_hold_as_many_rows_of_every_prompt(size, rows):
    x = torch.arange(12)
    parts = in_batches(lambda part: part, x, size, prompts=3)
    assert [len(part) for part in parts] == rows
    assert all((part // 4).tolist() == sorted([0, 1, 2] * (len(part) // 3)) for part in parts)
    assert torch.equal(join_rows(parts, 3), x)


def test_a_flow_in_micro_batches_is_the_flow():
    flow, x = mixture(), points(12)
    batched = Batched(flow, 5, 2)
    for name, times in {"velocity": (0.3,), "jump": (0.3, 0.8), "score": (0.3,)}.items():
        assert torch.allclose(getattr(batched, name)(x, *times), getattr(flow, name)(x, *times))
    assert torch.equal(batched.decode(x), x)
