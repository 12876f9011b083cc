"""`steer compare`: methods x prompts x seeds at equal network calls, and a held-out judge."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from jsonargparse import get_loader
from rich.console import Console
from torch import Tensor

import rewards
import steer
from recipes.data import emoji
from recipes.data.recolour import plain_label
from recipes.figures import Estimate, estimate, markdown, pairwise_distance, scatter
from recipes.measure import found
from recipes.partial import Partial
from recipes.sample import (
    Dtype,
    _adapter_files,
    _config,
    _device,
    _fingerprints,
    _model,
    _prompts,
)
from rewards.judge import EMBEDDED, Judge
from steer.files import numbers, refuse_existing, whole_folder
from steer.names import unknown
from steer.pictures import captioned_grid
from steer.sampling.calibrate import learn
from steer.sampling.methods import TABLE, method_options, plan
from steer.sampling.run import PROBES, check

__all__ = ["ENTRIES", "Entry", "compare", "entry", "equal_calls", "kind"]

ENTRIES = ("none:steps=4", "best-of-n:steps=4", "fmrg-j:steps=16", "reno:steps=24")
"""What is compared where nothing else is asked for."""

PROMPTS = Path(emoji.__file__).with_name("prompts.yaml")
KINDS = ("specific", "broad")
COUNTED = ("steps", "particles")
TEMPERED = ("temperature", "strength")
BATCH = 64  # rows of a unit
SHOWN = 12  # columns of the sheet


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        method: its name.
        steps: of the method.
        particles: for each prompt; None: as many as the other rows' network calls buy.
        options: the method's own, and temperature or strength.
    """

    method: str
    steps: int
    particles: int | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> bool:
        """Whether every particle is a final picture, and not the best one alone."""
        return self.method == "none"

    @property
    def label(self) -> str:
        """What the tables call it."""
        rest = "".join(f", {name} {value}" for name, value in self.options.items())
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        if self.mean:
            return f"none, {steps}{rest}"
        if self.method == "best-of-n":
            return f"best of {self.particles or 'n'}, {steps}{rest}"
        particles = f"{self.particles} particle{'s' * (self.particles != 1)}"
        return f"{self.method}, {steps}, {particles}{rest}"

    def calls(self, differentiable: bool) -> int:
        """Return the network calls of one prompt, those that set its temperature included."""
        options = {k: v for k, v in self.options.items() if k not in TEMPERED}
        cost = plan(self.method, self.steps, differentiable, **options)["nfe"]
        probed = TABLE[self.method].tempered and "temperature" not in self.options
        return (self.particles or 0) * cost + PROBES * probed


def entry(text: str) -> Entry:
    """Read "method:key=value,key=value"; the values are YAML.

    >>> entry("fmtt:steps=8,strength=3").label
    'fmtt, 8 steps, 4 particles, strength 3'

    Raises:
        ValueError: an unknown method or option, with the nearest names; a value of a wrong kind.
    """
    name, _, written = text.partition(":")
    defaults = method_options(name)
    known = [*COUNTED, *defaults, *(TEMPERED if TABLE[name].tempered else ())]
    pairs = re.sub(r"(?:(?<=,)|^)\s*([\w-]+)\s*=", r" \1: ", written)
    try:
        values = get_loader("yaml")(f"{{{pairs}}}")
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):  # the loader gives back as text what it cannot read
        raise ValueError(f"cannot read {text!r}: write method:key=value,key=value")
    for key, value in values.items():
        if key not in known:
            raise unknown(f"option of method {name!r},", str(key), known)
        if value is None or (isinstance(value, str) and not isinstance(defaults.get(key), str)):
            raise ValueError(f"option {key!r} of {text!r} is no number: write {key}=...")
        if key in COUNTED and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"option {key!r} of {text!r} must be a whole number")
    steps = values.pop("steps", 4 if TABLE[name].build is None else 16)
    particles = values.pop("particles", None if name == "best-of-n" else 4)
    return Entry(name, steps, particles, values)


