"""Run all checks in order; checks that depend on a failed one are skipped."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rewards.checking import cost, gradients, robustness, values
from rewards.checking.bench import Bench, ordinary
from rewards.checking.report import Finding, Report, Seen, said
from steer.reward import Reward, name_of, plain, wrap

__all__ = ["CHECKS", "check"]

Look = Callable[[Bench], Seen]

CHECKS: Mapping[str, tuple[Look, tuple[str, ...]]] = {
    "shape": (values.shape, ()),
    "finite": (values.finite, ("shape",)),
    "range": (values.extent, ("shape",)),
    "determinism": (values.determinism, ("shape",)),
    "generators": (values.generators, ("shape",)),
    "in place": (values.in_place, ("shape",)),
    "batch": (values.batch, ("determinism",)),
    "prompts": (values.prompts, ("determinism",)),
    "parameters": (gradients.parameters, ()),
    "differentiable": (gradients.differentiable, ("shape",)),
    "finite gradient": (gradients.finite_gradient, ("differentiable",)),
    "gradient": (gradients.gradient, ("differentiable",)),
    "rows": (gradients.rows, ("gradient",)),
    "clamp": (values.clamp, ("determinism",)),
    "copy": (robustness.copies, ("determinism",)),
    "double": (robustness.double, ("copy",)),
    "bfloat16": (robustness.bfloat16, ("copy",)),
    "float16": (robustness.float16, ("copy",)),
    "devices": (robustness.devices, ("copy",)),
    "finite difference": (gradients.finite_difference, ("determinism", "rows")),
    "high frequencies": (gradients.high_frequencies, ("gradient",)),
    "unseen change": (gradients.unseen, ("determinism", "gradient")),
    "resolution": (robustness.resolution, ("determinism",)),
    "speed": (cost.speed, ("shape",)),
    "memory": (cost.memory, ("shape",)),
}
"""Name -> the check, and the checks that it depends on."""


def check(
    reward: Reward | Callable[..., Tensor],
    prompts: str | Sequence[str] | None = None,
    size: int = 64,
    images: Tensor | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Report:
    """Check a reward: the contract, its gradient, its cost, and what it is sensitive to.

    It uses 8 ordinary pictures (smooth ones, shapes on white) and hard ones (black, white, grey,
    chessboard, noise). A check that raises has failed, with the exception's message; checks that
    depend on it are skipped, the others continue.

    Args:
        reward: the reward to check. Its network may be large, but is called about 60 times.
        prompts: the pictures get them in turn. Default: none, or `PROMPTS` if the reward needs
            prompts.
        size: side of the pictures.
        images: the ordinary pictures (n, 3, h, w) in [0, 1], at least 2, instead of ours.
        device: device for the check. Default: that of the reward.
        seed: seed of pictures and directions.

    Raises:
        ValueError: a size below 8, images of another shape or range, no prompts in a list, or a
            device that is not there. Whatever is wrong with the reward is in the report.
    """
    # a reward that uses the global generators must neither change the caller's random state nor
    # depend on it
    with plain(dtype=torch.float32), torch.random.fork_rng(devices=[]):
        bench = Bench(wrap(reward), prompts, ordinary(size, images, seed), device, seed)
        bench.settle()
        for name, (look, needs) in CHECKS.items():
            bench.done[name] = _look(bench, name, look, needs)
    return Report(
        name_of(bench.reward),
        tuple(bench.done.values()),
        (bench.images.shape[-2], bench.images.shape[-1]),
        str(bench.device),
        None if bench.prompts is None else tuple(bench.rows(len(bench.images)) or ()),
    )


def _look(bench: Bench, name: str, look: Look, needs: Sequence[str]) -> Finding:
    """Run a check if the checks that it depends on have passed."""
    for need in needs:
        before = bench.done[need]
        if before.verdict == "fail":
            return Finding(name, "skip", f"it depends on {need!r}: fix that first")
        if before.verdict == "skip":
            return Finding(name, "skip", before.line)
        if need == "differentiable" and not bench.reward.differentiable:
            return Finding(name, "skip", "it is declared to have no gradient")
    try:
        return Finding(name, *look(bench))
    except Exception as error:
        return Finding(name, "fail", f"it raised {said(error)}")
