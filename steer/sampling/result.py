"""`Result`: the result of `steer.sample`, and the folder in which it is saved."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steer.files import expanded, numbers, peak_memory, slug, whole_folder
from steer.guidance.population import Population, seen_mean
from steer.pictures import Row, captioned_grid, side_of, to_pil
from steer.sampling.lineage import collapses, doubts

__all__ = ["TRACED", "Part", "Result", "joined_trace", "save_result"]


TRACED = ("ess", "log_z", "reward", "weighed")
"""The traced values of each step; weighed: the ESS before resampling."""


@dataclass
class Part:
    """The part of a result for a group of prompts: the last population, and traces."""

    history: list[tuple[Tensor, ...]] = field(default_factory=list)

    def note(self, population: Population) -> None:
        """Record the traced values of a step."""
        weighed = population.ess if population.weighed is None else population.weighed
        reward = population.reward.mean(-1)
        self.history.append((population.ess, population.log_z, reward, weighed))

    def tensors(self, last: Population, temperature: Tensor) -> dict[str, Tensor]:
        """Return all tensors by their names in the result."""
        part = {name: getattr(last, name) for name in ("x", "log_w", "ess", "log_z")}
        part |= {"rewards": last.reward, "temperature": temperature}
        if last.ancestors is not None:
            part["ancestors"] = last.ancestors
        images = last.images
        if images is not None and images.ndim == 5 and images.shape[2] == 3:
            part["images"] = images
        steps = zip(*self.history, strict=True)
        traces = zip(TRACED, map(torch.stack, map(list, steps)), strict=True)
        return part | {f"trace_{name}": values for name, values in traces}


@dataclass(repr=False)
class Result:
    """The result of `sample`; with a leading prompt axis (p,) if a list of prompts was given.

    Attributes:
        x: the particles, (n, *event) or (p, n, *event).
        images: decoded, nominally in [0, 1], (..., 3, h, w); None without pixels.
        rewards: in the reward's units, (n,) or (p, n).
        log_w: log-weights since the last resampling; 0 for `none` and `best-of-n`.
        log_z: the estimate of log E[exp(reward / temperature)], () or (p,); None if the method has
            none.
        ess: the effective sample size, () or (p,).
        nfe: network forward-equivalents per returned particle, theory (51): a forward 1, a
            gradient with respect to the input 1 more.
        temperature: what the reward was divided by, () or (p,); None if the method has none.
        best: the index of the highest reward, () or (p,).
        prompts: as given.
        method: its name.
        seed: the run's seed.
        reward_prompts: prompts of the reward, if they differ from the model's prompts.
        costs: further costs: reward calls, reward gradients and network gradients per particle,
            seconds, and the NFE per prompt for setting the temperature; if the reward estimated
            its scale first, the NFE for that.
        trace: ESS, log Z and mean reward after each step, and as "weighed" the ESS before
            resampling, (steps, ...) each.
        ancestors: index of the start that each particle descends from, among those of its prompt,
            (n,) or (p, n); None if the method does not record it.
    """

    x: Tensor
    images: Tensor | None
    rewards: Tensor
    log_w: Tensor
    log_z: Tensor | None
    ess: Tensor
    nfe: float
    temperature: Tensor | None
    best: Tensor
    prompts: Sequence[str] | str | None
    method: str
    seed: int
    reward_prompts: Sequence[str] | str | None = None
    costs: dict[str, float] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)
    ancestors: Tensor | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons not to trust the weighted population, a sentence each; see `lineage.doubts`.

        There is a warning if the weight is on effectively less than two particles (at the end or,
        with 16 or more particles, during the run), if it descends from effectively less than two
        starts, and if rewards that are not finite were dropped. There are no warnings about
        weights and starts for methods without them, for fewer than four particles, and after a
        selection by `keep`. A population without warnings may still have missed a mode: a mode
        that no start led to cannot be detected.
        """
        chosen = bool(self.trace["log_z"].isnan().any()) if self.trace else False
        if self.temperature is None or self.ancestors is None or chosen:
            return tuple(self._dropped)
        lead = self.log_w.ndim == 2
        log_w, ancestors = (v if lead else v[None] for v in (self.log_w, self.ancestors))
        names = list(self.prompts) if lead and self.prompts else None
        found = doubts(log_w, ancestors, names)
        if "weighed" in self.trace:
            sizes = [self.trace[name] for name in ("weighed", "ess")]
            weighed, left = (v if lead else v[:, None] for v in sizes)
            found += collapses(weighed, left, log_w.shape[1], names)
        return (*self._dropped, *found)

    @property
    def _dropped(self) -> list[str]:
        """Return how many rewards were not finite, if any were dropped."""
        bad = int(self.costs.get("bad_rewards", 0))
        if not bad:
            return []
        asked = round(self.costs["reward_calls"] * self.rewards.numel())
        what = "their particles have weight zero, and the tilt is sampled where it is finite"
        if self.temperature is None:
            what = "they count as -inf and have no gradient, so they are never the best"
        return [f"{bad} of {asked} rewards were not finite: {what}"]

    def __repr__(self) -> str:
        """Describe the result in a few lines."""
        lead = self.rewards.ndim == 2
        p, n = self.rewards.shape if lead else (1, len(self.rewards))
        prompts = f"{p} prompt{'s' * (p > 1)} x " if lead else ""
        pictures = "" if self.images is None else f", images {tuple(self.images.shape)}"
        best = float(self.rewards.amax(-1).mean())
        parts = [
            f"Result of {self.method}, seed {self.seed}: {prompts}{n} particles",
            f"  x {tuple(self.x.shape)}{pictures}",
            f"  reward mean {float(seen_mean(self.rewards)):.4g}, best {best:.4g}"
            f"{' a prompt, on average' * (p > 1)}; nfe {self.nfe:g}",
        ]
        if self.log_z is not None:
            parts.append(f"  log_z {_span(self.log_z)}, ess {_span(self.ess)} of {n}")
        parts += [f"  warning: {said}" for said in self.warnings]
        return "\n".join(parts)

    @property
    def pil(self) -> list[Any]:
        """The pictures as PIL images: a list, or one list per prompt if prompts were a list.

        Raises:
            ValueError: the samples have no pixels.
        """
        images = _pixels(self)
        if self.rewards.ndim == 1:
            return [to_pil(image) for image in images]
        return [[to_pil(image) for image in row] for row in images]

    def _repr_png_(self) -> bytes | None:
        """Show the pictures with their rewards in a notebook."""
        if self.images is None:
            return None
        data = io.BytesIO()
        grid_of(self).save(data, "PNG")
        return data.getvalue()

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write pictures, `grid.png`, `scores.jsonl` and `metrics.json` to a folder.

        The folder is written atomically.

        Raises:
            ValueError: the samples have no pixels.
            FileExistsError: the folder exists, and `overwrite` is not set or it is not a run
                folder.
        """
        return save_result(self, expanded(folder), overwrite)


def _pixels(result: Result) -> Tensor:
    if result.images is None:
        raise ValueError(
            "these samples have no pixels, so there are no pictures to save: keep result.x, for "
            "instance with safetensors.torch.save_file"
        )
    return result.images


def _asked(result: Result) -> tuple[list[str], list[str]]:
    """Return the prompts, and the reward's prompt for each; "" if there are none."""
    lead = result.rewards.ndim == 2
    prompts = list(result.prompts) if lead and result.prompts else [result.prompts or ""]
    asked = result.reward_prompts or prompts
    texts = [asked] * len(prompts) if isinstance(asked, str) else list(asked)
    return list(map(str, prompts)), list(map(str, texts))


