"""On an NVIDIA card: what the CPU gives, in bfloat16 too, nothing left behind on the host.

`make test-cuda` runs them; they are skipped where there is no card.
"""

import contextlib
import copy
import itertools
import warnings
from collections import Counter

import pytest
import torch

import rewards
import steer
from steer.objectives.table import TABLE
from steer.sampling.methods import TABLE as METHODS
from steer.tuning import module
from tests import tiny_pipelines as tiny
from tests.tiny_flows import PROMPT, seen_as

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no NVIDIA card, or TEST_DEVICE is not cuda"
)

FAMILIES = (
    "sd15_ddim", "sdxl", "sdxl_lcm", "sd3", "flux", "flux_schnell", "sana", "sana_sprint",
    "flux2_klein", "flux3_klein", "flux3_base", "qwen_image", "z_image", "wan", "anyflow", "prx",
    "ernie", "krea2", "hunyuan_image", "dreamlite",
)  # fmt: skip


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def on_card(name, dtype):
    return seen_as(tiny.build(name).to(DEVICE, dtype), name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_draws_what_it_draws_on_the_cpu(name):
    """In float32, TF32 off."""
    cpu, card = seen_as(tiny.build(name), name), on_card(name, torch.float32)
    found = [
        steer.sample(f, red, [PROMPT], particles=2, steps=2, method="none") for f in (cpu, card)
    ]
    assert found[1].x.device.type == DEVICE
    torch.testing.assert_close(found[1].x.cpu(), found[0].x, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["fmrg-j", "reno", "best-of-n", "fmtt", "split"])
def test_a_pipeline_is_steered_in_bfloat16(name, method):
    flow = on_card(name, torch.bfloat16)
    more = {} if method in ("fmrg-j", "reno", "best-of-n") else {"temperature": 0.1}
    result = steer.sample(flow, red, [PROMPT], particles=2, steps=2, method=method, **more)
    assert result.x.dtype == torch.float32
    assert result.x.isfinite().all()
    assert result.rewards.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_is_tuned_in_bfloat16(name):
    flow = on_card(name, torch.bfloat16)
    tuned = steer.finetune(flow, red, [PROMPT], objective="direct", steps=2, batch_size=2)
    x = torch.randn(2, *flow.event_shape, device=DEVICE)
    assert tuned.given([PROMPT]).lookahead(x, 0.0).isfinite().all()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "sana_sprint"])
def test_the_drop_in_in_bfloat16(name):
    pipe = tiny.build(name).to(DEVICE, torch.bfloat16)
    guidance = steer.RewardGuidance(red, 1.0, pipe=pipe)
    plain = tiny.run(pipe, name, steps=3).float()
    still = tiny.run(
        pipe, name, steps=3, callback_on_step_end=steer.RewardGuidance(red, 0.0, pipe=pipe)
    )
    assert torch.equal(still.float(), plain)
    moved = tiny.run(pipe, name, steps=3, callback_on_step_end=guidance).float()
    assert red(moved).mean() > red(plain).mean()
    guidance.remove()


@pytest.mark.parametrize("method", steer.METHODS)
def test_the_embedded_model_is_steered(method):
    """Same noise, so the unguided pictures are the CPU's."""
    more = {"method": method, "particles": 4, "steps": 4, "seed": 3}
    clip = rewards.load("clip")
    found = [
        steer.sample(steer.load("emoji", device=device), clip.to(device), ["a fox"], **more)
        for device in ("cpu", DEVICE)
    ]
    assert found[1].images.isfinite().all()
    if method in ("none", "best-of-n"):
        torch.testing.assert_close(found[1].x.cpu(), found[0].x, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("objective", TABLE)
def test_the_embedded_model_is_tuned(objective, dtype, tmp_path):
    flow = steer.load("emoji", device=DEVICE, dtype=dtype)
    before = copy.deepcopy(flow.state_dict())
    steer.finetune(
        flow, "colour:name=red", ["fox", "owl"], objective=objective, steps=2, batch_size=8,
        out=tmp_path / "run",
    )  # fmt: skip
    assert all(torch.equal(v, flow.state_dict()[k]) for k, v in before.items())
    back = steer.load("emoji", lora=tmp_path / "run", device=DEVICE)
    assert (
        back.given(["fox"]).lookahead(torch.randn(1, 3, 32, 32).to(DEVICE), 0.0).isfinite().all()
    )


@contextlib.contextmanager
def waits():
    """What makes the host wait for the card, as CUDA itself reports it: lists of code lines."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: [
                f"{w.filename}:{w.lineno}" for w in found if "synchronizing CUDA" in str(w.message)
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_waiting_for_the_card_is_reported():
    with waits() as so_far:
        torch.ones(3, device=DEVICE).sum().item()
    assert len(so_far()) == 1


LAST = {"noise-smc": 2, "reno": 2, "dno": 2}
"""Their last population is the end of two steps: an iteration, and the pictures."""


@pytest.mark.parametrize("method", steer.METHODS)
def test_a_step_waits_once_for_the_card(method):
    """The first step has the start in it; `tests/test_stalls.py` counts on a simulated device."""
    flow, reward = steer.load("emoji", device=DEVICE), rewards.load("clip").to(DEVICE)
    more = {"temperature": 0.05} if METHODS[method].weighted else {}
    counts, before = [], []
    with waits() as so_far:
        for _ in steer.stream(flow, reward, ["fox", "owl"], 4, steps=4, method=method, **more):
            now = so_far()
            counts.append(now[len(before) :])
            before = now
    *within, last = counts[1:]
    assert max((len(c) for c in within), default=0) <= 1, Counter(itertools.chain(*within))
    assert len(last) <= LAST.get(method, 1), Counter(last)


@pytest.mark.parametrize("objective", TABLE)
def test_an_optimizer_step_waits_once_for_the_card(objective, monkeypatch):
    counts, before = [], []

    class Counting(module.RewardTuning):
        def on_train_batch_start(self, batch, index):
            before[:] = so_far()

        def on_train_batch_end(self, outputs, batch, index):
            counts.append(so_far()[len(before) :])

    monkeypatch.setattr(module, "RewardTuning", Counting)
    flow = steer.load("emoji", device=DEVICE)
    with waits() as so_far:
        steer.finetune(
            flow, red, ["fox", "owl"], objective=objective, steps=4, batch_size=8, progress=False
        )
    assert len(counts) == 4
    assert max(len(c) for c in counts[1:]) <= 1, Counter(itertools.chain(*counts[1:]))