def equal_calls(entries: Sequence[Entry], differentiable: bool) -> list[Entry]:
    """Put a best-of-n without `particles` beside each method, with as many network calls.

    Methods that cost the same share a row.

    Raises:
        ValueError: there is no method whose calls it could have, or a row is there twice.
    """
    open_ones = [e for e in entries if e.particles is None]
    rows: list[Entry] = []
    for one in entries:
        if one.particles is None:
            continue
        rows.append(one)
        if TABLE[one.method].build is not None:
            total = one.calls(differentiable)
            beside = [replace(e, particles=max(1, total // e.steps)) for e in open_ones]
            rows += [e for e in beside if e not in rows and e not in entries]
    if open_ones and all(TABLE[e.method].build is None for e in rows):
        raise ValueError(
            "best-of-n without particles gets as many candidates as another method's network "
            "calls buy: give it particles, or compare a method that steers"
        )
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label!r} is there twice: leave one out")
    return rows


def kind(prompt: str) -> str:
    """Return whether a prompt names a concept ("specific") or leaves it open ("broad").

    >>> [kind(p) for p in ("fox", "blue flat fox", "bird", "red fruit", "")]
    ['specific', 'specific', 'broad', 'broad', 'broad']
    """
    data = emoji.load()
    styles = {word for style in emoji.STYLES.values() for word in style.split()}
    bare = " ".join(w for w in prompt.split() if w not in styles)
    named = {bare, plain_label(bare)} & {*data.concepts, *map(plain_label, data.concepts)}
    open_words = {*data.groups, *data.subgroups}
    return "broad" if not named or named & open_words else "specific"


def compare(
    model: str = "emoji",
    lora: Path | None = None,
    lora_scale: float | None = None,
    reward: str = "clip",
    prompts: str | list[str] | None = None,
    prompts_file: Path | None = None,
    methods: str | list[str] | None = None,
    seeds: int = 3,
    device: str | None = None,
    dtype: Dtype | None = None,
    out: Path = Path("outputs/compare"),
    overwrite: bool = False,
) -> Path:
    """Compare sampling methods at equal network calls, by the reward and by a held-out judge.

    The folder holds table.md, figures.json (each prompt and seed), plots, sheet.png,
    pictures.safetensors and config.yaml. It appears whole or not at all; an interrupted comparison
    goes on where it stopped when the same command is given again.

    Args:
        model: a name that `steer models` lists, a folder, or file.py:Name.
        lora: a folder of adapters that were made for this model.
        lora_scale: what their update is multiplied by (default 1): 0 is the model without them.
        reward: a name that `steer rewards` lists, a weighted sum of such, or file.py:Name.
        prompts: what to draw. Default: 25 prompts that name a concept, 25 that leave it open.
        prompts_file: a text file with a prompt a line, instead.
        methods: a list of `method:key=value,...`, with steps (none, best-of-n: default 4; the
            others: 16), particles (default 4), temperature or strength, and the method's own
            options. best-of-n without particles gets a row beside each method that steers, with
            as many candidates as the same network calls buy. Default: none, best-of-n,
            fmrg-j, reno.
        seeds: how many pictures a prompt, from seed 0 on.
        device: where to compute. Default: where the model is loaded, the CPU.
        dtype: the network's. Default: float32 on a CPU.
        out: the folder.
        overwrite: replace the folder if it exists, and drop an interrupted comparison.

    Returns:
        The folder.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    console = Console(stderr=True)
    refuse_existing(out, overwrite)
    chosen = _prompts(prompts, prompts_file)
    if chosen is None:
        chosen = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    given = ENTRIES if methods is None else methods
    entries = [entry(text) for text in ([given] if isinstance(given, str) else given)]
    if not entries:
        raise ValueError("the list of methods is empty: give at least one, or leave it out")
    flow = _model(model, device, dtype, lora, lora_scale)
    scorer = rewards.load(reward).to(_device(flow))
    for one in entries:
        check(flow, scorer, chosen, one.particles or 1, one.steps, one.method, **one.options)
    rows = equal_calls(entries, scorer.differentiable)
    judge = Judge().to(_device(flow))
    learn(flow, scorer, chosen)

    identity = {
        "prompts": chosen,
        "files": _fingerprints(model, reward, str(EMBEDDED), *_adapter_files(lora)),
        "settings": {k: v for k, v in settings.items() if k != "overwrite"},
    }
    partial = Partial(out, identity, overwrite)
    units = [
        _Unit(i, row, start, seed)
        for seed in range(seeds)
        for i, row in enumerate(rows)
        for start in range(0, len(chosen), _size(row))
    ]
    work = {unit.name: _work(unit, chosen, flow, scorer.differentiable) for unit in units}
    done = [unit for unit in units if partial.has(unit.name)]
    console.print(
        f"{len(rows)} methods x {len(chosen)} prompts x {seeds} seeds: "
        f"{sum(work.values())} network calls"
        + (f", {sum(work[unit.name] for unit in done)} of them done already" if done else "")
    )
    try:
        partial.fill(units, work, lambda u: _run(u, flow, scorer, judge, chosen), console)
        gathered = [_gather(partial, units, i, seeds) for i in range(len(rows))]
        with whole_folder(out, overwrite) as scratch:
            _write(scratch, rows, chosen, gathered, _config(settings))
    finally:
        partial.drop_if_empty()
    partial.drop()
    print((out / "table.md").read_text(encoding="utf-8"))
    return out


@dataclass(frozen=True)
class _Unit:
    """What is finished or not: a row, some prompts from `start` on, a seed."""

    index: int
    row: Entry
    start: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.index:03d}_{self.seed:04d}_{self.start:06d}"

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts[self.start : self.start + _size(self.row)])


def _size(row: Entry) -> int:
    """Return how many prompts a unit has: as many as fill a batch."""
    assert row.particles is not None
    return max(1, BATCH // row.particles)


def _work(unit: _Unit, prompts: Sequence[str], flow: steer.FlowMap, differentiable: bool) -> int:
    return flow.evaluations * len(unit.prompts(prompts)) * unit.row.calls(differentiable)


def _run(
    unit: _Unit, flow: steer.FlowMap, reward: steer.Reward, judge: Judge, prompts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sample and judge a unit -> images (p, k, 3, h, w), reward, judge and top1 (p, k), features.

    k is 1, the particle with the highest reward, or all of them where each is a final picture.
    """
    row, chosen = unit.row, unit.prompts(prompts)
    assert row.particles is not None
    result = steer.sample(
        flow, reward, chosen, row.particles, row.steps, row.method, seed=unit.seed,
        position=unit.start, **row.options,
    )  # fmt: skip
    if result.images is None:
        raise ValueError("this model decodes to no pictures (n, 3, h, w): nothing to compare by")
    images, scores = result.images, result.rewards
    if not row.mean:
        best = torch.arange(len(chosen), device=result.best.device), result.best
        images, scores = images[best][:, None], scores[best][:, None]
    n, k = images.shape[:2]
    flat = images.flatten(0, 1)
    asked = [prompt for prompt in chosen for _ in range(k)]
    tensors = {
        "images": images,
        "reward": scores,
        "judge": judge(flat, asked).reshape(n, k),
        "features": judge.features(flat).reshape(n, k, -1),
        "top1": torch.stack([_top1(judge, images[i], chosen[i], unit.seed) for i in range(n)]),
    }
    each = 1 if row.mean else row.particles
    nfe = each * result.nfe + result.costs["temperature_nfe_per_prompt"]
    seconds = result.costs["seconds"] / (n * k)
    return {name: t.float() for name, t in tensors.items()}, {"nfe": nfe, "seconds": seconds}


def _top1(judge: Judge, images: Tensor, prompt: str, seed: int) -> Tensor:
    """Return which pictures of a label score highest by it, of 100 labels; NaN if it is none."""
    labels = emoji.load().concepts
    if kind(prompt) == "broad" or prompt not in labels:
        return torch.full((len(images),), torch.nan, device=images.device)
    return found(judge, images, [prompt] * len(images), labels, seed=seed).float()


@dataclass(frozen=True)
class _Row:
    """What a row measured: tensors (prompts, seeds, k, ...), and what a picture cost."""

    tensors: dict[str, Tensor]
    nfe: float
    seconds: float

    def per_prompt(self, name: str) -> Tensor:
        return self.tensors[name].mean((1, 2))

    @property
    def diversity(self) -> Tensor:
        return torch.tensor([pairwise_distance(f.flatten(0, 1)) for f in self.tensors["features"]])


def _gather(partial: Partial, units: Sequence[_Unit], index: int, seeds: int) -> _Row:
    """Put a row's units together again."""
    read = [[partial.read(u.name) for u in units if (u.index, u.seed) == (index, s)]
            for s in range(seeds)]  # fmt: skip
    tensors = {
        name: torch.stack([torch.cat([t[name] for t, _ in parts]) for parts in read], 1)
        for name in read[0][0][0]
    }
    notes = [note for parts in read for _, note in parts]
    mean = {k: sum(note[k] for note in notes) / len(notes) for k in notes[0]}
    return _Row(tensors, **mean)


def _summary(rows: Mapping[str, _Row], base: str | None, where: Tensor) -> dict[str, Any]:
    """Return each row's estimates over some of the prompts."""
    made = {}
    for label, row in rows.items():
        values = {
            "reward": row.per_prompt("reward"),
            "judge": row.per_prompt("judge"),
            "top1": row.per_prompt("top1"),
            "diversity": row.diversity,
        }
        for name in ("reward", "judge"):
            below = torch.nan if base in (None, label) else rows[base].per_prompt(name)
            values[f"{name} - none"] = values[name] - below
        made[label] = {name: estimate(v[where]) for name, v in values.items()}
        made[label]["nfe"] = Estimate(row.nfe, None)
    return made


def _write(
    folder: Path, rows: Sequence[Entry], prompts: list[str], gathered: list[_Row], config: str
) -> None:
    """Write tables, figures, plots and pictures."""
    kinds = [kind(p) for p in prompts]
    named = {entry.label: row for entry, row in zip(rows, gathered, strict=True)}
    base = next((e.label for e in rows if e.mean), None)
    parts = {k: torch.tensor([k == "all" or k == one for one in kinds]) for k in (*KINDS, "all")}
    if len(set(kinds)) == 1:
        del parts["all"]
    summaries = {k: _summary(named, base, where) for k, where in parts.items() if where.any()}
    (folder / "table.md").write_text(_table(summaries, kinds, gathered), encoding="utf-8")
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    figures = {
        "prompts": [{"prompt": p, "kind": k} for p, k in zip(prompts, kinds, strict=True)],
        "methods": {
            label: {
                "nfe": row.nfe,
                "seconds": row.seconds,
                "summary": {k: {n: e._asdict() for n, e in s[label].items()}
                            for k, s in summaries.items()},
                **{n: row.tensors[n].mean(2) for n in ("reward", "judge", "top1")},
                "diversity": row.diversity,
            }
            for label, row in named.items()
        },
    }  # fmt: skip
    (folder / "figures.json").write_text(json.dumps(numbers(figures), indent=1), encoding="utf-8")
    axes = {"nfe": "network calls a picture", "reward": "reward", "judge": "judge",
            "diversity": "diversity (judge's features)"}  # fmt: skip
    brute: dict[int, list[str]] = {}  # best-of-n by its steps: a curve
    for e in rows:
        if e.method == "best-of-n":
            brute.setdefault(e.steps, []).append(e.label)
    for x, y, name in (
        ("nfe", "reward", "reward_nfe"),
        ("diversity", "reward", "reward_diversity"),
        ("reward", "judge", "judge_reward"),
    ):
        panels = {
            k: {label: (e[x], e[y]) for label, e in summary.items()}
            for k, summary in summaries.items()
            if k != "all"
        }
        scatter(panels, (axes[x], axes[y]), folder / f"{name}.png", x == "nfe", brute.values())
    pictures = {
        label: row.tensors["images"].clamp(0, 1).mul(255).round().byte()
        for label, row in named.items()
    }
    (folder / "pictures.safetensors").write_bytes(safetensors.torch.save(pictures))
    step = max(1, math.ceil(len(prompts) / SHOWN))
    grid = []
    for label, row in named.items():
        shown = row.tensors["images"][::step, 0, 0]
        scores = row.tensors["reward"][::step, 0, 0].tolist()
        captions = [f"{s:.3f} {p}" for s, p in zip(scores, prompts[::step], strict=True)]
        grid.append((label, shown, captions))
    buffer = io.BytesIO()
    captioned_grid(grid).save(buffer, "PNG")
    (folder / "sheet.png").write_bytes(buffer.getvalue())


def _table(
    summaries: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], rows: Sequence[_Row]
) -> str:
    """Return the tables, one for each kind of prompts."""
    titles = {"reward": "reward", "judge": "judge", "top1": "judge: 1 of 100",
              "reward - none": "reward - none", "judge - none": "judge - none",
              "diversity": "diversity"}  # fmt: skip
    blocks = []
    for k, summary in summaries.items():
        count = len(kinds) if k == "all" else kinds.count(k)
        known = [n for n in titles if any(e[n].mean is not None for e in summary.values())]
        shown = [n for n in known if n != "top1" or k == "specific"]
        cells = [
            [label, f"{e['nfe'].mean:g}", *(e[n] for n in shown)] for label, e in summary.items()
        ]
        header = ["method", "NFE a picture", *(titles[n] for n in shown)]
        title = f"## {k} prompts ({count} x {rows[0].tensors['reward'].shape[1]} seeds)"
        blocks.append(f"{title}\n\n{markdown(header, cells)}\n")
    blocks.append(
        "Mean ± standard error over prompts, each prompt's seeds averaged first. NFE: network "
        "calls of all particles,\nand those that set a temperature, for one final picture: the "
        "particle with the highest reward, and with\nnone each particle. Differences are paired. "
        "Diversity: mean distance of the judge's features between\nthe pictures of one prompt.\n"
    )
    return "\n".join(blocks)
