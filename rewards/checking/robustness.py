"""Checks against changes that should hardly matter: copies, dtypes, devices, picture size."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.checking.bench import Bench, ask
from rewards.checking.report import Seen, graded, said

__all__ = ["bfloat16", "copies", "devices", "double", "float16", "resolution"]

HALF = 0.25
"""Largest error of a half type, in standard deviations of the ordinary pictures' scores."""
CHANGE, RANK = 0.5, 0.7
"""At another size: largest change of a score in spreads, and smallest rank correlation."""


def copies(bench: Bench) -> Seen:
    """Check that a deep copy gives the same scores."""
    try:
        other = bench.copied()
    except Exception as error:
        line = f"copy.deepcopy raised {said(error)}: open files, locks and connections when "
        return "fail", line + "called, or define __deepcopy__", {}
    apart = bench.apart(bench.scores(bench.images, reward=other), bench.base)
    if apart > 1e-4:
        line = "a deep copy gives other scores: keep its data in attributes, parameters "
        return "fail", line + "and buffers", {"difference": apart}
    return "pass", "a deep copy gives the same scores", {"difference": apart}


def double(bench: Bench) -> Seen:
    """Check that it gives the same scores in float64."""
    mend = "register tensors as buffers, or move them with .to(images)"
    try:
        scores = bench.scores(bench.images.double(), reward=bench.copied(torch.float64))
    except Exception as error:
        return "fail", f"after .double() it raised {said(error)}: {mend}", {}
    figures = {"difference": bench.apart(scores, bench.base)}
    verdict = graded(figures["difference"], (0.01, 0.05))
    if verdict == "pass":
        return verdict, "after .double() it gives the same scores", figures
    line = "after .double() the scores differ, in standard deviations: its float32 is not accurate"
    return verdict, f"{line}, or {mend}", figures


def _half(kind: torch.dtype, bench: Bench) -> Seen:
    """Compare with float32: only the pictures in half precision, then the reward as well."""
    figures: dict[str, float] = {}
    wrong, images = [], bench.images.to(kind)
    name = str(kind).removeprefix("torch.")
    for what, to in (("pictures", ()), ("reward", (kind,))):
        try:
            scores = bench.scores(images, reward=bench.copied(*to))
        except Exception as error:
            wrong.append(f"{what} in {name}: it raised {said(error)}")
            continue
        figures[what] = bench.apart(scores, bench.base)
        if not figures[what] <= HALF:
            wrong.append(f"{what} in {name}: the scores are not those of float32")
    if wrong:
        return "warn", f"{'; '.join(wrong)}. Keep the reward and its pictures in float32", figures
    return (
        "pass",
        f"pictures and reward in {name} give nearly the same scores, in standard deviations",
        figures,
    )


def bfloat16(bench: Bench) -> Seen:
    """Check that it gives nearly the same scores in bfloat16."""
    return _half(torch.bfloat16, bench)


def float16(bench: Bench) -> Seen:
    """Check that it gives nearly the same scores in float16."""
    return _half(torch.float16, bench)


def devices(bench: Bench) -> Seen:
    """Check that it gives the same scores on the other devices of this machine."""
    found = ["cpu"]
    found += ["cuda"] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    others = [name for name in found if name != bench.device.type]
    if not others:
        return "skip", f"this machine has no other device than {bench.device.type}", {}
    figures: dict[str, float] = {}
    for name in others:
        x = bench.images.to(name)
        other = bench.copied(name)
        scores = ask(other, x, bench.rows(len(x)))
        if scores.device.type != name:
            line = f"moved to {name} its scores are on {scores.device}: return them with "
            return "fail", line + "scores.to(images.device)", figures
        figures[name] = bench.apart(scores.detach().double().cpu(), bench.base)
    verdict = graded(max(figures.values()), (0.02, 0.1))
    if verdict == "pass":
        return verdict, f"moved to {', '.join(others)} it gives the same scores", figures
    return verdict, "on another device the scores differ, in standard deviations", figures


def _ranks(scores: Tensor) -> Tensor:
    return scores.argsort(stable=True).argsort().double()


def resolution(bench: Bench) -> Seen:
    """Check that the same pictures at other sizes have similar scores and the same order."""
    images = bench.images
    h, w = images.shape[-2:]
    figures: dict[str, float] = {}
    changes, correlations = [], []
    for name, size in (
        ("half", (h // 2, w // 2)),
        ("twice", (2 * h, 2 * w)),
        ("wide", (h, 2 * w)),
    ):
        x = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        try:
            scores = bench.scores(x.clamp(0, 1))
        except Exception as error:
            line = f"at {size[0]} x {size[1]} pixels it raised {said(error)}: resize to the "
            return "warn", line + "network's size first, or use this reward at one size", figures
        if name == "wide":  # with another shape it is another picture: it only has to be scored
            break
        changes.append(float((scores - bench.base).abs().mean()) / bench.spread)
        correlation = torch.corrcoef(torch.stack([_ranks(scores), _ranks(bench.base)]))[0, 1]
        correlations.append(float(correlation))
        figures |= {f"change_{name}": changes[-1], f"rank_{name}": correlations[-1]}
    if all(change <= CHANGE for change in changes) and all(rank >= RANK for rank in correlations):
        return (
            "pass",
            "pictures of half and twice the size have similar scores and the same order",
            figures,
        )
    line = (
        "the same pictures at half or twice the size have other scores or another order, in "
        "standard deviations"
    )
    return "warn", f"{line}: use means, not sums, or resize first; or keep to one size", figures
