"""`steer finetune`: tune a LoRA on a flow map by rewards, with instruments against hacking."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import rewards
import steer
from recipes.prompts import Asked, read_prompts
from recipes.sample import _model
from rewards.judge import Judge
from steer.tuning.settings import Settings

__all__ = ["finetune", "named"]

DATA = Path(__file__).with_name("data")


def finetune(
    model: str = "emoji",
    reward: str = "clip",
    prompts: str | list[str] | None = None,
    objective: str = "direct",
    options: dict[str, Any] = {},  # noqa: B006
    steps: int = 400,
    temperature: float | None = None,
    strength: float | None = None,
    judge: str | None = "embedded",
    held_out: list[str] = [],  # noqa: B006
    check_prompts: str | list[str] | None = None,
    seed: int = 0,
    out: Path = Path("runs/tuned"),
    overwrite: bool = False,
    **settings: Any,
) -> steer.Adapted:
    """Tune adapters so that the model's plain samples follow rewards.

    The run's folder holds the adapters (peft reads it), best/ (those that the judge liked best),
    sheets/, readings.jsonl, front.png and front.json (a sweep of the adapters' scale), logs, a
    model card, and what a stopped run needs to go on: give the same command again.

    Args:
        model: a name that `steer models` lists, a folder, or file.py:Name.
        reward: a name that `steer rewards` lists, a weighted sum of such, or file.py:Name.
        prompts: a text or jsonl file, or a list. Default: the 200 that come with the emoji data.
        objective: a name that `steer objectives` lists.
        options: the objective's own.
        steps: optimizer steps.
        temperature: what the reward is divided by, in its units; lower tunes harder.
        strength: instead: the reward's own spread divided by this (default 3).
        judge: "embedded", the folder of a judge, a reward by name, or null for none.
        held_out: rewards that are read at checks and not tuned for.
        check_prompts: a file or a list of prompts for the checks. Default: 16 of the 50 that come
            along and are not tuned on.
        seed: keys all randomness.
        out: the run's folder.
        overwrite: drop an earlier run in the folder.
        **settings: how the run is run.
    """
    chosen = Settings(**settings)
    names, asked = read_prompts(DATA / "tune.txt") if prompts is None else _prompts(prompts)
    if check_prompts is not None:
        checks: list[str] | None = _prompts(check_prompts).prompts
    else:  # prompts of the embedded data, unless the tuned ones are one's own
        every = read_prompts(DATA / "held_out.txt").prompts
        checks = every[:: len(every) // 16][:16] if prompts is None else None
    known = asdict(chosen) | {"check_prompts": checks}
    return steer.finetune(
        _model(model, None, None), named(reward), names, objective, steps, temperature, strength,
        _judge(judge), seed, out, options=options,
        held_out={name: rewards.load(name) for name in held_out}, reward_prompts=asked,
        overwrite=overwrite, **known,
    )  # fmt: skip


def named(text: str) -> steer.Reward:
    """Load a reward, and let it be called as it was asked for, in files and cards."""
    reward = rewards.load(text)
    reward.__name__ = text  # type: ignore[assignment]
    return reward


def _prompts(prompts: str | list[str]) -> Asked:
    """Take a list as it is, and read a file."""
    if isinstance(prompts, str):
        return read_prompts(Path(prompts))
    return Asked(prompts, None)


def _judge(name: str | None) -> steer.Reward | None:
    if name is None:
        return None
    if name == "embedded" or Path(name).is_dir():
        return Judge() if name == "embedded" else Judge(Path(name))
    return rewards.load(name)
