"""`steer eval --lora`: tuned against base, and against guidance at equal network calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from torch import Tensor

import rewards
import steer
from recipes.compare import Entry, entry
from recipes.finetune import DATA, _judge
from recipes.partial import Partial
from recipes.prompts import Asked, read_prompts
from recipes.sample import _adapter_files, _config, _device, _fingerprints, _model
from recipes.tuned_report import Measured, Report, Row
from steer.adapters.lora import Adapted
from steer.adapters.store import WEIGHTS, load_adapters, read_metadata
from steer.files import refuse_existing, whole_folder
from steer.flow import flat_prompts
from steer.noise import Noise
from steer.reward import Reward, score
from steer.sampling.methods import TABLE, plan
from steer.sampling.run import check
from steer.tuning.alarms import HELD_OUT
from steer.tuning.statistics import Drift, features_of, velocity_distance

__all__ = ["GUIDANCE", "evaluate_tuned", "rows_of"]

GUIDANCE = ("fmrg-j:steps=16", "best-of-n:steps=1")
"""What tuning is compared with where nothing else is asked for."""

BLIND = ("best-of-n:steps=1,particles=16", "best-of-n:steps=1")
"""Likewise, for a reward without gradient."""

BATCH = 64  # rows of a unit
DRIFT = 8  # prompts that the drift is read on


def rows_of(
    adapters: Sequence[str],
    scales: Sequence[float],
    steps: Sequence[int],
    entries: Sequence[Entry],
    differentiable: bool = True,
    guided_tuned: bool = False,
) -> list[Row]:
    """Return what is to be drawn, and the base by as many steps as each of it.

    A best-of-n without `particles` has as many candidates as each number of steps has network
    calls. A method that steers without weights stands beside each number of steps as well, with
    as many steps of its own as those calls buy, if they buy any.

    >>> entries = [entry("reno:steps=3"), entry("best-of-n:steps=1")]
    >>> [row.label for row in rows_of(["a"], [0.5, 1], [1, 2], entries)]  # doctest: +ELLIPSIS
    ['base, 1 step', 'a at 0.5, 1 step', 'a, 1 step', 'base, 2 steps', ..., 'base, 3 steps']

    Args:
        adapters: their names.
        scales: of the adapters.
        steps: composed jumps of base and tuned.
        entries: the guidance.
        differentiable: whether the reward has a gradient.
        guided_tuned: also guide the tuned flows, at the largest scale, by the first method.

    Raises:
        ValueError: an entry that says how many particles a picture of its own has.
    """
    rows: list[Row] = []
    for k in steps:
        rows += [Row("none", k, section=k)]
        rows += [Row("none", k, a, scale, section=k) for a in adapters for scale in scales]
    for one in entries:
        made = Row(one.method, one.steps, options=one.options)
        if one.method == "best-of-n":
            if one.particles is not None:
                rows.append(replace(made, count=one.particles))
                continue
            counts = {k: k // one.steps for k in steps}
            rows += [replace(made, count=n, section=k) for k, n in counts.items() if n > 1]
            continue
        if made.plain:
            rows.append(made)
            continue
        if TABLE[one.method].tempered:
            rows.append(replace(made, count=one.particles or 1))
            continue
        if one.particles != 4:
            raise ValueError(
                f"every particle of {one.method!r} is a picture of its own: say how many with "
                "particles, not in the list of guidance"
            )
        rows.append(made)
        for k in steps:
            bought = [s for s in range(1, k + 1) if _calls(replace(made, steps=s), differentiable)
                      <= k]  # fmt: skip
            rows += [replace(made, steps=bought[-1], section=k)] if bought else []
    first = next((r for r in rows if not r.plain and r.section is None), None)
    if guided_tuned and first is not None:
        rows += [replace(first, adapter=a, scale=max(scales)) for a in adapters]
    rows += [Row("none", k) for k in sorted({row.steps for row in rows})]
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row.label, row)
    return list(distinct.values())


def _calls(row: Row, differentiable: bool) -> int:
    """Return the network calls of a picture, those that set a temperature left out."""
    options = {k: v for k, v in row.options.items() if k not in ("temperature", "strength")}
    return row.count * plan(row.method, row.steps, differentiable, **options)["nfe"]


def evaluate_tuned(
    lora: Path | list[Path] | dict[str, Path],
    model: str = "emoji",
    lora_scale: list[float] = [0.25, 0.5, 0.75, 1.0],  # noqa: B006
    best: bool = True,
    reward: str | None = None,
    held_out: list[str] = [],  # noqa: B006
    judge: str | None = "embedded",
    prompts: str | list[str] | None = None,
    particles: int = 4,
    seeds: int = 1,
    steps: list[int] = [1, 2, 4, 8],  # noqa: B006
    guidance: list[str] | None = None,
    guided_tuned: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path = Path("outputs/tuned"),
    overwrite: bool = False,
) -> Path:
    """Compare adapters with their base, and with guidance at equal network calls.

    Every row has the same noise for the same prompt and seed. The folder holds table.md,
    metrics.json, front.png, sheet.png and config.yaml. It appears whole or not at all; an
    interrupted comparison goes on where it stopped when the same command is given again.

    Args:
        lora: folders of adapters, given once or more often, or name -> folder.
        model: a name that `steer models` lists, a folder, or file.py:Name.
        lora_scale: what the adapters' update is multiplied by: 0 is the base, 1 what was tuned.
        best: also the adapters in best/ of each folder, where there are other ones than its own.
        reward: a name that `steer rewards` lists, a weighted sum of such, or file.py:Name.
            Default: what the adapters were tuned for.
        held_out: rewards that nothing was tuned for.
        judge: "embedded", the folder of a judge, a reward by name, or null for none. Its features
            give diversity and KID; without it, averaged pixels do.
        prompts: a text or jsonl file, or a list. Default: the 50 that are not tuned on.
        particles: pictures of a prompt and a seed.
        seeds: how many seeds.
        steps: composed jumps of base and tuned.
        guidance: a list of `method:key=value,...`. The first is what tuned is subtracted from. A
            best-of-n without particles gets as many candidates as each of `steps` has network
            calls; a method that steers without weights also gets a row with as many steps as
            these buy. Default: fmrg-j with 16 steps and best-of-n of one jump; for a reward
            without gradient the best of 16.
        guided_tuned: also the first of them on top of the tuned flows.
        seed: the first seed.
        device: where to compute. Default: where the model is loaded, the CPU.
        out: the folder.
        overwrite: replace the folder if it exists, and drop an interrupted comparison.

    Returns:
        The folder.

    Raises:
        ValueError: no adapters, two of one name, adapters of another base, an unknown reward or
            method, numbers out of range, no prompts.
        FileNotFoundError: a folder or file that is not there.
        FileExistsError: the folder exists, or an interrupted comparison of other settings.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    console = Console(stderr=True)
    refuse_existing(out, overwrite)
    least = {"particles": particles, "seeds": seeds, **{f"steps {k}": k for k in steps}}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name.split()[0]} must be at least 1, got {value}")
    for name, values in {"steps": steps, "lora_scale": lora_scale}.items():
        if not values:
            raise ValueError(f"the list of {name} is empty: give at least one, or leave it out")
    folders = _folders(lora)
    settings["lora"] = {name: str(folder) for name, folder in folders.items()}
    if best:
        folders = _with_best(folders)
    chosen = _asked(prompts)
    known = _tuned_for(folders) if reward is None else reward
    flow = _model(model, device, None)
    bench = _Bench(
        flow,
        {name: load_adapters(flow, folder) for name, folder in folders.items()},
        {"reward": rewards.load(known), **({} if judge is None else {"judge": _judge(judge)})}
        | {HELD_OUT + name: rewards.load(name) for name in held_out},
        chosen, particles,
    )  # fmt: skip
    differentiable = bench.scorers["reward"].differentiable
    texts = guidance if guidance is not None else GUIDANCE if differentiable else BLIND
    scales, counts = sorted(set(lora_scale)), sorted(set(steps))
    rows = rows_of(
        list(folders), scales, counts, [entry(t) for t in texts], differentiable, guided_tuned
    )
    for row in rows:
        check(flow, bench.scorers["reward"], chosen.prompts, 1, row.steps, row.method,
              **row.options)  # fmt: skip

    files = [file for folder in folders.values() for file in _adapter_files(folder)]
    identity = {
        "prompts": chosen._asdict(),
        "files": _fingerprints(model, known, *held_out, judge or "", *files),
        "settings": {k: v for k, v in settings.items() if k != "overwrite"},
    }
    partial = Partial(out, identity, overwrite)
    units = [
        _Unit(i, row, start, seed + j)
        for j in range(seeds)
        for i, row in enumerate(rows)
        for start in range(0, len(chosen.prompts), bench.size(row))
    ]
    work = {
        unit.name: flow.evaluations
        * _calls(unit.row, differentiable)
        * len(bench.prompts(unit).prompts)
        * (1 if TABLE[unit.row.method].tempered else particles)
        for unit in units
    }
    done = sum(work[unit.name] for unit in units if partial.has(unit.name))
    console.print(
        f"{len(folders)} adapters for {known!r}: {len(rows)} rows x {len(chosen.prompts)} prompts "
        f"x {particles} pictures x {seeds} seeds: {sum(work.values())} network calls"
        + (f", {done} of them done already" if done else "")
    )
    try:
        partial.fill(units, work, bench.run, console)
        measured = {
            row.label: _gather(partial, [u for u in units if u.index == i])
            for i, row in enumerate(rows)
        }
        report = Report(rows, measured, chosen.prompts, bench.drifts(rows, seed))
        with whole_folder(out, overwrite) as scratch:
            report.write(scratch, {"reward": known, "particles": particles, "seeds": seeds})
            (scratch / "config.yaml").write_text(_config(settings), encoding="utf-8")
    finally:
        partial.drop_if_empty()
    partial.drop()
    print((out / "table.md").read_text(encoding="utf-8"))
    return out


