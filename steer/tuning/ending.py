"""The end of a tuning run: the last adapters, the front, the card, and a summary."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.adapters.card import write_card
from steer.files import write_atomically
from steer.tuning.callbacks import SaveAdapters, Watch
from steer.tuning.front import figures, front_figures, plan_sweep, recommended, sweep
from steer.tuning.module import RewardTuning
from steer.tuning.request import Tuning
from steer.tuning.run_folder import RunFolder

__all__ = ["attend", "end", "summary"]


def end(
    tuning: Tuning, module: RewardTuning, watch: Watch | None, saver: SaveAdapters | None,
    folder: RunFolder | None,
) -> str:  # fmt: skip
    """Write the results of a run, and return a summary.

    Args:
        tuning: the request.
        module: the module that was trained.
        watch: the checks, if there were any.
        saver: the writer of the adapters, if there is a folder.
        folder: the folder of the run; None: nothing is written.
    """
    said: dict[str, Any] = {}
    lines = []
    if watch is not None:
        said["figures"] = figures(watch.readings[-1])
    if folder is not None and saver is not None:
        saver.metadata |= said
        saver.save(module.global_step)
        if watch is not None:
            scales, steps, left = plan_sweep(watch.panel, tuning.settings, module.nfe)
            lines += [left] if left else []
            if steps:
                front = sweep(watch.panel, scales, steps, folder.path)
                said = {"scale": recommended(front), "figures": front_figures(front)}
                saver.metadata |= said
                saver.save(module.global_step)
        _card(folder.path)  # before the run counts as finished; otherwise it is written again
        folder.finish(
            {
                "steps": tuning.steps, "done": module.global_step, "nfe": module.nfe,
                "reward_calls": module.reward_calls,
                "stopped": "" if watch is None else watch.stopped,
                "watch_seconds": 0.0 if watch is None else watch.seconds,
            }
        )  # fmt: skip
    lines += summary(tuning, said, module.global_step, None if folder is None else folder.path)
    return "\n".join(lines)


def attend(
    tuning: Tuning, module: RewardTuning, watch: Watch | None, folder: RunFolder | None
) -> None:
    """Make the network calls of `end` on the other processes, if all must make each call."""
    if folder is not None and watch is not None:
        scales, steps, _ = plan_sweep(watch.panel, tuning.settings, module.nfe)
        if steps:
            sweep(watch.panel, scales, steps)


def summary(
    tuning: Tuning, said: Mapping[str, Any], done: int, out: Path | None = None
) -> list[str]:
    """Return a summary of a run in a few lines: figures, folder, next command.

    Args:
        tuning: the request.
        said: "figures", and "scale" if a sweep recommends one.
        done: number of steps taken.
        out: the run's folder.
    """
    scale = said.get("scale", 1.0)
    found = said.get("figures", {})
    parts = [
        f"{name} {found[name]['base']:.4g} -> {found[name]['tuned']:.4g}"
        for name in ("reward", "judge")
        if name in found
    ]
    read = f": {', '.join(parts)} at scale {scale:g}" if parts else ""
    advice = ", which is recommended" if "scale" in said else ""
    lines = [f"tuned for {done} of {tuning.steps} steps{read}{advice}"]
    if out is None:
        return lines
    names = ("best", "sheets", "grid.png", "front.png", "README.md")
    kept = [name for name in names if (out / name).exists()]
    lines.append(f"{out} holds the adapters; beside them {', '.join(kept)}")
    lines.append(f"next: {_next(tuning, out, scale)}")
    return lines


def _next(tuning: Tuning, out: Path, scale: float) -> str:
    """Return the command that samples tuned pictures, or Python code for a base without a name."""
    if not tuning.flow.name:
        return f"steer.sample(tuned.at({scale:g}), reward, prompts, method='none')"
    words = ["steer", "sample", "--model", tuning.flow.name, "--lora", str(out)]
    words += ["--lora-scale", f"{scale:g}", "--method", "none"]
    named = vars(tuning.reward).get("__name__")  # as given on the command line
    words += ["--reward", str(named)] if named else []
    words += ["--prompt", tuning.prompts.prompts[0]] if tuning.prompts.prompts else []
    return shlex.join(words)


def _card(out: Path) -> None:
    """Write the model card, with a sheet of base and tuned pictures."""
    sheets = sorted((out / "sheets").glob("[0-9]*.png"))
    if sheets:
        write_atomically(out / "grid.png", sheets[-1].read_bytes())
    write_card(out)
