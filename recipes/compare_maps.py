"""`steer compare-maps`: compare training rules with the same data, network and budget."""

import copy
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from recipes.figures import estimate, markdown
from recipes.fitting import begun_alike
from recipes.map_bench import DATA, ERROR, STEPS, TIMES, FashionBench, PointsBench
from recipes.plots.charts import curves
from recipes.plots.style import save
from recipes.terminal import say
from steer.devices import differentiating
from steer.files import expanded, write_atomically
from steer.lock import locked
from steer.names import unknown
from steer.training.map_metric import saved_bytes

__all__ = ["compare_maps"]


def compare_maps(
    data: Literal["mixture", "ring", "checkerboard", "fashion"] = "ring",
    rules: list[str] | None = None,
    velocity_steps: int = 3000,
    map_steps: int = 2000,
    batch_size: int = 1024,
    width: int = 128,
    depth: int = 3,
    muon: float = 2e-3,
    adamw: float = 1e-3,
    map_rate: float = 0.5,
    seeds: int = 3,
    pairs: str | None = None,
    guidance: float = 1.0,
    folder: Path | None = None,
    start: Path | None = None,
    out: Path = Path("outputs/compare_maps"),
) -> Path:
    """Train a map by each rule from the same velocity, and measure it against the true map.

    For each seed a velocity is fitted first; every rule starts from it, and it is the teacher of
    those that follow one. The folder contains rows.jsonl (one line per rule and seed), table.md
    and plots. An interrupted comparison resumes when the same command is given again.

    Args:
        data: a two-dimensional distribution whose velocity has a closed form, or fashion.
        rules: names that `steer rules` lists. Default: all.
        velocity_steps: steps of flow matching, shared by all rules.
        map_steps: steps of each rule.
        batch_size: points per step.
        width: width of the network's hidden layers.
        depth: number of hidden layers.
        muon: learning rate of the matrices.
        adamw: learning rate of the other parameters.
        map_rate: both rates are scaled by this for the maps.
        seeds: number of repetitions, each with its own seed.
        pairs: one distribution of the times for all rules, see `steer train --help`. Default: that
            of each rule.
        guidance: scale of classifier-free guidance that is distilled into the maps; for fashion.
        folder: folder with the published files of fashion. Default: the pictures in the package.
        start: for fashion: folder of a trained velocity, used instead of training one.
        out: the folder.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown law or rule, or a folder of other settings.
    """
    settings = {
        k: os.fspath(v) if isinstance(v, Path) else v
        for k, v in locals().items()
        if k not in ("out", "rules", "seeds")
    }
    from steer.catalogue import RULES

    if data not in DATA:
        raise unknown("law", data, DATA)
    names = list(RULES) if rules is None else list(rules)
    for name in names:
        if name not in RULES:
            raise unknown("rule", name, RULES)
    out = expanded(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        begun_alike(out, settings, "rows.jsonl")
        rows = _read(out / "rows.jsonl")
        bench: Any = (FashionBench if data == "fashion" else PointsBench)(settings)
        for seed in range(seeds):
            left = [n for n in names if (n, seed) not in {(r["rule"], r["seed"]) for r in rows}]
            if not left:
                continue
            base, seconds, _ = _trained(bench, settings, None, None, seed)
            if not any(r["rule"] == "velocity" and r["seed"] == seed for r in rows):
                left = ["velocity", *left]
            for name in left:
                row: dict[str, Any] = {"rule": name, "seed": seed}
                if name == "velocity":
                    flow, memory = base, 0
                else:
                    flow, seconds, memory = _trained(bench, settings, name, base, seed)
                bench.teacher = base
                found = {"seconds": seconds, "memory": memory, **bench.measured(flow, seed)}
                rows.append(row | found)
                text = "".join(json.dumps(r) + "\n" for r in rows)
                write_atomically(out / "rows.jsonl", text.encode())
                say(f"{name}, seed {seed}: {_line(rows[-1], bench)}")
        write_atomically(out / "table.md", _table(rows, bench).encode())
        _plot(rows, bench, out / "steps.png")
    say((out / "table.md").read_text())
    return out


def _trained(
    bench: Any, settings: Mapping[str, Any], name: str | None, base: Any, seed: int
) -> tuple[Any, float, int]:
    """Return the running average of a trained flow, and seconds and saved bytes per step."""
    import lightning as L

    from steer.models.loading import load
    from steer.training.data import step_loader
    from steer.training.module import FlowTraining
    from steer.training.rules import FlowMatching, MapObjective, build

    torch.manual_seed(seed)
    second = name is not None
    rule: Any = FlowMatching()
    if name is None:
        if settings["start"] is not None:
            return load(settings["start"]), 0.0, 0
        flow = bench.flow()
        steps = settings["velocity_steps"]
    else:
        flow = copy.deepcopy(base).train().requires_grad_(True)
        taught = build(name)
        teacher = base if taught.field == "teacher" else None
        rule = MapObjective(taught, teacher, settings["guidance"], pairs=settings["pairs"])
        steps = settings["map_steps"]

    def batches(step: int) -> tuple[torch.Tensor, list[str]]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step + 500_000 * second)
        return bench.batch(settings["batch_size"], generator)

    scale = settings["map_rate"] if second else 1.0
    module = FlowTraining(
        flow, rule, batches, steps=steps, seed=seed, average=0.998,
        muon=scale * settings["muon"], adamw=scale * settings["adamw"],
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    begun = time.perf_counter()
    with differentiating():
        trainer.fit(module, step_loader(steps))
    seconds = (time.perf_counter() - begun) / steps
    memory = 0
    if second:
        x_1, prompts = batches(0)
        generator = torch.Generator().manual_seed(0)
        memory = saved_bytes(
            lambda: module.rule(module.flow, module.average, x_1, prompts, generator, 1.0)
        )
    return module.average.eval(), seconds, memory


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _line(row: Mapping[str, Any], bench: Any) -> str:
    name = bench.distance.format(1)
    text = f"{name} {row[name]:.3f}"
    error = row.get(ERROR.format(0.25))
    return text if error is None else f"{text}, lookahead from .25 off by {error:.3f}"


def _table(rows: Sequence[Mapping[str, Any]], bench: Any) -> str:
    """Return the comparison as a table: means over seeds, and their spread."""
    columns = [n for n in rows[0] if n not in ("rule", "seed", "floor") and "denoiser" not in n]
    columns = [n for n in columns if n not in ("seconds", "memory")]
    header = ["rule", *columns, "ms a step", "MB a step"]
    lines = []
    for name in dict.fromkeys(r["rule"] for r in rows):
        mine = [r for r in rows if r["rule"] == name]
        cells = [_spread([r[c] for r in mine]) for c in columns]
        cells.append(f"{1e3 * min(r['seconds'] for r in mine):.0f}")
        cells.append(f"{mine[0]['memory'] / 2**20:.0f}" if mine[0]["memory"] else "")
        lines.append([name, *cells])
    denoiser = [""] * len(header)
    denoiser[0] = "true denoiser"
    for t in TIMES:
        value = estimate(torch.tensor([r[f"denoiser, t = {t:g}"] for r in rows])).mean
        denoiser[header.index(ERROR.format(t))] = f"{value:.3f}"
    note = (
        "Means over seeds, with the range (largest minus smallest) in brackets. "
        f"{bench.note(list(rows))}\n"
    )
    return markdown(header, [*lines, denoiser]) + "\n\n" + note


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({max(values) - min(values):.3f})"


def _plot(rows: Sequence[Mapping[str, Any]], bench: Any, out: Path) -> None:
    """Plot the distance by steps and the lookahead's error by time, one line per rule."""
    from steer.training.rules.table import TABLE

    known = {n: getattr(r(), "family", "") for n, r in TABLE.items()}
    names = list(dict.fromkeys(r["rule"] for r in rows))
    means: list[dict[str, list[float]]] = []
    for column, ks in ((bench.distance, STEPS), (ERROR, TIMES)):
        means.append({})
        for name in names:
            mine = [r for r in rows if r["rule"] == name]
            means[-1][name] = [sum(r[column.format(k)] for r in mine) / len(mine) for k in ks]
    denoiser = [sum(r[f"denoiser, t = {t:g}"] for r in rows) / len(rows) for t in TIMES]
    panels = [
        ("jumps (network calls a sample)", bench.axis, STEPS, means[0]),
        ("time t of the lookahead (0 noise, 1 data)", "error of X(t,1,x)", TIMES, means[1]),
    ]
    families = {n: known.get(n, "") for n in names}
    save(partial(curves, panels, families, dashed={"true denoiser": denoiser}), out)
