"""`steer finetune`: tune a LoRA on a flow map by rewards, with instruments against hacking."""

from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Any

import steer
from recipes.defaults import judge_of, named, own, reward_of, tuning_prompts
from recipes.inputs import Dtype, file_or_list, load_model, read_prompts
from recipes.planned import say_memory
from recipes.terminal import console
from steer.objectives.table import described
from steer.secrets import redacted
from steer.tuning.settings import Settings

__all__ = ["finetune", "named", "options_help"]


def finetune(
    model: str = "emoji",
    reward: str | None = None,
    prompts: str | list[str] | None = None,
    objective: str = "direct",
    options: dict[str, Any] = {},  # noqa: B006
    steps: int = 400,
    temperature: float | None = None,
    strength: float | None = None,
    judge: str | None = "own",
    held_out: list[str] = [],  # noqa: B006
    check_prompts: str | list[str] | None = None,
    seed: int = 0,
    out: Path = Path("runs/tuned"),
    overwrite: bool = False,
    lora: Path | None = None,
    lora_scale: float | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    compile: bool | str = False,
    model_options: dict[str, Any] = {},  # noqa: B006
    **settings: Any,
) -> steer.Adapted:
    """Tune adapters so that the model's plain samples follow rewards.

    The run's folder holds the adapters (peft reads it), best/ (those with the judge's highest
    score), sheets/, readings.jsonl, front.png and front.json (a sweep of the adapters' scale),
    logs, a model card, and what a stopped run needs to go on: give the same command again.

    Args:
        model: a name that `steer models` lists, a folder, a hub id, or file.py:Name.
        reward: a name that `steer rewards` lists, a weighted sum of names, or file.py:Name.
            Default: the model's own, clip for emoji.
        prompts: a text or jsonl file, or a list. Default: the model's own, 200 for emoji.
        objective: a name that `steer objectives` lists.
        options: options of the objective, as '{name: value}'; they are listed below.
        steps: optimizer steps; an existing run, finished or not, is continued if only this number
            has grown.
        temperature: what the reward is divided by, in its units; a lower temperature tunes more
            strongly.
        strength: instead of a temperature: the standard deviation of the reward divided by this
            number is the temperature (default 3).
        judge: the held-out reward: "own", the model's if it has one; "embedded", that of emoji;
            the folder of a judge, a reward by name, or null for none.
        held_out: further held-out rewards, measured at checks.
        check_prompts: a file or a list of prompts for the checks. Default: 16 of the model's own
            that are not used for tuning, else the first tuning prompts.
        seed: seed of all random numbers.
        out: the run's folder.
        overwrite: delete an earlier run in the folder, as soon as this one has saved something.
        lora: adapters to tune further, a folder or a pipeline's LoRA file; the adapters of the run
            include and replace them.
        lora_scale: their scale at the start (default 1).
        device: device on which the model is loaded: "cuda" loads a pipeline directly there, in
            bfloat16. Default: the CPU; Lightning then moves the model.
        dtype: precision of the model's own weights, which are not trained; adapters are float32.
            Default: float32; bfloat16 for a pipeline that is not on the CPU.
        compile: compile the blocks that the network repeats (torch.compile), or the name of
            torch's backend for it; the first calls take longer.
        model_options: options for a diffusers pipeline: height, width, cfg, guidance,
            negative_prompt, checkpointing, call and the others of `steer.load`.
        **settings: how the run is run.
    """
    chosen = Settings(**settings)
    text = reward_of(model, reward)
    if chosen.accelerator != "cpu":
        say_memory(
            console(), model, text, device or "cuda", rows=chosen.micro, objective=objective,
            tuning=True, rank=chosen.rank, targets=chosen.targets, dtype=dtype,
            devices=chosen.devices, strategy=chosen.strategy,
            model_options={"checkpointing": chosen.checkpointing, **model_options},
        )  # fmt: skip
    scorer = named(text)
    flow = load_model(model, device, dtype, lora, lora_scale, model_options, compile)
    asked = tuning_prompts(model, flow, file_or_list(prompts))
    checked = file_or_list(check_prompts)
    checks = None if checked is None else checked.prompts
    held = own(model).held_out
    if checked is None and prompts is None and held is not None:  # own prompts
        every = read_prompts(held).prompts
        checks = every[:: len(every) // 16][:16]
    known = asdict(chosen) | {"check_prompts": checks}
    return steer.finetune(
        flow, scorer, asked and asked.prompts, objective, steps, temperature, strength,
        judge_of(model, judge, console()), seed, out, options=options,
        held_out={redacted(name): named(name) for name in held_out},
        reward_prompts=asked and asked.reward_prompts, overwrite=overwrite, **known,
    )  # fmt: skip


def options_help() -> str:
    """Return the help on `--options` of each objective, from the docstring of its class."""
    lines = ["what --options may hold, by objective:"]
    for name in steer.OBJECTIVES:
        lines += ["", f"  {name}"]
        for option, (default, text) in described(name).items():
            lines += wrap(
                f"{option} (default {default}): {text}", 98,
                initial_indent="    ", subsequent_indent="      ",
            )  # fmt: skip
    return "\n".join(lines)
