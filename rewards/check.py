"""What a reward does and what it should not: a check of the contract, with figures.

>>> from rewards import load
>>> report = check(load("brightness"), size=16)
>>> report.ok
True
>>> [finding.name for finding in report.findings if finding.verdict == "warn"]
[]
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import getstate
from statistics import median
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.reward import Reward, name_of, score, unknown, wrap

__all__ = ["CHECKS", "PROMPTS", "Finding", "Report", "check"]

Verdict = Literal["pass", "warn", "fail", "skip"]

PROMPTS = ("a red apple", "a cat", "a house", "a green leaf", "a blue car", "the sun")
"""What a reward that needs prompts is asked where none are given."""

STEP = 1 / 255
"""Of the ascent that asks for noise that nobody sees; it takes `STEPS` of them."""
STEPS = 4

# limits, in spreads: the standard deviation of the scores over the ordinary pictures
ROUNDING = 1e-3, 5e-2
"""Scores that should agree may differ by the first; beyond the second they are others."""
HALF = 0.25
"""A half type may cost this much."""
CHANGE, RANK = 0.5, 0.7
"""At another resolution a score may change by so much, and ranks may correlate no less."""
SLOPE = {torch.float64: 2e-2, torch.float32: 0.1}
"""Relative error of the slope along random directions, of which there are `DIRECTIONS`."""
DIRECTIONS = 8
NOISE = 0.85
"""A gradient with more of white noise's share of high frequencies than this is noise itself."""
GAIN, SURVIVAL = 0.1, 0.3
"""Where an unseen change gains more than the first, this share of it should survive a blur."""

ADVICE = (
    "the ascent may draw noise that only this network reads: average over views, as "
    "augmented(NAME, noise=0.2) does, add a reward of another kind, and watch a judge"
)