def _by_prompt(result: Result, values: Tensor) -> Tensor:
    return values if result.rewards.ndim == 2 else values[None]


def grid_of(result: Result, beside: Mapping[str, Result] | None = None) -> Image.Image:
    """Draw at most eight pictures of each prompt with their rewards.

    Args:
        result: what `steer.sample` returned.
        beside: title -> other results with the same seeds, in rows above.
    """
    prompts, asked = _asked(result)
    rows: list[Row] = []
    for i, prompt in enumerate(prompts):
        question = "" if asked[i] == prompt else f", the reward asks for {asked[i]!r}"
        titled = {**(beside or {}), f"{result.method}{question}": result}
        for title, one in titled.items():
            images, rewards = (_by_prompt(one, v)[i, :8] for v in (_pixels(one), one.rewards))
            captions = [f"{r:.3g}" for r in rewards.tolist()]
            rows.append((f"{prompt!r} {title}", images, captions))
    return captioned_grid(rows, side_of(_pixels(result)))


def _span(values: Tensor) -> str:
    """Format a number, or the smallest and the largest of several."""
    ends = [f"{float(v):.4g}" for v in (values.min(), values.max())]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def joined_trace(parts: list[Tensor]) -> Tensor:
    """Join traces (steps, p) of batches of prompts; those that stopped early keep their last."""
    steps = max(map(len, parts))
    return torch.cat([torch.cat([t, t[-1:].expand(steps - len(t), -1)]) for t in parts], 1)


