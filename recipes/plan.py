"""`steer plan`: the memory and the calls that a run needs, before anything is loaded."""

import json as json_
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import steer
from recipes.inputs import Dtype
from recipes.terminal import console, say
from steer.planning.report import CARDS, Fit, Plan, gib, usable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["fit", "plan", "row"]


def plan(
    model: str = "emoji",
    reward: str | None = None,
    height: int | None = None,
    width: int | None = None,
    rows: int | None = None,
    particles: int = 4,
    steps: int = 16,
    method: str | None = None,
    objective: str = "direct",
    rank: int = 16,
    tuning: bool = True,
    training: bool = False,
    devices: int = 1,
    strategy: str = "auto",
    dtype: Dtype | None = None,
    card: float | None = None,
    cpu: bool = False,
    json: bool = False,
    table: bool = False,
    models: list[str] = [],  # noqa: B006
    model_options: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Say what a run needs: weights, peaks of its steps, what saves memory, which cards do.

    Nothing is loaded or downloaded: the steps are run on tensors without values. Some
    minutes for a large model.

    Args:
        model: a short name of a public model (sd15, sdxl, sd3-medium, sana-sprint-0.6b,
            sana-sprint-1.6b, flux3-klein, flux-schnell, flux-dev, z-image-turbo, qwen-image,
            hunyuan-image, wan-1.3b), a pipeline's folder (its JSON files are enough), a hub id
            owner/name that is in the cache, or anything that `steer sample --model` takes.
        reward: as for `steer sample`; weights of published rewards are not downloaded. Default: a
            reward without weights.
        height: height of the pictures. Default: the model's own.
        width: width of the pictures. Default: the model's own.
        rows: pictures in one network call. Default: the number of particles.
        particles: pictures per prompt.
        steps: steps from noise to picture, for the number of calls.
        method: a name that `steer methods` lists. Default: as for `steer sample`.
        objective: tuning objective: a name that `steer objectives` lists.
        rank: rank of the adapters.
        tuning: also plan a tuning step, which takes most of the time.
        training: also plan a step that trains all weights.
        devices: processes of a tuning run.
        strategy: of a tuning run; with fsdp each process holds one part in `devices` of the
            denoiser's weights.
        dtype: precision of the weights. Default: bfloat16 for a pipeline, else float32.
        card: memory of a card in GiB: also say whether the run fits; the exit code is 1 if it does
            not.
        cpu: plan for the CPU, whose kernels keep more memory.
        json: print only the plan, as JSON.
        table: instead of a plan: a Markdown table of which models fit which cards, one line per
            model.
        models: models in the table. Default: all public ones.
        model_options: options for a diffusers pipeline: cfg, guidance, checkpointing, call and so
            on.
    """
    chosen: dict[str, Any] = {
        "reward": reward, "height": height, "width": width, "rows": rows,
        "particles": particles, "steps": steps, "method": method, "objective": objective,
        "rank": rank, "tuning": tuning, "training": training, "cuda": not cpu,
        "devices": devices, "strategy": strategy,
        "dtype": None if dtype is None else getattr(torch, dtype),
    }  # fmt: skip
    if table:
        _table(models, chosen | {"levers": "stack"}, model_options)
        return
    made = steer.plan(model, **chosen, **model_options)
    if json:
        say(json_.dumps(made.as_dict(), indent=2))
    else:
        _print(made)
    if card is None:
        return
    found = made.fits(card)
    if not json:
        say(f"\n{card:g} GB: {fit(found)}")
    if not found.rows:
        raise SystemExit(1)


def fit(found: Fit) -> str:
    """Return a text on how a model fits on a card.

    >>> fit(Fit(8)), fit(Fit(2, ("checkpointing",))), fit(Fit(0))
    ('8 rows a call', '2 rows a call with checkpointing', 'not even one row')
    """
    if not found.rows:
        return "not even one row"
    rows = f"{found.rows} row{'s' * (found.rows != 1)} a call"
    return f"{rows} with {', '.join(found.levers)}" if found.levers else rows


def _print(made: Plan) -> None:
    height, width = made.size
    kind = "CUDA" if made.cuda else "the CPU"
    say(
        f"{made.model}, {height} x {width}, {made.dtype}, for {kind}; sizes: {made.source}\n"
        f"method {made.method}, reward {made.reward}, {made.rows} rows a call; a particle costs "
        f"{made.calls['nfe']} NFE and {made.calls['reward_calls']} reward calls"
    )
    parts = _new("weights", "parameters", "size")
    for name, size in made.weights.items():
        count = made.parameters.get(name)
        parts.add_row(name, "" if count is None else f"{count / 1e9:.3f} B", gib(size))
    parts.add_row("all", "", gib(made.weight))
    say(parts)
    kept = _new("kept for the backward pass", "by a row")
    for name, size in made.saved.items():
        kept.add_row(name, gib(size))
    say(kept)
    peaks = _new("peak of", "weights and states", "a row of a call", f"{made.rows} rows")
    steps = {
        f"a guided step ({made.method})": made.guided,
        f"a tuning step ({made.objective})": made.tuning,
        "a training step (all weights)": made.training,
    }
    for name, need in steps.items():
        if need is not None:
            peaks.add_row(name, gib(need.base), gib(need.row), gib(need.at(made.rows)))
    say(peaks)
    levers = _new("a guided step with", "peak", "saves", "how")
    here = made.guided.at(made.rows)
    for lever in made.levers:
        peak = lever.need.at(made.rows)
        levers.add_row(lever.name, gib(peak), gib(here - peak), lever.how)
    say(levers)
    cards = _new("card", "tensors may have", "a guided step fits with")
    for size in CARDS:
        cards.add_row(f"{size} GB", gib(usable(size)), fit(made.fits(size)))
    say(cards)
    say("\n" + "\n".join(made.notes))


def _new(*columns: str) -> "Table":
    from rich.table import Table

    say("")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        last = column in ("how", "a guided step fits with") or column == columns[0]
        table.add_column(column, justify="left" if last else "right", no_wrap=not last)
    return table


def _table(models: Sequence[str], chosen: dict[str, Any], options: dict[str, Any]) -> None:
    from steer.backends.sizes import PUBLIC

    screen = console()
    head = ["model", "pixels", "weights", "guided: base + a row", "checkpointed",
            "tuning: base + a row", *(f"{size} GB" for size in CARDS)]  # fmt: skip
    say("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in models or PUBLIC:
        screen.print(f"planning {name}")
        say(row(steer.plan(name, **chosen, **options)))


def row(made: Plan) -> str:
    """Return a plan as a row of the table: rows per call by card, with letters for options."""
    saving = next((one.need for one in made.levers if one.name == "checkpointing"), None)

    def needed(need: Any) -> str:
        return "–" if need is None else f"{gib(need.base)} + {gib(need.row)}"

    height, width = made.size
    cells = [
        made.model, f"{height} x {width}", gib(made.weight), needed(made.guided),
        needed(saving), needed(made.tuning),
    ]  # fmt: skip
    for size in CARDS:
        found = made.fits(size)
        letters = "".join(lever[0] for lever in found.levers) if found.rows else ""
        cells.append(f"{found.rows} {letters}".strip() if found.rows else "–")
    return "| " + " | ".join(cells) + " |"