@dataclass(frozen=True)
class Finding:
    """What one check saw.

    Attributes:
        name: of the check, one of `CHECKS`.
        verdict: "pass", "warn" (a property to know of), "fail" (a fault) or "skip".
        line: what was seen, and how to mend it where there is something to mend.
        figures: what was measured, name -> number.
    """

    name: str
    verdict: Verdict
    line: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What all checks saw of a reward.

    Attributes:
        reward: its name.
        findings: one a check, in the order of `CHECKS`.
        size: (height, width) of the pictures.
        device: where it ran.
        prompts: what it was asked, one a picture; None: it was asked nothing.
    """

    reward: str
    findings: tuple[Finding, ...]
    size: tuple[int, int]
    device: str
    prompts: tuple[str, ...] | None

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(finding.verdict == "fail" for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """Return the finding of a check.

        Raises:
            ValueError: no such check; the message has the nearest ones.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise unknown("check", name, CHECKS)

    def count(self, verdict: Verdict) -> int:
        """Count the findings of a verdict."""
        return sum(finding.verdict == verdict for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it; numbers that are not finite are null."""
        findings = [
            {
                "name": f.name,
                "verdict": f.verdict,
                "line": f.line,
                "figures": {k: v if math.isfinite(v) else None for k, v in f.figures.items()},
            }
            for f in self.findings
        ]
        return {
            "reward": self.reward,
            "ok": self.ok,
            "size": list(self.size),
            "device": self.device,
            "prompts": None if self.prompts is None else list(self.prompts),
            "findings": findings,
        }


def check(
    reward: Reward | Callable[..., Tensor],
    prompts: str | Sequence[str] | None = None,
    size: int = 64,
    images: Tensor | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Report:
    """Check a reward: the contract, its gradient, its cost, and what it is sensitive to.

    It looks at 8 ordinary pictures (smooth ones, shapes on white) and at hard ones (black, white,
    grey, chessboard, noise). A check that raises has failed, with the exception's message; those
    that stand on it are skipped, the others go on.

    Args:
        reward: what is checked; the network in it need not be small, but is called some 60 times.
        prompts: asked of the pictures in turn. Default: none, or `PROMPTS` where the reward does
            not go without.
        size: side of the pictures.
        images: the ordinary pictures (n, 3, h, w) in [0, 1], at least 2, instead of ours.
        device: where the reward is moved to. Default: where it is.
        seed: draws pictures and directions.

    Raises:
        ValueError: a size below 8, images of another shape or range, no prompts in a list, or a
            device that is not there. Whatever is wrong with the reward is in the report.
    """
    bench = _Bench(wrap(reward), prompts, _pictures(size, images, seed), device, seed)
    with torch.random.fork_rng(devices=[]):  # a reward that draws leaves the caller's state alone
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


class _Bench:
    """A reward with the pictures and prompts that it is tried on.

    Attributes:
        images: ordinary pictures (n, 3, h, w).
        hard: name -> a picture (3, h, w).
        prompts: what it is asked, in turn; None: nothing.
        needs_prompts: whether it raises without.
        done: what the earlier checks saw.
    """

    def __init__(
        self,
        reward: Reward,
        prompts: str | Sequence[str] | None,
        pictures: Tensor,
        device: str | torch.device | None,
        seed: int,
    ) -> None:
        if prompts is not None and not len(prompts):
            raise ValueError("no prompts in the list: give some, or leave it out")
        self.prompts = [prompts] if isinstance(prompts, str) else prompts and list(prompts)
        self.generator = torch.Generator().manual_seed(seed)
        self.reward, self.device = reward, _device(reward, device)
        self.images = pictures.to(self.device)
        self.hard = {k: x.to(self.device) for k, x in _hard(pictures, self.generator).items()}
        self.done: dict[str, Finding] = {}
        self.needs_prompts = False
        self._base: Tensor | None = None

    def settle(self) -> None:
        """Find out whether it needs prompts."""
        try:
            with torch.no_grad():
                self.reward(self.images[:1].clone(), None)
        except Exception:  # whatever is wrong, the first check says it
            self.needs_prompts = True
            self.prompts = self.prompts or list(PROMPTS)

    def rows(self, n: int) -> list[str] | None:
        """Return n prompts, or None."""
        if self.prompts is None:
            return None
        return [self.prompts[i % len(self.prompts)] for i in range(n)]

    @torch.no_grad()
    def scores(
        self, images: Tensor, prompts: list[str] | None = None, reward: Reward | None = None
    ) -> Tensor:
        """Score images (n, 3, h, w) -> (n,), in float64 on the CPU."""
        asked = self.rows(len(images)) if prompts is None else prompts
        return score(reward or self.reward, images.clone(), asked).detach().double().cpu()

    def gradient(self, images: Tensor, reward: Reward | None = None) -> Tensor:
        """Return d score_i / d image_i, (n, 3, h, w)."""
        x = images.detach().requires_grad_()
        # unequal weights: terms that cancel in a plain sum show, and so does a backward pass that
        # forgets its upstream gradient
        weights = 1.0 + torch.arange(len(x), device=x.device) % 2
        with torch.enable_grad():
            scores = score(reward or self.reward, x.clone(), self.rows(len(x)))
            weighted = (scores * weights.to(scores)).sum()
            (gradient,) = torch.autograd.grad(weighted, x, allow_unused=True)
        if gradient is None:
            return torch.zeros_like(x)
        return gradient / weights.to(gradient)[:, None, None, None]

    @property
    def base(self) -> Tensor:
        """Scores of the ordinary pictures, (n,)."""
        if self._base is None:
            self._base = self.scores(self.images)
        return self._base

    @property
    def spread(self) -> float:
        """Their standard deviation, no less than what float32 resolves."""
        known = self.base[self.base.isfinite()]
        if not len(known):
            return 1.0
        return max(float(known.std(unbiased=False)), 1e-5 * float(known.abs().max()), 1e-30)

    def apart(self, a: Tensor, b: Tensor) -> float:
        """Return the largest difference, in spreads; no number in both is no difference."""
        difference = (a - b).abs()[~((a == b) | (a.isnan() & b.isnan()))]
        worst = float(difference.max()) / self.spread if len(difference) else 0.0
        return math.inf if math.isnan(worst) else worst

    def ok(self, name: str) -> bool:
        """Tell whether an earlier check found nothing amiss."""
        return self.done[name].verdict in {"pass", "warn"}

    def copied(self, *to: Any) -> Reward:
        """Return a copy, moved."""
        return copy.deepcopy(self.reward).to(*to)


Look = Callable[[_Bench], tuple[Verdict, str, dict[str, float]]]


def _look(bench: _Bench, name: str, look: Look, needs: Sequence[str]) -> Finding:
    """Run a check where what it stands on holds."""
    for need in needs:
        before = bench.done[need]
        if before.verdict == "fail":
            return Finding(name, "skip", f"it stands on {need!r}: mend that first")
        if before.verdict == "skip":
            return Finding(name, "skip", before.line)
        if need == "differentiable" and not bench.reward.differentiable:
            return Finding(name, "skip", "it is declared to have no gradient")
    try:
        return Finding(name, *look(bench))
    except Exception as error:
        return Finding(name, "fail", f"it raised {_said(error)}")


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _graded(value: float, limits: tuple[float, float]) -> Verdict:
    """Pass up to the first limit, warn up to the second; what is no number fails."""
    return "pass" if value <= limits[0] else "warn" if value <= limits[1] else "fail"


# ---------------------------------------------------------------- pictures


def _pictures(size: int, images: Tensor | None, seed: int) -> Tensor:
    """Return the ordinary pictures: four smooth ones, four shapes on white, or those given."""
    if images is not None:
        if images.ndim != 4 or images.shape[1] != 3 or len(images) < 2:
            raise ValueError(
                f"images must be (n, 3, h, w), two at least, got {tuple(images.shape)}"
            )
        if not images.is_floating_point() or images.min() < 0 or images.max() > 1:
            raise ValueError("images must be floats in [0, 1]: divide bytes by 255, and clamp")
        size = min(images.shape[-2:])
    if not isinstance(size, int) or size < 8:
        raise ValueError(f"size must be a whole number of 8 pixels or more, got {size!r}")
    if images is not None:
        return images.detach().float()
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand((4, 3, 5, 5), generator=g)
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(0, 1)
    along = (torch.arange(size) + 0.5) / size
    y, x = along[:, None], along[None]
    shapes = []
    for i in range(4):
        a, b, r = (torch.rand(3, generator=g) - 0.5) * 0.25 + torch.tensor([0.5, 0.5, 0.26])
        distance = torch.hypot(y - a, x - b) if i % 2 else torch.maximum(abs(y - a), abs(x - b))
        inside = ((r - distance) * size + 0.5).clamp(0, 1)
        colour = 0.9 * torch.rand((3, 1, 1), generator=g)
        shapes.append(1 - inside * (1 - colour))
    return torch.cat([smooth, torch.stack(shapes)])


def _hard(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return pictures on which formulas break: name -> (3, h, w)."""
    x = torch.zeros_like(images[0])
    h, w = x.shape[-2:]
    chessboard = ((torch.arange(h)[:, None] + torch.arange(w)) % 2).to(x).expand_as(x)
    return {
        "black": x,
        "white": x + 1,
        "grey": x + 0.5,
        "red": x + torch.tensor([1.0, 0, 0])[:, None, None],
        "chessboard": chessboard,
        "noise": torch.rand(x.shape, generator=generator),
    }


def _device(reward: Reward, device: str | torch.device | None) -> torch.device:
    """Move the reward, or say where it is."""
    if device is None:
        some = next(iter([*reward.parameters(), *reward.buffers()]), None)
        return torch.device("cpu") if some is None else some.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}): give cpu "
            "or one that is there"
        ) from error
    reward.to(device)
    return torch.device(device)


