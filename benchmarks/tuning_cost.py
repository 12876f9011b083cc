"""Cost of a tuning step relative to its bare calls, and the memory of tuning.

`python -m benchmarks.tuning_cost` prints ratios of one interleaved run. Bare: the student's jump
and its backward pass, the base's jump, the reward with its gradient and AdamW, on the same network
with peft's layers, written out by hand. The step: the same through `RewardTuning` in Lightning's
loop. Memory: all tensors that are alive after a step, each storage counted once, compared with
base, adapters and optimizer.
"""

import argparse
import gc
import statistics
import time

import torch

import rewards
import steer
from steer.adapters.inject import adapt
from steer.objectives.direct import Direct
from steer.objectives.parts import squared
from steer.tuning.module import AVERAGE, RewardTuning
from steer.tuning.prompts import Prompts

__all__ = ["alive", "bare_step", "main"]

NAMES = ["red fox", "owl", "banana", "face"] * 8


def alive() -> int:
    """Return the bytes of all live tensors, each storage once."""
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def bytes_of(tensors) -> int:
    """Return the bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def bare_step(tuned, flow, reward, optimizer, batch):
    """Take one step of the direct objective, written out by hand."""
    names = NAMES[:batch]
    x_0 = torch.randn(batch, *flow.event_shape)
    y = tuned.flow.given(names).jump(x_0, 0.0, 1.0)
    with torch.no_grad():
        base = flow.given(names).jump(x_0, 0.0, 1.0)
    loss = (squared(y - base) / 2 - reward(flow.decode(y), names) / 0.02).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(tuned.adapters().values()), 1.0)
    optimizer.step()


def main() -> None:
    """Print the ratios."""
    import lightning as L

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    reward = rewards.load("clip:views=4,noise=0.2")
    flow = steer.load("emoji")
    before = alive()
    hand = adapt(flow, args.rank)
    for p in hand.adapters().values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(hand.adapters().values(), lr=1e-3)
    bare, whole = [], []

    class Clock(L.Callback):
        """Time each step, from the start of one batch to the next, with a bare step in between."""

        def on_train_batch_start(self, *_):
            start = time.perf_counter()
            bare_step(hand, flow, reward, optimizer, args.batch)
            bare.append(time.perf_counter() - start)
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_):
            whole.append(time.perf_counter() - self.start)

    tuned = adapt(flow, args.rank)
    module = RewardTuning(
        tuned, Direct(jumps=[1]), reward, Prompts(NAMES), steps=args.steps,
        batch_size=args.batch, micro_batch=args.batch, temperature=0.02,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=args.steps, max_epochs=-1, accelerator="cpu", logger=False, callbacks=[Clock()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, precision="32-true",
    )  # fmt: skip
    trainer.fit(module, module.loader())
    ratios = [w / b for w, b in zip(whole[3:], bare[3:], strict=True)]
    print(f"step / bare calls: median {statistics.median(ratios):.3f}")
    state = [
        v for s in (*trainer.optimizers, optimizer) for p in s.state.values() for v in p.values()
    ]
    adapters = [p for t in (tuned, hand) for p in t.adapters().values()]
    adapters += list(tuned.adapters(AVERAGE).values())
    gradients = [p.grad for p in adapters if p.grad is not None]
    expected = bytes_of(state) + bytes_of(adapters) + bytes_of(gradients)
    grown = alive() - before
    base = bytes_of(flow.parameters())
    print(
        f"base {base / 1e6:.2f} MB; beyond it {grown / 1e6:.2f} MB, of which adapters, their "
        f"average, gradients and optimizer (of both runs) are {expected / 1e6:.2f} MB: "
        f"{grown / expected:.3f}"
    )


if __name__ == "__main__":
    main()