# ------------------------------------------------------------------ what is asked for


def _folders(lora: Path | Sequence[Path] | Mapping[str, Path]) -> dict[str, Path]:
    """Name the folders: by their own name, and best/ by that of the folder that holds it."""
    if isinstance(lora, Mapping):
        named = [(str(name), Path(folder)) for name, folder in lora.items()]
    else:
        paths = [Path(lora)] if isinstance(lora, str | Path) else [Path(p) for p in lora]
        whole = [p.resolve() for p in paths]
        named = [
            (f"{w.parent.name}/best" if w.name == "best" else w.name, p)
            for w, p in zip(whole, paths, strict=True)
        ]
    if not named:
        raise ValueError("no adapters to compare: give at least one folder, --lora runs/tuned")
    for name, _ in named:
        if [n for n, _ in named].count(name) > 1:
            raise ValueError(
                f"two folders are named {name!r}: name them, --lora '{{one: {named[0][1]}, ...}}'"
            )
    return dict(named)


def _with_best(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Add the best adapters of a run where they are not its last ones."""
    found = dict(folders)
    for name, folder in folders.items():
        files = [where / WEIGHTS for where in (folder, folder / "best")]
        if f"{name}/best" not in folders and all(file.is_file() for file in files):
            last, top = (safetensors.torch.load_file(file) for file in files)
            if any(not torch.equal(p, last[key]) for key, p in top.items() if key in last):
                found[f"{name}/best"] = folder / "best"
    return found


def _asked(prompts: str | list[str] | None) -> Asked:
    if isinstance(prompts, list):
        if not prompts:
            raise ValueError("the list of prompts is empty: give at least one, or leave it out")
        return Asked(prompts, None)
    return read_prompts(DATA / "held_out.txt" if prompts is None else Path(prompts))


def _tuned_for(folders: Mapping[str, Path]) -> str:
    """Return the reward that all of the adapters say they were tuned for."""
    said = {name: read_metadata(folder).get("reward") for name, folder in folders.items()}
    if len(set(said.values())) > 1 or None in said.values():
        texts = ", ".join(f"{name}: {r or 'does not say'}" for name, r in said.items())
        raise ValueError(f"which reward? The adapters name no single one ({texts}): give --reward")
    return str(next(iter(said.values())))


# ------------------------------------------------------------------ drawing and measuring


@dataclass(frozen=True)
class _Unit:
    """What is finished or not: a row, some prompts from `start` on, a seed."""

    index: int
    row: Row
    start: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.index:03d}_{self.seed:06d}_{self.start:06d}"


class _Bench:
    """The flows, and what their pictures are measured by.

    Args:
        flow: the base.
        adapters: name -> the base with them.
        scorers: "reward", "judge" and held-out ones.
        asked: the prompts.
        particles: pictures of each.
    """

    def __init__(
        self,
        flow: steer.FlowMap,
        adapters: Mapping[str, Adapted],
        scorers: Mapping[str, Any],
        asked: Asked,
        particles: int,
    ) -> None:
        self.flow, self.adapters, self.asked, self.particles = flow, adapters, asked, particles
        self.scorers: dict[str, Reward] = {k: s.to(_device(flow)) for k, s in scorers.items()}
        self.features = features_of(scorers.get("judge"))

    def flow_of(self, row: Row) -> steer.FlowMap:
        return self.adapters[row.adapter].at(row.scale) if row.adapter else self.flow

    def drawn(self, row: Row) -> int:
        """Return how many particles of a prompt are drawn at once."""
        return row.count * (1 if TABLE[row.method].tempered else self.particles)

    def size(self, row: Row) -> int:
        """Return how many prompts a unit has: as many as fill a batch."""
        return max(1, BATCH // self.drawn(row))

    def prompts(self, unit: _Unit) -> Asked:
        part = slice(unit.start, unit.start + self.size(unit.row))
        names, questions = self.asked
        return Asked(names[part], None if questions is None else questions[part])

    @torch.no_grad()
    def run(self, unit: _Unit) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Draw and measure a unit -> scores and features, (p, k, ...), the first images, its cost.

        Picture j of a best-of-n is chosen among the noises j, j + n, j + 2 n, ..., n the pictures
        of a prompt, so that the base's own is one of them.
        """
        row, (names, questions) = unit.row, self.prompts(unit)
        drawn, tempered = self.drawn(row), TABLE[row.method].tempered
        result = steer.sample(
            self.flow_of(row), self.scorers["reward"], names, drawn, row.steps, row.method,
            seed=unit.seed, position=unit.start, reward_prompts=questions, **row.options,
        )  # fmt: skip
        if result.images is None:
            raise ValueError("this model decodes to no pictures (n, 3, h, w): nothing to compare")
        images = result.images
        if row.count > 1:
            kept = drawn // row.count
            choice = result.rewards.unflatten(1, (row.count, kept)).argmax(1)
            index = choice * kept + torch.arange(kept, device=choice.device)
            images = images[torch.arange(len(names), device=index.device)[:, None], index]
        k = images.shape[1]
        flat, texts = images.flatten(0, 1), flat_prompts(questions or names, len(names) * k)
        tensors = {"images": images[:, :1], "features": self.features(flat).unflatten(0, (-1, k))}
        tensors |= {n: score(s, flat, texts).reshape(-1, k) for n, s in self.scorers.items()}
        calls = result.nfe * row.count + tempered * result.costs["temperature_nfe_per_prompt"]
        notes = {"nfe": calls, "seconds": result.costs["seconds"] / len(flat)}
        return {name: t.float() for name, t in tensors.items()}, notes

    def drifts(self, rows: Sequence[Row], seed: int) -> dict[tuple[str, float], Drift]:
        """Return how far each of the flows is from the base, on the noise of the first pictures.

        On some of the prompts, one picture each.
        """
        names = self.asked.prompts[:: max(1, len(self.asked.prompts) // DRIFT)][:DRIFT]
        noise = Noise(seed, range(len(names)), 1, step="start", device=_device(self.flow))
        x_0, found = noise.normal(self.flow.event_shape), {}
        for row in rows:
            if row.adapter and (row.adapter, row.scale) not in found:
                flows = self.flow_of(row).given(names), self.flow.given(names)
                found[row.adapter, row.scale] = velocity_distance(*flows, x_0)
        return found


def _gather(partial: Partial, units: Sequence[_Unit]) -> Measured:
    """Put a row's units together again: prompts along axis 0, seeds along axis 1."""
    read = {seed: [partial.read(u.name) for u in units if u.seed == seed]
            for seed in dict.fromkeys(u.seed for u in units)}  # fmt: skip
    parts = list(read.values())
    tensors = {
        name: torch.cat([torch.cat([t[name] for t, _ in part]) for part in parts], 1)
        for name in parts[0][0][0]
    }
    notes = [note for part in parts for _, note in part]
    return Measured(tensors, **{k: sum(n[k] for n in notes) / len(notes) for k in notes[0]})