# ---------------------------------------------------------------- scores


def _shape(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    images = bench.images
    scores = score(bench.reward, images.clone(), bench.rows(len(images)))
    if not scores.is_floating_point():
        return "fail", f"the scores are {scores.dtype}: return floats", {}
    if scores.device != images.device:
        line = f"the scores are on {scores.device}, the images on {images.device}: return them "
        return "fail", line + "with scores.to(images.device)", {}
    kind = str(scores.dtype).removeprefix("torch.")
    return "pass", f"one {kind} a picture, {tuple(images.shape)} -> {tuple(scores.shape)}", {}


def _names(bench: _Bench) -> list[str]:
    return [*(f"ordinary {i + 1}" for i in range(len(bench.images))), *bench.hard]


def _every(bench: _Bench) -> Tensor:
    return torch.cat([bench.images, torch.stack(list(bench.hard.values()))])


def _finite(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    scores = bench.scores(_every(bench))
    bad = [n for n, s in zip(_names(bench), scores, strict=True) if not s.isfinite()]
    figures = {"pictures": float(len(scores)), "not_finite": float(len(bad))}
    if bad:
        line = f"no finite score for {', '.join(bad)}: keep roots, logarithms and quotients off "
        return "fail", line + "zero, as (x + 1e-8).sqrt()", figures
    return (
        "pass",
        "every score is finite, on black, white, grey, chessboard and noise too",
        figures,
    )


def _range(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    scores = bench.scores(_every(bench))
    scores = scores[scores.isfinite()]
    if not len(scores):
        return "fail", "no score is finite", {}
    low, middle, high = float(scores.min()), float(scores.median()), float(scores.max())
    figures = {"min": low, "median": middle, "max": high}
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return "fail", "all pictures score the same: it prefers nothing", figures
    figures["spread"] = float(bench.base[bench.base.isfinite()].std(unbiased=False))
    if figures["spread"] <= 1e-6 * max(abs(low), abs(high)):
        return "fail", "ordinary pictures score the same: it is saturated there", figures
    return "pass", "what pictures in [0, 1] score; the spread is over the ordinary ones", figures


def _determinism(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    apart = bench.apart(bench.scores(bench.images), bench.scores(bench.images))
    figures = {"difference": apart}
    if apart == 0:
        return "pass", "twice the same call, bit for bit the same scores", figures
    if apart <= 1e-4:
        return "warn", "two calls differ by rounding: some operation is not deterministic", figures
    line = "two calls give other scores: fix the draws for a run (a generator with a seed of its "
    return "fail", line + "own), and switch dropout off (eval())", figures


def _generators(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    def states() -> list[Tensor]:
        here = bench.device.type == "cuda"
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if here else [])]

    torch.default_generator.manual_seed(12345)  # where no reward's own seed leaves it
    before, python = states(), getstate()
    bench.scores(bench.images)
    same = all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))
    if same and python == getstate():
        return "pass", "it leaves the global generators alone", {}
    line = "it draws from a global generator, or seeds it, and so changes every later draw of the "
    return "fail", line + "run: draw with generator=torch.Generator().manual_seed(...)", {}


def _in_place(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    images = _every(bench) * 1.5 - 0.25  # a clamp in place would show
    given = images.clone()
    with torch.no_grad():
        score(bench.reward, given, bench.rows(len(given)))
    changed = float((images != given).double().mean())
    if changed:
        line = (
            "it changes the images that it is given: leave out operations in place (clamp_, mul_)"
        )
        return "fail", line, {"changed": changed}
    return "pass", "the images are as they were", {"changed": changed}


def _batch(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    images, first = bench.images, bench.rows(1)
    n = len(images)
    asked = None if first is None else first * n  # one prompt: rows of prompts are another check
    whole = bench.scores(images, asked)
    alone = torch.cat([bench.scores(images[i : i + 1], first) for i in range(n)])
    order = torch.randperm(n, generator=bench.generator)
    permuted = bench.scores(images[order.to(images.device)], asked)
    figures = {
        "alone": bench.apart(alone, whole),
        "permuted": bench.apart(permuted, whole[order]),
    }
    verdict = _graded(max(figures.values()), ROUNDING)
    if verdict == "pass":
        return verdict, "a picture scores alike alone, in a batch, and in another place", figures
    line = "a picture's score depends on its batch by so many spreads: "
    if verdict == "warn":
        return verdict, line + "rounding, if the network is of a half type", figures
    return verdict, line + "leave out means over the batch and batch norm in training", figures


def _clamp(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
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
            line = "pixels outside [0, 1] have no gradient and are stranded there: use clamp01 of "
            return "fail", line + "steer.reward, which passes it through", figures
    return "pass", "values outside [0, 1] score as if clamped and keep their gradient", figures


def _copies(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    try:
        other = bench.copied()
    except Exception as error:
        line = f"copy.deepcopy raised {_said(error)}: open files, locks and connections when "
        return "fail", line + "called, or define __deepcopy__", {}
    apart = bench.apart(bench.scores(bench.images, reward=other), bench.base)
    if apart > 1e-4:
        line = "a deep copy scores otherwise: keep what it stands on in attributes, parameters "
        return "fail", line + "and buffers", {"difference": apart}
    return "pass", "a deep copy scores alike", {"difference": apart}


def _double(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    mend = "register tensors as buffers, or bring them along with .to(images)"
    try:
        scores = bench.scores(bench.images.double(), reward=bench.copied(torch.float64))
    except Exception as error:
        return "fail", f"after .double() it raised {_said(error)}: {mend}", {}
    figures = {"difference": bench.apart(scores, bench.base)}
    verdict = _graded(figures["difference"], (0.01, 0.05))
    if verdict == "pass":
        return verdict, "after .double() it scores alike", figures
    line = "after .double() it scores otherwise, by so many spreads: its float32 is not accurate"
    return verdict, f"{line}, or {mend}", figures


def _half(kind: torch.dtype, bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    """Compare with float32: pictures of a half type alone, and the reward moved as well."""
    figures: dict[str, float] = {}
    wrong, images = [], bench.images.to(kind)
    name = str(kind).removeprefix("torch.")
    for what, to in (("pictures", ()), ("reward", (kind,))):
        try:
            scores = bench.scores(images, reward=bench.copied(*to))
        except Exception as error:
            wrong.append(f"{what} in {name}: it raised {_said(error)}")
            continue
        figures[what] = bench.apart(scores, bench.base)
        if not figures[what] <= HALF:
            wrong.append(f"{what} in {name}: the scores are not those of float32")
    if wrong:
        return "warn", f"{'; '.join(wrong)}. Keep the reward and its pictures in float32", figures
    return "pass", f"pictures and reward in {name} score nearly alike, in spreads", figures


def _bfloat16(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    return _half(torch.bfloat16, bench)


def _float16(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    return _half(torch.float16, bench)


def _devices(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
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
        scores = score(other, x, bench.rows(len(x)))
        if scores.device.type != name:
            line = f"moved to {name} its scores are on {scores.device}: return them with "
            return "fail", line + "scores.to(images.device)", figures
        figures[name] = bench.apart(scores.detach().double().cpu(), bench.base)
    verdict = _graded(max(figures.values()), (0.02, 0.1))
    if verdict == "pass":
        return verdict, f"moved to {', '.join(others)} it scores alike", figures
    return verdict, "on another device it scores otherwise, by so many spreads", figures


def _parameters(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    open_ = [name for name, p in bench.reward.named_parameters() if p.requires_grad]
    figures = {"trainable": float(len(open_))}
    if open_:
        line = f"{', '.join(open_[:3])}{' and others' * (len(open_) > 3)} would be trained: a "
        return "fail", line + "reward stands still; call requires_grad_(False)", figures
    return "pass", "no parameter asks for a gradient", figures


def _prompts(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
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
            return "fail", "it asks for prompts, and its scores do not depend on them", figures
        if bench.prompts is not None:
            return "warn", "prompts make no difference: it scores pictures alone", figures
        return "skip", "it scores pictures alone, prompts make no difference", figures
    alone = torch.cat([bench.scores(images[i : i + 1], [rows[i]]) for i in range(n)])
    order = torch.randperm(n, generator=bench.generator)
    moved = bench.scores(images[order.to(images.device)], [rows[i] for i in order])
    figures["alone"] = bench.apart(alone, scores)
    figures["permuted"] = bench.apart(moved, scores[order])
    if max(figures["alone"], figures["permuted"]) > ROUNDING[1]:
        line = "prompts are not matched with their pictures, row by row: score image i with "
        return "fail", line + "prompts[i]", figures
    return "pass", "other prompts, other scores; each picture is asked its own", figures


# ---------------------------------------------------------------- gradient


def _differentiable(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    x = bench.images.detach().requires_grad_()
    with torch.enable_grad():
        scores = score(bench.reward, x.clone(), bench.rows(len(x)))
        reaches = scores.requires_grad and scores.grad_fn is not None
        if reaches:
            (found,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
            reaches = found is not None
    declared = bench.reward.differentiable
    if reaches == declared:
        if declared:
            return "pass", "declared differentiable, and the gradient reaches the images", {}
        return "pass", "declared to have no gradient, and there is none", {}
    if declared:
        line = "declared differentiable, and no gradient reaches the images: leave out detach(), "
        line += "no_grad, item() and numpy, or set differentiable = False"
        return "fail", line, {}
    line = "declared to have no gradient, and there is one: set differentiable = True, or detach"
    return "fail", line + " the scores", {}


def _finite_gradient(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    gradient = bench.gradient(_every(bench)).isfinite().flatten(1).all(1)
    bad = [n for n, fine in zip(_names(bench), gradient, strict=True) if not fine]
    figures = {"pictures": float(len(gradient)), "not_finite": float(len(bad))}
    if bad:
        line = f"no finite gradient at {', '.join(bad)}: a root has none at zero; write "
        return "fail", line + "(x + 1e-8).sqrt(), and mask before you divide", figures
    return (
        "pass",
        "every gradient is finite, on black, white, grey, chessboard and noise too",
        figures,
    )


def _gradient(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    norms = bench.gradient(bench.images).double().flatten(1).norm(dim=1)
    dead = int((norms == 0).sum())
    figures = {"min_norm": float(norms.min()), "max_norm": float(norms.max()), "zero": float(dead)}
    if not dead:
        return "pass", "the gradient is not zero at any ordinary picture", figures
    line = f"the gradient is zero at {dead} of {len(norms)} ordinary pictures: "
    if 2 * dead > len(norms):
        line += "rounding, thresholds and saturated units have none; make them smooth"
        return "fail", line, figures
    return "warn", line + "steering does nothing there", figures


def _rows(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    worst = 0.0
    for i in (0, len(bench.images) - 1):
        x = bench.images.detach().requires_grad_()
        with torch.enable_grad():
            scores = score(bench.reward, x.clone(), bench.rows(len(x)))
            (gradient,) = torch.autograd.grad(scores[i], x)
        norms = gradient.double().flatten(1).norm(dim=1)
        others = torch.cat([norms[:i], norms[i + 1 :]])
        worst = max(worst, float(others.max() / norms[i].clamp(min=1e-30)))
    if worst > 1e-6:
        line = "a picture's score has a gradient to other pictures of its batch: leave out what "
        line += "goes over the batch, and multiply by the upstream gradient in your own backward()"
        return "fail", line, {"leak": worst}
    return "pass", "a score's gradient reaches its own picture alone", {"leak": worst}


def _finite_difference(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    """`g . v` against `(r(x + h v) - r(x - h v)) / 2h`, v of random signs.

    The pictures are off black and white, with some grain: no kinks, no clamp. The step h is the
    best of a few, as rounding and curvature have it.
    """
    reward, kind = bench.reward, torch.float32
    if bench.ok("copy") and bench.ok("double"):
        reward, kind = bench.copied(torch.float64), torch.float64
    grain = torch.rand(bench.images.shape, generator=bench.generator).to(bench.images)
    x = (0.2 + 0.5 * (0.8 * bench.images + 0.2 * grain)).to(kind)
    gradient = bench.gradient(x, reward).double().cpu()
    signs = torch.randint(0, 2, (DIRECTIONS, *x.shape), generator=bench.generator) * 2.0 - 1
    along = torch.stack([(gradient * v).flatten(1).sum(1) for v in signs])  # (directions, n)

    def slopes(v: Tensor, h: float) -> Tensor:
        up, down = (bench.scores(x + d * h * v.to(x), reward=reward) for d in (1, -1))
        return (up - down) / (2 * h)

    steps = (1e-7, 1e-5, 1e-3, 1e-2) if kind == torch.float64 else (1e-3, 3e-3, 1e-2)
    first = [slopes(signs[0], h) for h in steps]
    misses = [float((slope - along[0]).norm().nan_to_num(math.inf)) for slope in first]
    best = misses.index(min(misses))
    seen = torch.stack([first[best], *(slopes(v, steps[best]) for v in signs[1:])])
    size = along.norm(dim=0)
    size = size + 1e-2 * size.median() + 1e-300
    error = float(((seen - along).norm(dim=0) / size).max())
    along, seen = along / size, seen / size
    ratios = (seen * along).sum(0) / along.square().sum(0).clamp(min=1e-300)
    cosines = F.cosine_similarity(seen, along, dim=0)
    alike = float(F.cosine_similarity(seen.flatten(), along.flatten(), dim=0))
    ratio = float((seen * along).sum() / along.square().sum().clamp(min=1e-300))
    figures = {"error": error, "slope_to_gradient": ratio, "cosine": alike, "step": steps[best]}
    name = str(kind).removeprefix("torch.")
    if error <= SLOPE[kind]:
        return "pass", f"the gradient is the slope along random directions, in {name}", figures
    parallel = 1 - (1e-4 if kind == torch.float64 else 5e-3)  # a factor, and nothing else amiss
    scaled = (cosines > parallel) & ((ratios - 1).abs() > 2 * SLOPE[kind])
    if alike >= 0.5 and not scaled.any():
        line = f"the gradient is near the slope along random directions, not equal, in {name}: "
        line += "is something detached, or passed straight through, on purpose?"
        return "warn", line, figures
    line = f"the gradient is not the slope along random directions, in {name}: look at backward() "
    return "fail", line + "of your own functions, and at what is detached", figures


def _high_frequencies(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    """Share of `|F|^2` of the gradient above 1/4 cycle a pixel, half the Nyquist frequency."""
    g = bench.gradient(bench.images).double()
    h, w = g.shape[-2:]
    f_y, f_x = (torch.fft.fftfreq(k, device=g.device) for k in (h, w))
    radius = torch.hypot(f_y[:, None], f_x[None])
    energy = torch.fft.fft2(g - g.mean((2, 3), keepdim=True)).abs().square().mean(1)
    total = energy.sum((1, 2))
    # a constant gradient has no frequencies but rounding
    flat = g.square().sum((1, 2, 3)) * h * w / 3 * 1e-10
    shares = (energy * (radius > 0.25)).sum((1, 2)) / (total + flat + 1e-300)
    white = float((radius > 0.25).sum()) / (h * w - 1)
    share = float(shares.mean())
    figures = {"share": share, "white_noise": white}
    if share > NOISE * white:
        line = f"the gradient has {share:.0%} of its energy above half the Nyquist frequency, as "
        return "warn", f"{line}noise has ({white:.0%}): {ADVICE}", figures
    line = (
        f"{share:.0%} of the gradient's energy is above half the Nyquist frequency; white noise "
    )
    return "pass", f"{line}has {white:.0%}", figures


def _blurred(images: Tensor) -> Tensor:
    """Blur by a Gaussian of one pixel's deviation."""
    k = torch.exp(-(torch.arange(-2, 3, device=images.device, dtype=images.dtype) ** 2) / 2)
    k = (k[:, None] * k / k.sum() ** 2).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), k, groups=images.shape[1])


def _unseen(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    """Ascend by four steps of 1/255 in the sign of the gradient, then blur."""
    x = z = bench.images
    for _ in range(STEPS):
        z = (z + STEP * bench.gradient(z).sign()).clamp(0, 1)
    gain = float((bench.scores(z) - bench.base).mean())
    kept = float((bench.scores(_blurred(z)) - bench.scores(_blurred(x))).mean())
    figures = {"gain": gain / bench.spread}
    seen = f"a change of {STEPS}/255 gains {gain / bench.spread:.2g} spreads"
    if not gain / bench.spread > GAIN:
        return "pass", f"{seen}: too little to matter", figures
    figures["survival"] = kept / gain
    seen += f", and {max(0.0, kept / gain):.0%} of it survives a slight blur"
    if kept / gain < SURVIVAL:
        return "warn", f"{seen}: {ADVICE}", figures
    return "pass", seen, figures


# ---------------------------------------------------------------- resolution and cost


def _ranks(scores: Tensor) -> Tensor:
    return scores.argsort(stable=True).argsort().double()


def _resolution(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
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
            line = f"at {size[0]} x {size[1]} pixels it raised {_said(error)}: resize to the "
            return "warn", line + "network's size first, or use this reward at one size", figures
        if name == "wide":  # another shape is another picture: it need only be scored
            break
        changes.append(float((scores - bench.base).abs().mean()) / bench.spread)
        correlation = torch.corrcoef(torch.stack([_ranks(scores), _ranks(bench.base)]))[0, 1]
        correlations.append(float(correlation))
        figures |= {f"change_{name}": changes[-1], f"rank_{name}": correlations[-1]}
    if all(change <= CHANGE for change in changes) and all(rank >= RANK for rank in correlations):
        return "pass", "pictures of half and twice the size score and rank much alike", figures
    line = (
        "the same pictures at half or twice the size score or rank otherwise, by so many spreads"
    )
    return "warn", f"{line}: use means, not sums, or resize first; or keep to one size", figures


def _timed(bench: _Bench, call: Callable[[], Any]) -> float:
    """Return the median time of a few calls, in milliseconds, after one to warm up."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        return 1000 * (time.perf_counter() - start)

    repeats = 5 if once() < 200 else 1
    return median(once() for _ in range(repeats))


def _speed(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    figures = {}
    n = len(bench.images)
    for rows in (1, n):
        x = bench.images[:rows]
        figures[f"ms_of_{rows}"] = _timed(bench, partial(bench.scores, x)) / rows
        if bench.ok("differentiable") and bench.reward.differentiable:
            figures[f"gradient_of_{rows}"] = _timed(bench, partial(bench.gradient, x)) / rows
    return "pass", "milliseconds a picture, without and with its gradient, by batch", figures


class _Kept:
    """A tensor that autograd keeps for the backward pass: it goes when its graph goes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _kept(bench: _Bench, own: Sequence[Tensor]) -> int:
    """Return the bytes kept for the backward pass of the ordinary pictures, without the reward."""
    x = bench.images.clone().requires_grad_()
    alive: WeakSet[_Kept] = WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.enable_grad():
        given = x.clone()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            scores = score(bench.reward, given, bench.rows(len(x)))
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor for k in alive}
    for known in [*own, given]:
        storages.pop(known.untyped_storage().data_ptr(), None)
    del scores
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def _memory(bench: _Bench) -> tuple[Verdict, str, dict[str, float]]:
    own = [*bench.reward.parameters(), *bench.reward.buffers()]
    figures = {"reward_mb": sum(t.numel() * t.element_size() for t in own) / 1e6}
    n = len(bench.images)
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
    if bench.ok("differentiable") and bench.reward.differentiable:
        figures["backward_mb"] = _kept(bench, own) / n / 1e6
        line = "the reward's own tensors, and what one picture's backward pass keeps, in MB"
    else:
        line = "the reward's own tensors, in MB"
    if cuda:
        if bench.ok("differentiable") and bench.reward.differentiable:
            bench.gradient(bench.images)
        else:
            bench.scores(bench.images)
        peak = torch.cuda.max_memory_allocated(bench.device) - before
        figures["peak_mb"] = peak / n / 1e6
        line += "; a picture's peak on the GPU"
    return "pass", line, figures


CHECKS: Mapping[str, tuple[Look, tuple[str, ...]]] = {
    "shape": (_shape, ()),
    "finite": (_finite, ("shape",)),
    "range": (_range, ("shape",)),
    "determinism": (_determinism, ("shape",)),
    "generators": (_generators, ("shape",)),
    "in place": (_in_place, ("shape",)),
    "batch": (_batch, ("determinism",)),
    "prompts": (_prompts, ("determinism",)),
    "parameters": (_parameters, ()),
    "differentiable": (_differentiable, ("shape",)),
    "finite gradient": (_finite_gradient, ("differentiable",)),
    "gradient": (_gradient, ("differentiable",)),
    "rows": (_rows, ("gradient",)),
    "clamp": (_clamp, ("determinism",)),
    "copy": (_copies, ("determinism",)),
    "double": (_double, ("copy",)),
    "bfloat16": (_bfloat16, ("copy",)),
    "float16": (_float16, ("copy",)),
    "devices": (_devices, ("copy",)),
    "finite difference": (_finite_difference, ("determinism", "rows")),
    "high frequencies": (_high_frequencies, ("gradient",)),
    "unseen change": (_unseen, ("determinism", "gradient")),
    "resolution": (_resolution, ("determinism",)),
    "speed": (_speed, ("shape",)),
    "memory": (_memory, ("shape",)),
}
"""Name -> what looks, and the checks that it stands on."""