def metrics(result: Result) -> dict[str, Any]:
    """Return the content of `metrics.json`."""
    return numbers(
        {
            "method": result.method,
            "seed": result.seed,
            "log_z": result.log_z,
            "ess": result.ess,
            "temperature": result.temperature,
            "reward_mean": seen_mean(result.rewards, -1),
            "reward_best": result.rewards.amax(-1),
            "nfe_per_particle": result.nfe,
            "warnings": list(result.warnings),
            **result.costs,
            "trace": result.trace,
            "peak_memory": peak_memory(),
        }
    )


def save_result(
    result: Result,
    folder: Path,
    overwrite: bool = False,
    *,
    beside: Mapping[str, Result] | None = None,
    keep: str = "all",
    terms: dict[str, Tensor] | None = None,
    gradients: dict[str, Tensor] | None = None,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a result as a run folder.

    Args:
        result: what `steer.sample` returned.
        folder: the target folder.
        overwrite: whether an existing folder is replaced.
        beside: title -> results of the same seeds by another method, for instance without
            guidance: rows above it in the grid, and their rewards in `scores.jsonl`.
        keep: "all" particles or the "best" of each prompt go to `images/`.
        terms: the reward's terms by name, shaped as its rewards, for `scores.jsonl`.
        gradients: in the same form, the norm of each term's contribution to the reward's gradient.
        files: further files by name.

    Raises:
        ValueError: the samples have no pixels.
        FileExistsError: the folder exists, and `overwrite` is not set or it is not a run folder.
    """
    prompts, asked = _asked(result)

    def rows(v: Tensor) -> Tensor:
        return _by_prompt(result, v)

    images, rewards, log_w, best = map(
        rows, (_pixels(result), result.rewards, result.log_w, result.best)
    )
    others = dict(beside or {})
    with whole_folder(folder, overwrite) as scratch:
        (scratch / "images").mkdir()
        lines = []
        for i, text in enumerate(prompts):
            for j in range(images.shape[1]):
                name = f"images/{i:04d}_{slug(text)}_{j:02d}.png"
                kept = keep == "all" or j == int(best[i])
                if kept:
                    to_pil(images[i, j]).save(scratch / name)
                line = {
                    "prompt": text,
                    "reward_prompt": asked[i],
                    "seed": result.seed,
                    "particle": j,
                    "image": name if kept else None,
                    "reward": float(rewards[i, j]),
                    "terms": {k: float(rows(v)[i, j]) for k, v in (terms or {}).items()},
                    "gradients": {k: float(rows(v)[i, j]) for k, v in (gradients or {}).items()},
                    "log_w": float(log_w[i, j]),
                    "best": j == int(best[i]),
                    "beside": {k: float(rows(r.rewards)[i, j]) for k, r in others.items()},
                }
                lines.append(json.dumps(numbers(line), ensure_ascii=False))
        grid_of(result, others).save(scratch / "grid.png")
        (scratch / "scores.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (scratch / "metrics.json").write_text(json.dumps(metrics(result), indent=2) + "\n")
        for name, content in (files or {}).items():
            data = content.encode() if isinstance(content, str) else content
            (scratch / name).write_bytes(data)
    return folder
