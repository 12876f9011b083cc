"""Defaults of the commands for a model: its own reward, judge and prompts.

They belong to the models of the package. Your own model has none: required arguments must then be
given, and optional ones are skipped with a message.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import rewards
import steer
from recipes.identity import named_files
from recipes.inputs import Asked, read_prompts, takes_prompts
from rewards.judge import Judge
from steer import hub
from steer.catalogue import MODELS
from steer.names import unknown
from steer.secrets import redacted

__all__ = [
    "DATA",
    "EMOJI",
    "OWN",
    "Own",
    "compared_prompts",
    "judge_of",
    "listed",
    "named",
    "own",
    "reward_of",
    "tuning_prompts",
]

DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Own:
    """The defaults of a model; None if it has none.

    Attributes:
        reward: the reward of `sample`, `compare` and `finetune`.
        judge: the held-out reward.
        tuned: file of the tuning prompts.
        held_out: file of the held-out prompts.
        compared: file of the prompts of `compare`.
    """

    reward: str | None = None
    judge: str | None = None
    tuned: Path | None = None
    held_out: Path | None = None
    compared: Path | None = None


EMOJI = Own("clip", "embedded", DATA / "tune.txt", DATA / "held_out.txt", DATA / "compare.jsonl")

FASHION = Own(
    "fashion",
    os.fspath(Path(rewards.__file__).with_name("zoo") / "fashion-judge"),
    DATA / "fashion_tune.txt",
    DATA / "fashion_held_out.txt",
    DATA / "fashion_compare.jsonl",
)

OWN = {"emoji": EMOJI, "emoji-diffusers": EMOJI, "fashion": FASHION}
"""Model of the package -> its defaults."""


def own(model: str) -> Own:
    """Return the defaults of a model; empty for a model that is not in the package."""
    return OWN.get(model, Own())


def reward_of(model: str, reward: str | None) -> str:
    """Return the reward that was given, else the model's own.

    Raises:
        ValueError: neither; a model of an unknown name.
    """
    found = reward or own(model).reward
    word = isinstance(model, str) and re.fullmatch(r"[\w-]+", model)
    if found is None and word and model not in MODELS and not Path(model).exists():
        raise unknown("model", model, MODELS)
    if found is None:
        raise ValueError(
            f"model {model!r} has no default reward: give --reward, a name that `steer rewards` "
            "lists, or file.py:Name"
        )
    return found


def judge_of(model: str, judge: str | None, console: Console) -> steer.Reward | None:
    """Load a judge by name: "own" is the model's, "embedded" that of emoji, None is no judge.

    Args:
        model: as it was named.
        judge: "own", "embedded", the folder of a judge, its name on the hub (hf://owner/name), a
            reward by name, or None.
        console: console for the message that the model has no judge.
    """
    if judge == "own":
        judge = own(model).judge
        if judge is None:
            console.print(f"model {model} has no default judge, so no judge is used: see --judge")
    if judge is None:
        return None
    if judge == "embedded":
        return Judge()
    folder = os.path.isdir(judge) or hub.named(judge) is not None
    return Judge(judge) if folder else named(judge)


def named(text: str) -> steer.Reward:
    """Load a reward, and name it in files and cards as it was requested, without tokens."""
    reward = rewards.load(text)
    reward.__name__ = redacted(text)  # type: ignore[assignment]
    reward.made_of = (*reward.made_of, *named_files(text))
    return reward


def listed(model: str, asked: Asked | None, file: Path | None) -> Asked:
    """Return the prompts that were given, else those of the model's own file.

    Args:
        model: as it was named.
        asked: the given prompts.
        file: file of the model's own prompts.

    Raises:
        ValueError: neither.
    """
    if asked is not None:
        return asked
    if file is None:
        raise ValueError(
            f"model {model!r} has no default prompts: give --prompts, a list or a file with one "
            "prompt per line"
        )
    return read_prompts(file)


def compared_prompts(model: str, flow: steer.FlowMap, asked: Asked | None) -> Asked:
    """Return the prompts to compare: the given ones, else the model's own; "" without prompts.

    Raises:
        ValueError: a model that takes prompts, and none of them are given or its own.
    """
    file = own(model).compared
    if asked is None and file is None and not takes_prompts(flow):
        return Asked([""], None)
    return listed(model, asked, file)


def tuning_prompts(model: str, flow: steer.FlowMap, asked: Asked | None) -> Asked | None:
    """Return the tuning prompts: the given ones, else the model's own; None for a model without.

    Raises:
        ValueError: a model that takes prompts, and none of them are given or its own.
    """
    file = own(model).tuned
    if asked is None and file is None and not takes_prompts(flow):
        return None
    return listed(model, asked, file)
