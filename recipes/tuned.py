"""`steer eval --lora`: compare tuned models with the base, and with guidance at equal calls."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import rewards
import steer
from recipes.crew import Spread, crew_of
from recipes.defaults import judge_of, listed, own
from recipes.entries import entry
from recipes.identity import adapter_files, config_text, fingerprints, settings_of
from recipes.inputs import file_or_list, load_model, model_name, weights_of
from recipes.methods import check, method, tempered
from recipes.partial import Partial, free_or_finished, is_finished, units_of
from recipes.terminal import console, say
from recipes.tuned_bench import Bench
from recipes.tuned_report import Measured, Report
from recipes.tuned_rows import calls_of, rows_of
from rewards.loading import load_plain
from steer import hub
from steer.adapters.store import WEIGHTS, load_adapters, read_metadata
from steer.files import whole_folder
from steer.names import reason
from steer.secrets import redacted
from steer.tuning.alarms import HELD_OUT

__all__ = ["GUIDANCE", "evaluate_tuned"]

GUIDANCE = ("fmrg-j:steps=16", "best-of-n:steps=1")
"""The default methods with which tuning is compared."""

BLIND = ("best-of-n:steps=1,particles=16", "best-of-n:steps=1")
"""The same for a reward without gradient."""


def evaluate_tuned(
    lora: Path | list[Path] | dict[str, Path],
    model: str = "emoji",
    lora_scale: list[float] = [0.25, 0.5, 0.75, 1.0],  # noqa: B006
    best: bool = True,
    reward: str | None = None,
    held_out: list[str] = [],  # noqa: B006
    judge: str | None = "own",
    prompts: str | list[str] | None = None,
    particles: int = 4,
    seeds: int = 1,
    steps: list[int] = [1, 2, 4, 8],  # noqa: B006
    guidance: list[str] | None = None,
    guided_tuned: bool = False,
    seed: int = 0,
    device: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    spread: Spread | None = None,
    out: Path = Path("outputs/tuned"),
    overwrite: bool = False,
    model_options: dict[str, Any] = {},  # noqa: B006
) -> Path:
    """Compare adapters with their base, and with guidance at equal network calls.

    Every row has the same noise for the same prompt and seed. The folder holds table.md,
    metrics.json, front.png, sheet.png and config.yaml. It is written atomically; an interrupted
    comparison resumes when the same command is given again.

    Args:
        lora: one or more folders of adapters, or a mapping name -> folder.
        model: a name that `steer models` lists, a folder, a hub id, or file.py:Name; in Python
            also a flow map or a pipeline object.
        lora_scale: factors for the adapters' update: 0 is the base, 1 the tuned model.
        best: also evaluate the adapters in best/ of each folder, if they differ from its own.
        reward: a name that `steer rewards` lists, a weighted sum of names, or file.py:Name.
            Default: the reward that the adapters were tuned for.
        held_out: further held-out rewards.
        judge: the held-out reward: "own", the model's if it has one;
            "embedded", that of emoji; the folder of a judge, a reward by name, or null for none.
            Its features are used for diversity and KID; without a judge averaged pixels are used.
        prompts: a text or jsonl file, or a list. Default: the model's own prompts that are not
            used for tuning, 50 for emoji.
        particles: pictures per prompt and seed.
        seeds: number of seeds.
        steps: numbers of jumps for base and tuned models.
        guidance: a list of `method:key=value,...`. Differences are taken to the first of them. A
            best-of-n without particles gets as many candidates as each of `steps` has network
            calls; a guided method without weights also gets a row with as many steps as these
            calls allow. Default: fmrg-j with 16 steps and best-of-n of one jump; for a reward
            without gradient the best of 16.
        guided_tuned: also apply the first of them to the tuned models.
        seed: the first seed.
        device: device to compute on. Default: where the model is loaded, the CPU; for several
            processes the available accelerators, so give cpu for processes on the CPU.
        devices: processes on each machine, one per device; see spread for how they divide the
            work.
        num_nodes: number of machines, with a shared file system; SLURM or torchrun starts the
            processes.
        spread: how several processes divide the work: by prompts, or by the particles of each
            prompt, with weights and resampling over all processes. Default: particles if there are
            fewer units of prompts than processes, else prompts.
        out: the folder.
        overwrite: replace the folder if it exists, and delete an interrupted comparison.
        model_options: options for a diffusers pipeline: height, width, cfg, guidance,
            negative_prompt, checkpointing, call and the others of `steer.load`.

    Returns:
        The folder.

    Raises:
        ValueError: no adapters, two of one name, adapters of another base, an unknown reward or
            method, numbers out of range, no prompts.
        FileNotFoundError: a folder or file that is not there.
        FileExistsError: the folder exists and is another run, or an interrupted comparison of
            other settings.
    """
    live, model = model, model_name(model)
    settings = settings_of({k: v for k, v in locals().items() if k != "live"})
    crew = crew_of(devices, num_nodes, device)
    device = crew.device or device
    screen, out = console(), crew.told(lambda: free_or_finished(out, overwrite))
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
    chosen = listed(model, file_or_list(prompts), own(model).held_out)
    known, scorer = _tuned_for(folders) if reward is None else (reward, rewards.load(reward))
    flow = load_model(live, device, options=model_options)
    scorers = {"reward": scorer}
    judging = judge_of(model, judge, screen)
    scorers |= {} if judging is None else {"judge": judging}
    scorers |= {HELD_OUT + redacted(name): rewards.load(name) for name in held_out}
    tuned = {name: load_adapters(flow, folder) for name, folder in folders.items()}
    bench = Bench(flow, tuned, scorers, chosen, particles)
    differentiable = bench.scorers["reward"].differentiable
    texts = guidance if guidance is not None else GUIDANCE if differentiable else BLIND
    scales, counts = sorted(set(lora_scale)), sorted(set(steps))
    guides = [entry(t) for t in texts]
    rows = rows_of(list(folders), scales, counts, guides, differentiable, guided_tuned, flow)
    for row in rows:
        check(
            flow, bench.scorers["reward"], chosen.prompts, particles=1, steps=row.steps,
            method=method(row.method), reward_prompts=chosen.reward_prompts, **row.options,
        )  # fmt: skip

    shown = redacted(known)
    files = [file for folder in folders.values() for file in adapter_files(folder)]
    identity = {
        "prompts": chosen._asdict(),
        "files": fingerprints(
            model, known, *held_out, judge or "", *files, *(e.method for e in guides)
        )
        | weights_of(live, flow),
        "settings": {k: v for k, v in settings.items() if k != "overwrite"},
    }
    if crew.told(lambda: is_finished(out, identity, overwrite)):
        screen.print(f"{out} is finished: see table.md in it, or give --overwrite to run it again")
        return out
    seen = range(seed, seed + seeds)
    units = units_of(rows, len(chosen.prompts), seen, bench.size)
    crew.spread(spread, len(units), particles)
    work = {
        u.name: calls_of(u.row, differentiable, flow)
        * (u.end - u.start)
        * (1 if tempered(u.row.method) else particles)
        for u in units
    }
    with Partial(out, identity, overwrite, screen, crew) as partial:
        screen.print(
            f"{len(folders)} adapters for {shown!r}: {len(rows)} rows x {len(chosen.prompts)} "
            f"prompts x {particles} pictures x {seeds} seeds: {sum(work.values())} network calls"
            f"{partial.done(units, work)}"
        )
        partial.fill(units, work, bench.run, screen, crew)
        if not crew.first:
            return out
        measured = {}
        for i, row in enumerate(rows):
            tensors, costs = partial.gathered([u for u in units if u.index == i])
            flat = {name: t.flatten(1, 2) for name, t in tensors.items()}
            measured[row.label] = Measured(flat, **costs)
        report = Report(rows, measured, chosen.prompts, bench.drifts(rows, seed))
        with whole_folder(out, overwrite) as scratch:
            report.write(scratch, {"reward": shown, "particles": particles, "seeds": seeds})
            (scratch / "config.yaml").write_text(config_text(settings, identity), encoding="utf-8")
        partial.drop()
    say((out / "table.md").read_text(encoding="utf-8"))
    return out


# ------------------------------------------------------------------ what is asked for


def _folders(lora: Path | Sequence[Path] | Mapping[str, Path]) -> dict[str, Path]:
    """Return name -> folder, with the folder's own name, and for best/ that of its parent."""
    if isinstance(lora, Mapping):
        named = [(str(name), Path(folder)) for name, folder in lora.items()]
    else:
        paths = [Path(lora)] if isinstance(lora, str | Path) else [Path(p) for p in lora]
        named = [(_called(p), p) for p in paths]
    if not named:
        raise ValueError("no adapters to compare: give at least one folder, --lora runs/tuned")
    for name, _ in named:
        if [n for n, _ in named].count(name) > 1:
            raise ValueError(
                f"two folders are named {name!r}: name them, --lora '{{one: {named[0][1]}, ...}}'"
            )
    return {name: hub.lora_path(folder) for name, folder in named}


