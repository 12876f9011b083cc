"""Checks of scores: one finite number per picture, which depends only on it and its prompt."""

from random import getstate

import torch
from torch import Tensor

from rewards.checking.bench import PROMPTS, Bench, ask
from rewards.checking.report import Seen, graded
from steer.reward import check_scores, name_of

__all__ = [
    "batch",
    "clamp",
    "determinism",
    "extent",
    "finite",
    "generators",
    "in_place",
    "prompts",
    "shape",
]

ROUNDING = 1e-3, 5e-2
"""Scores that should agree may differ by the first number; beyond the second one they are
different. Both are in spreads, the standard deviation of the scores over the ordinary pictures."""


def shape(bench: Bench) -> Seen:
    """Check that it gives one float per picture, on the pictures' device."""
    images = bench.images
    given = images.clone()
    scores = bench.reward(given, bench.rows(len(images)))
    check_scores(scores, given, name_of(bench.reward))
    if not scores.is_floating_point():
        return "fail", f"the scores are {scores.dtype}: return floats", {}
    if scores.device != images.device:
        line = f"the scores are on {scores.device}, the images on {images.device}: return them "
        return "fail", line + "with scores.to(images.device)", {}
    kind = str(scores.dtype).removeprefix("torch.")
    return "pass", f"one {kind} a picture, {tuple(images.shape)} -> {tuple(scores.shape)}", {}


def finite(bench: Bench) -> Seen:
    """Check that every score is finite, also on hard pictures."""
    scores = bench.scores(bench.every)
    bad = [n for n, s in zip(bench.names, scores, strict=True) if not s.isfinite()]
    figures = {"pictures": float(len(scores)), "not_finite": float(len(bad))}
    if bad:
        line = (
            f"no finite score for {', '.join(bad)}: keep roots, logarithms and quotients away "
            "from "
        )
        return "fail", line + "zero, as (x + 1e-8).sqrt()", figures
    return (
        "pass",
        "every score is finite, on black, white, grey, chessboard and noise too",
        figures,
    )


def extent(bench: Bench) -> Seen:
    """Check that scores differ, and report their range."""
    scores = bench.scores(bench.every)
    scores = scores[scores.isfinite()]
    if not len(scores):
        return "fail", "no score is finite", {}
    low, middle, high = float(scores.min()), float(scores.median()), float(scores.max())
    figures = {"min": low, "median": middle, "max": high}
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return "fail", "all pictures have the same score: the reward has no preference", figures
    figures["spread"] = float(bench.base[bench.base.isfinite()].std(unbiased=False))
    if figures["spread"] <= 1e-6 * max(abs(low), abs(high)):
        return (
            "fail",
            "ordinary pictures have the same score: the reward is saturated there",
            figures,
        )
    return (
        "pass",
        "scores of pictures in [0, 1]; the standard deviation is over the ordinary ones",
        figures,
    )


def determinism(bench: Bench) -> Seen:
    """Check that two calls agree."""
    apart = bench.apart(bench.scores(bench.images), bench.scores(bench.images))
    figures = {"difference": apart}
    if apart == 0:
        return "pass", "two equal calls give the same scores, bit for bit", figures
    if apart <= 1e-4:
        return "warn", "two calls differ by rounding: some operation is not deterministic", figures
    line = (
        "two calls give different scores: fix the random numbers for a run (a generator with a "
        "seed of its "
    )
    return "fail", line + "own), and disable dropout (eval())", figures


def generators(bench: Bench) -> Seen:
    """Check that it does not use the global generators."""

    def states() -> list[Tensor]:
        here = bench.device.type == "cuda"
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if here else [])]

    torch.default_generator.manual_seed(12345)  # a seed that no reward sets itself
    before, python = states(), getstate()
    bench.scores(bench.images)
    same = all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    if same and python == getstate():
        return "pass", "it leaves the global generators alone", {}
    line = "it uses or seeds a global generator, and so changes all later random numbers of the "
    return "fail", line + "run: use generator=torch.Generator().manual_seed(...)", {}


