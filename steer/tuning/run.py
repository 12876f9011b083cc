"""`steer.finetune`: tune the adapters of a flow map by a reward, in one call.

A run validates the request, estimates the reward's scale and standard deviation, adds the
adapters, runs Lightning's loop with the checks, and at the end evaluates reward and drift at
several scales of the adapters. An interrupted run resumes when it is called again.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steer.adapters.attach import has_adapters, parted
from steer.adapters.inject import rejoin
from steer.adapters.lora import Adapted
from steer.adapters.store import load_adapters
from steer.batches import Ceiling
from steer.devices import differentiating
from steer.doors import as_flow, as_reward
from steer.flow import FlowMap
from steer.objectives.batch import Objective
from steer.objectives.table import build, name_of
from steer.reward import Reward, at_rest, learners, plain
from steer.tuning.preview import Preview
from steer.tuning.prompts import Prompts
from steer.tuning.request import Tuning
from steer.tuning.run_folder import RunFolder
from steer.tuning.settings import Settings

if TYPE_CHECKING:
    from steer.training.stopping import Signals

__all__ = ["finetune", "tune"]


@plain(dtype=torch.float32)
def finetune(
    flow: FlowMap,
    reward: Reward | Callable[..., Tensor],
    prompts: Sequence[str] | None = None,
    objective: str | Objective = "direct",
    steps: int = 400,
    temperature: float | None = None,
    strength: float | None = None,
    judge: Reward | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    held_out: Mapping[str, Reward] | None = None,
    reward_prompts: Sequence[str] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Adapted:
    """Tune a LoRA on a flow map so that its plain samples follow a reward.

    Args:
        flow: the base: a network, no prompts bound, or a diffusers pipeline. It is never changed.
            Adapters that it already has (ours, or a LoRA that the pipeline has loaded) are tuned
            further: the base of the run includes them, and the result replaces them.
        reward: a Reward, or any callable on images (n, 3, h, w) and, optionally, prompts.
        prompts: what to tune on, or None for a flow without prompts.
        objective: a name of `steer.OBJECTIVES`, or an objective.
        steps: optimizer steps.
        temperature: what the reward is divided by, in its units; a lower temperature tunes more
            strongly.
        strength: instead of a temperature: the temperature is the reward's standard deviation over
            one-jump samples of the same prompt, divided by this. Default: 3.
        judge: a held-out reward, which is never optimised. The adapters with its highest score are
            kept in out/best.
        seed: seed of all random numbers.
        out: the run's folder; `steer.load(base, lora=out)` and peft read it. None: no files. An
            interrupted run resumes when it is called again with the same arguments. A finished run
            is loaded, and continued if `steps` is larger: the learning rates then follow the
            cosine of the new length. A reward is identified by its name and by the files, or the
            text in a script, that define it: an edited reward counts as another one.
        options: options of the objective, if it is given by name.
        held_out: name -> further held-out rewards, measured at checks.
        reward_prompts: the reward's prompt for each prompt, if it differs.
        overwrite: delete an earlier run in the folder, as soon as this one has saved something.
        **settings: attributes of `Settings`.

    Returns:
        The base with the adapters of the last step, at scale 1, in evaluation mode. It shares the
        tensors of the base.

    Raises:
        ValueError: an unknown objective, option or setting (with the nearest names), both
            temperature and strength, sizes that do not divide, a reward with standard deviation
            zero or without the gradient that the objective needs, a flow without layers to adapt.
        FileExistsError: the folder contains another run, or other files.
        BlockingIOError: another process writes to the folder.
        FloatingPointError: a reward or a loss that is not finite.
        KeyboardInterrupt: after SIGINT: the run ends after the current step, with its state saved.
            After SIGTERM it is a SystemExit of code 143.
    """
    flow, start = as_flow(flow), None
    if has_adapters(flow):
        flow, start = parted(flow)
    judge = None if judge is None else as_reward(judge)
    held_out = {name: as_reward(one) for name, one in (held_out or {}).items()}
    tuning = Tuning(
        flow, as_reward(reward), Prompts(prompts, reward_prompts, seed), build(objective, options),
        steps, temperature, strength, judge, held_out, seed, Settings.of(settings), start,
    )  # fmt: skip
    watched = [m for m in (judge, *tuning.held_out.values()) if isinstance(m, nn.Module)]
    for part in learners(tuning.reward):
        part.training = False  # constant, except when the run updates them
    with at_rest(flow, tuning.reward, *watched), differentiating():
        return tune(tuning, None if out is None else RunFolder(out, overwrite))


def tune(tuning: Tuning, folder: RunFolder | None = None) -> Adapted:
    """Run a request, resume it, or load its result; see `finetune`.

    Args:
        tuning: the request.
        folder: the run's folder; None: no files.
    """
    from steer.training.processes import is_first
    from steer.training.stopping import Signals

    first = is_first()
    signals = Signals(_nothing_left if folder is None else folder.left)
    held = folder.held() if folder is not None and first else nullcontext()
    with signals.heard(), held, Ceiling().held():
        return _tuned(tuning, folder, signals, first)


def _tuned(tuning: Tuning, folder: RunFolder | None, signals: "Signals", first: bool) -> Adapted:
    from steer.training.checkpoints import Checkpoints, usable
    from steer.training.log import KeepRows
    from steer.tuning.callbacks import onlookers
    from steer.tuning.ending import attend, end
    from steer.tuning.module import RewardTuning
    from steer.tuning.sharding import refuse_unshardable, whole
    from steer.tuning.trainer import device_of_run, fit, loggers, trainer_of

    settings = tuning.settings
    device = device_of_run(settings)
    tuned = tuning.adapted(device)
    if settings.sharded:
        refuse_unshardable(tuned)
    begun = {} if folder is None else folder.begun()
    temperature = tuning.calibrate(tuned.base, begun.get("temperature"))
    module = RewardTuning(
        tuned, tuning.objective, tuning.reward, tuning.prompts, steps=tuning.steps,
        batch_size=settings.batch_size, micro_batch=settings.micro, temperature=temperature,
        learning_rate=settings.learning_rate, warm=settings.warm, average=settings.average,
        seed=tuning.seed,
    )  # fmt: skip
    accumulate = module.accumulate(settings.devices)  # checked before a folder is created
    out = last = checkpoints = kept_rows = None
    logs: list[Any] = []
    if folder is not None:
        said = folder.claim(tuning.identity(temperature, module.base_sha256)) if first else ""
        if folder.finished:
            print(f"{folder.path} is finished")
            done = load_adapters(tuning.flow, folder.path)
            done.preview = _preview(tuning)
            return done
        out, checkpoints = folder.path, Checkpoints(folder.keep)
        found = usable(folder.checkpoints)
        last, step = found or (None, None)
        logs = loggers(out, settings.wandb, step)
        kept_rows = KeepRows(logs[0], step)
        if said:
            print(said)
    notes = tuning.notes(temperature, module.base_sha256)
    watch, saver, callbacks = onlookers(tuning, tuned, out, notes, signals, kept_rows)
    trainer = trainer_of(settings, tuning.steps, accumulate, callbacks, logs, checkpoints)
    if trainer.is_global_zero:
        print(_what(tuning, tuned, temperature, accumulate))
    if settings.sharded:
        tuning.bind(tuned)
    fit(trainer, module, last)
    tuned.to(device)  # Lightning has moved it to the CPU
    if watch is not None:  # a run that was killed after its last step has no final check
        watch.on_train_end(trainer, module)
    if trainer.is_global_zero:
        print(end(tuning, module, watch, saver, folder))
    elif settings.sharded:
        attend(tuning, module, watch, folder)
    if settings.sharded:
        tuned = whole(tuned, tuning.adapted(device))
    rejoin(tuned, tuning.flow)
    tuned.preview = _preview(tuning)
    return tuned.eval().requires_grad_(False)


def _preview(tuning: Tuning) -> Preview:
    asked = tuning.prompts
    return Preview(tuning.reward, asked.prompts, asked.asked, tuning.seed)


def _nothing_left() -> str:
    return "stopped, unfinished: without a folder nothing is saved, give out=..."


def _what(tuning: Tuning, tuned: Adapted, temperature: float, accumulate: int) -> str:
    """Return a line on the run that is about to start."""
    size, rows, count = tuning.settings.batch_size, tuning.settings.micro, tuning.settings.devices
    trained = sum(p.numel() for p in tuned.adapters().values())
    return (
        f"effective batch {size} = {rows} rows per call x {accumulate} accumulated x {count} "
        f"process{'es' if count > 1 else ''}; {tuning.steps} steps, temperature "
        f"{temperature:.4g}, {trained:,} trained parameters, objective {name_of(tuning.objective)}"
    )