def _called(folder: Path) -> str:
    """Return the name of a folder of adapters, or of a hub repository."""
    found = hub.named(folder)
    if found is not None:
        return found.repo.partition("/")[2]
    whole = folder.resolve()
    return f"{whole.parent.name}/best" if whole.name == "best" else whole.name


def _with_best(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Add the best adapters of a run if they differ from its last ones."""
    found = dict(folders)
    for name, folder in folders.items():
        files = [where / WEIGHTS for where in (folder, folder / "best")]
        if f"{name}/best" not in folders and all(file.is_file() for file in files):
            last, top = (safetensors.torch.load_file(file) for file in files)
            if any(not torch.equal(p, last[key]) for key, p in top.items() if key in last):
                found[f"{name}/best"] = folder / "best"
    return found


def _tuned_for(folders: Mapping[str, Path]) -> tuple[str, steer.Reward]:
    """Return the reward for which all adapters were tuned, as a text and loaded.

    The text in a file of adapters is untrusted: only rewards of the package are made from it.
    """
    said = {name: read_metadata(folder).get("reward") for name, folder in folders.items()}
    if len({json.dumps(text) for text in said.values()}) > 1 or None in said.values():
        texts = ", ".join(f"{name}: {_short(r)}" for name, r in said.items())
        raise ValueError(
            f"which reward? The adapters do not name a single one ({texts}): give --reward"
        )
    name, text = next(iter(said.items()))
    try:
        return str(text), load_plain(str(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folders[name]} says that it was tuned for {_short(text)}, and {reason(error)}: "
            "names in a file are not imported, run or downloaded; if you want it, give --reward"
        ) from None


def _short(text: object) -> str:
    """Return an untrusted text on one line."""
    shown = "does not say" if text is None else repr(text)
    return shown if len(shown) <= 300 else f"{shown[:300]} ..."