def in_place(bench: Bench) -> Seen:
    """Check that the pictures are not changed."""
    images = bench.every * 1.5 - 0.25  # so that a clamp in place is detected
    given = images.clone()
    with torch.no_grad():
        ask(bench.reward, given, bench.rows(len(given)))
    changed = float((images != given).double().mean())
    if changed:
        line = "it changes its input images: remove in-place operations (clamp_, mul_)"
        return "fail", line, {"changed": changed}
    return "pass", "the images are not changed", {"changed": changed}


def batch(bench: Bench) -> Seen:
    """Check that a picture has the same score alone, in a batch and at another index."""
    images, first = bench.images, bench.rows(1)
    n = len(images)
    asked = None if first is None else first * n  # another check varies the prompts
    whole = bench.scores(images, asked)
    alone = torch.cat([bench.scores(images[i : i + 1], first) for i in range(n)])
    order = torch.randperm(n, generator=bench.generator)
    permuted = bench.scores(images[order.to(images.device)], asked)
    figures = {
        "alone": bench.apart(alone, whole),
        "permuted": bench.apart(permuted, whole[order]),
    }
    verdict = graded(max(figures.values()), ROUNDING)
    if verdict == "pass":
        return (
            verdict,
            "a picture has the same score alone, in a batch, and at another index",
            figures,
        )
    line = "a picture's score depends on its batch, in standard deviations: "
    if verdict == "warn":
        return verdict, line + "rounding, if the network is of a half type", figures
    return verdict, line + "remove means over the batch and batch norm in training mode", figures


def prompts(bench: Bench) -> Seen:
    """Check that each prompt matters, and only for its own picture."""
    images, n = bench.images, len(bench.images)
    own = list(dict.fromkeys([*(bench.prompts or ()), *PROMPTS]))
    rows, others = ([own[(i + k) % len(own)] for i in range(n)] for k in (0, 1))
    try:
        scores = bench.scores(images, rows)
        shifts = (scores - bench.scores(images, others)).abs() / bench.spread
    except Exception:
        if bench.prompts is not None:
            raise
        return "skip", "it takes no prompts", {}
    figures = {"effect": float(shifts.mean())}
    if not (shifts > 1e-4).any():
        if bench.needs_prompts:
            return "fail", "it takes prompts, but its scores do not depend on them", figures
        if bench.prompts is not None:
            return "warn", "prompts make no difference: it scores pictures only", figures
        return "skip", "it scores pictures only; prompts make no difference", figures
    alone = torch.cat([bench.scores(images[i : i + 1], [rows[i]]) for i in range(n)])
    order = torch.randperm(n, generator=bench.generator)
    moved = bench.scores(images[order.to(images.device)], [rows[i] for i in order])
    figures["alone"] = bench.apart(alone, scores)
    figures["permuted"] = bench.apart(moved, scores[order])
    if max(figures["alone"], figures["permuted"]) > ROUNDING[1]:
        line = "prompts are not matched with their pictures, row by row: score image i with "
        return "fail", line + "prompts[i]", figures
    return "pass", "other prompts give other scores; each picture is scored with its own", figures


def clamp(bench: Bench) -> Seen:
    """Check that values beyond [0, 1] score as if clamped and keep their gradient."""
    wild = 3 * bench.images - 1
    figures = {"difference": bench.apart(bench.scores(wild), bench.scores(wild.clamp(0, 1)))}
    if figures["difference"] > ROUNDING[1]:
        line = "values outside [0, 1] are not scored as if clamped: begin with clamp01(images)"
        return "fail", line + " of steer.reward", figures
    if not bench.ok("gradient"):
        return "pass", "values outside [0, 1] score as if clamped", figures
    gradient, outside = bench.gradient(wild), (wild < 0) | (wild > 1)
    inner, outer = (gradient[m].square().mean().sqrt() for m in (~outside, outside))
    if inner > 0:
        figures["gradient_outside"] = float(outer / inner)
        if not figures["gradient_outside"] > 1e-6:
            line = "pixels outside [0, 1] have no gradient and can never return: use clamp01 of "
            return "fail", line + "steer.reward, which passes it through", figures
    return "pass", "values outside [0, 1] score as if clamped and keep their gradient", figures
