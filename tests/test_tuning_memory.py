"""Too little memory for a micro-batch of tuning: halved, said once, to the same gradient."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

import steer
from rewards.combine.normalised import Normalised
from steer.adapters.inject import adapt
from steer.flow import Wrapped
from steer.objectives.batch import Objective
from steer.objectives.table import TABLE, build
from steer.reward import wrap
from steer.tuning.module import RewardTuning
from steer.tuning.prompts import Prompts
from tests.test_tuning import PROMPTS, redness, same, state, tiny, tune

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"
HALVED = sorted(name for name in TABLE if not (build(name).per_call or build(name).uneven))


class Tight(steer.Reward):
    """A reward that has memory for `most` rows where a gradient is taken: forward or backward."""

    def __init__(self, most, where="forward"):
        super().__init__()
        self.most, self.where, self.calls = most, where, []

    def forward(self, images, prompts=None, metadata=None):
        if not images.requires_grad:  # what a run reads of it without gradients
            return redness(images)
        self.calls.append(len(images))
        if self.where == "forward" and len(images) > self.most:
            raise torch.OutOfMemoryError(OOM)
        return redness(Full.apply(images, self.most) if self.where == "backward" else images)


class Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > ctx.most:
            raise torch.OutOfMemoryError(OOM)
        return gradient, None


class TightDecoder(Wrapped):
    """A flow whose decoder has memory for two rows."""

    def decode(self, x):
        if len(x) > 2 and x.requires_grad:
            raise torch.OutOfMemoryError(OOM)
        return super().decode(x)


def module_of(objective, reward, flow=None, **changes):
    tuned = adapt(tiny() if flow is None else flow, 2)
    with torch.no_grad():  # student and base differ
        for k, p in enumerate(tuned.adapters().values()):
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    rule = build(objective)
    return RewardTuning(
        tuned, rule, wrap(reward), Prompts(PROMPTS), steps=9, temperature=0.1,
        **{"batch_size": 16, "micro_batch": 16, **changes},
    )  # fmt: skip


def gradients(module, rows=16):
    loss, terms, _ = module._halving.loss(3, 0, rows)
    loss.backward()
    found = {k: p.grad.clone() for k, p in module.tuned.adapters().items() if p.grad is not None}
    return loss.detach(), terms, found


@pytest.mark.parametrize(
    "objective",
    ["direct", *(pytest.param(n, marks=pytest.mark.slow) for n in HALVED if n != "direct")],
)
def test_the_gradient_is_the_same_in_parts(objective):
    """By each objective; and in one part it is the gradient of the loss itself, bit for bit."""
    plain = module_of(objective, redness)
    plain.objective(plain.batch(3, 0, 16))["loss"].backward()
    wanted = {k: p.grad.clone() for k, p in plain.tuned.adapters().items() if p.grad is not None}
    _, _, whole = gradients(module_of(objective, redness))
    assert wanted.keys() == whole.keys()
    assert all(torch.equal(wanted[k], whole[k]) for k in wanted)
    parts = module_of(objective, redness)
    parts._halving.rows = 4
    loss, terms, found = gradients(parts)
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < 1e-5 * largest
    assert float(terms["loss"]) == pytest.approx(float(loss))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_halves_says_so_once_and_remembers(where):
    wanted = state(tune(tiny(), reward=Tight(99), batch_size=16, steps=2))
    tight = Tight(4, where)
    with pytest.warns(UserWarning, match="out of memory at 16 rows a call") as said:
        found = state(tune(tiny(), reward=tight, batch_size=16, steps=2))
    told = [str(w.message) for w in said if "out of memory" in str(w.message)]
    assert len(told) == 1
    assert "going on with 4, to the same gradient" in told[0]
    assert "micro_batch=4" in told[0]
    assert [n for n in tight.calls if n > 4] == [16, 8]
    assert tight.calls.count(4) == 8  # two steps of four parts, and nothing beside
    assert max(float((wanted[k] - found[k]).abs().max()) for k in wanted) < 1e-5
    assert sum(float(v.abs().sum()) for k, v in found.items() if "lora_B" in k) > 0


def test_a_decoder_without_memory_is_the_same():
    wanted = gradients(module_of("direct", redness))[2]
    with pytest.warns(UserWarning, match="going on with 2"):
        found = gradients(module_of("direct", redness, TightDecoder(tiny())))[2]
    pairs = zip(wanted.values(), found.values(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def test_what_failed_leaves_no_trace():
    """In counts of calls, and in the scales that a reward learns."""
    made = []
    for reward in (Tight(99), Tight(4)):
        scaled = Normalised(wrap(reward))
        scaled.training = True
        module = module_of("direct", scaled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gradients(module)
        assert not module.counts.learning
        made.append((module.counts, scaled.noted))
    assert made[0][0] == made[1][0]
    torch.testing.assert_close(made[0][1], made[1][1])


def test_one_row_too_many_and_other_errors_are_raised():
    module = module_of("direct", Tight(0))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        gradients(module)
    with pytest.raises(RuntimeError, match="shapes"):
        gradients(module_of("direct", lambda images: images @ torch.zeros(2, 2)))


@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_rows_that_are_compared_are_not_parted(objective):
    class Full(steer.Reward):
        differentiable = False
        calls = 0

        def forward(self, images, prompts=None, metadata=None):
            type(self).calls += 1
            if len(images) == 8:
                raise torch.OutOfMemoryError(OOM)
            return redness(images)

    fewest = build(objective).group == 8
    advice = "the fewest that this objective" if fewest else "micro_batch=4"
    with pytest.raises(torch.OutOfMemoryError, match=f"compares the rows.*{advice}"):
        tune(tiny(), objective=objective, reward=Full(), batch_size=8)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_objective_of_one_s_own_is_parted_where_it_says_that_it_may_be(where):
    class Own(Objective):
        def forward(self, batch):
            value = batch.score(batch.student.jump(batch.noise(), 0.0, 1.0))
            return {"loss": -(value / value.detach().abs().max()).mean()}  # of the whole call

    class Says(Own):
        per_call = False

    with pytest.raises(torch.OutOfMemoryError, match=r"does not say, by per_call.*micro_batch=4"):
        tune(tiny(), objective=Own(), reward=Tight(4, where), batch_size=8)
    with pytest.warns(UserWarning, match="going on with 4"):
        tune(tiny(), objective=Says(), reward=Tight(4, where), batch_size=8)


SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from tests.test_tuning import tiny, tune
from tests.test_tuning_memory import Tight
if __name__ == "__main__":
    torch.set_num_threads(1)
    import os
    most = int(sys.argv[2]) if os.environ.get("LOCAL_RANK", "0") == "1" else 99
    tune(tiny(), sys.argv[1], 3, reward=Tight(most, sys.argv[3]), batch_size=16, devices=2,
         strategy="ddp")
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_one_of_two_processes_halves(tmp_path, where):
    """The other goes on as it is, and the adapters are those of a run with memory enough."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for most in (99, 2):
        command = [sys.executable, tmp_path / "script.py", tmp_path / str(most), str(most), where]
        run = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stderr.count("going on with 2, to the same gradient") == (most == 2)
    one, two = (
        safetensors.torch.load_file(tmp_path / str(most) / "adapter_model.safetensors")
        for most in (99, 2)
    )
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5
    assert not same(one, {k: torch.zeros_like(v) for k, v in one.items()})
