"""Compiled blocks: the same numbers, and no new graph for steps, times, prompts or scales."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import steer
from steer.adapters.compiling import is_compiled
from steer.adapters.inject import adapt
from steer.path import Linear
from steer.tuning.sharding import refuse_unshardable
from tests import tiny_pipelines as tiny
from tests.test_tuning import tiny as small
from tests.test_tuning import tune


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, h):
        return h + self.outer(torch.nn.functional.gelu(self.inner(h)))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, s, t):
        h = self.into(torch.cat([x, s[:, None], t[:, None]], 1))
        for block in self.blocks:
            h = block(h)
        return self.out(h)


class Blocks(steer.FlowMap):
    """A map of vectors whose network repeats a block."""

    event_shape = (2,)

    def __init__(self):
        super().__init__()
        self.path, self.network = Linear(), Network()

    @property
    def denoiser(self):
        return self.network

    def jump(self, x, s, t):
        s, t = (torch.as_tensor(u).to(x).expand(len(x)) for u in (s, t))
        return x + (t - s)[:, None] * self.network(x, s, t)

    def velocity(self, x, t):
        t = torch.as_tensor(t).to(x).expand(len(x))
        return self.network(x, t, t)

    def given(self, prompts):
        return self


def vectors():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Blocks().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def pipeline(name, **options):
    pipe = tiny.build(name)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    call = dict(tiny.CALLS[name])
    size = {"height": call.pop("height"), "width": call.pop("width")}
    return steer.load(pipe, **size, call=call, **options)


def changed(flow):
    tuned = adapt(flow, 2)
    generator = torch.Generator().manual_seed(0)
    for p in tuned.adapters().values():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
        p.requires_grad_(True)
    return tuned


def gradients(tuned, x, scale, checkpoint=False):
    tuned.checkpoint = checkpoint
    y = tuned.at(scale).jump(x, 0.3, 1.0) + tuned.at(scale / 2).jump(x, 0.1, 0.7)
    return torch.autograd.grad(tuned.decode(y).square().sum(), list(tuned.adapters().values()))


def close(one, two):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, two, strict=True))


def seen(flow, x, backend):
    """Compare a flow with its compiled twin; return how many graphs there were after each part."""
    plain, made = changed(flow(False)), changed(flow(backend))
    assert is_compiled(made)
    assert not is_compiled(plain)
    found = []
    for prompts, scale, t in [
        (["a fox"], 0.0, 0.2), (["a fox"], 0.5, 0.2),  # off, on
        (["a fox"], 1.0, 0.9), (["an owl"], 0.25, 0.1), (["an owl"], -0.7, 0.6),
    ]:  # fmt: skip
        with torch.no_grad():
            pair = [one.given(prompts).at(scale).jump(x, t, 1.0) for one in (plain, made)]
        assert torch.allclose(*pair, rtol=1e-4, atol=1e-5)
        found.append(graphs())
    for scale in (1.0, 0.6):
        pair = [gradients(one.given(["a fox"]), x, scale) for one in (plain, made)]
        assert close(*pair)
        found.append(graphs())
    return found


def test_the_same_numbers_and_no_new_graph():
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    found = seen(lambda backend: compiled(vectors(), backend), x, "eager")
    assert found[0] == 1  # for three blocks
    assert found[1] > found[0] > 0
    assert found[1] == found[2] == found[3] == found[4]  # times, prompts, scales
    assert found[5] == found[6]


def compiled(flow, backend):
    return steer.load(flow, compile=backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sana", "sdxl"])
def test_pipelines(name):
    """Blocks of one kind share a graph; two views of different scale, and checkpointing."""
    x = None

    def flow(backend):
        return pipeline(name, compile=backend)

    x = torch.randn(2, *flow(False).event_shape, generator=torch.Generator().manual_seed(0))
    found = seen(flow, x, "aot_eager")
    assert found[1] == found[4]
    assert found[5] == found[6]
    plain, made = changed(flow(False)).given(["a"]), changed(flow("aot_eager")).given(["a"])
    pair = [gradients(one, x, 0.5, checkpoint=True) for one in (plain, made)]
    assert close(*pair)
    before = graphs()
    gradients(made, x, 0.8, checkpoint=True)
    assert graphs() == before


@pytest.mark.slow
def test_tuning_makes_no_graph_after_its_first_steps(tmp_path):
    """The same curve as without; checks, sweep and sampling included."""
    counts = {}
    for steps in (3, 8):
        torch._dynamo.reset()
        counters.clear()
        tuned = tune(
            compiled(small(), "eager"), tmp_path / str(steps), steps, check_every=2,
            check_samples=1, sweep=[0.0, 0.5, 1.0], sweep_steps=[1, 2],
        )  # fmt: skip
        counts[steps] = graphs()
    assert counts[3] == counts[8] > 0
    wanted = tune(small(), None, 8)
    pair = [list(one.adapters().values()) for one in (tuned, wanted)]
    assert close(*pair)


def test_a_copy_is_compiled_as_well_and_fsdp_is_refused():
    flow = compiled(vectors(), "eager")
    tuned = adapt(flow, 2)
    blocks = [m for m in tuned.flow.denoiser.modules() if "compiled_by" in vars(m)]
    assert blocks
    assert all(m._compiled_call_impl is not None for m in blocks)
    assert all(m._compiled_call_impl is None for m in copy.deepcopy(blocks))
    with pytest.raises(ValueError, match=r"fsdp.*leave compile out"):
        refuse_unshardable(tuned)


def test_what_has_no_blocks_is_refused():
    with pytest.raises(ValueError, match="leave compile out"):
        steer.load(steer.GaussianMixture([[0.0, 0.0]], 1.0), compile=True)


def test_a_sampled_run_is_the_same():
    options = {"particles": 4, "method": "fmrg-j", "seed": 1}
    flow, counts = compiled(vectors(), "eager"), []
    for steps in (3, 8):
        wanted = steer.sample(vectors(), lambda x: x[:, 0], steps=steps, **options)
        found = steer.sample(flow, lambda x: x[:, 0], steps=steps, **options)
        assert torch.allclose(wanted.x, found.x, atol=1e-4)
        counts.append(graphs())
    assert counts[0] == counts[1] > 0
