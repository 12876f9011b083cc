"""`steer.finetune`: tune the adapters of a flow map by a reward, in one call.

The recipe of a run: probe the temperature, put adapters on, run Lightning's loop with the
instruments on, and at the end draw the front of reward against drift by a sweep of the adapters'
scale. A run that stopped goes on from its last checkpoint when it is called again.
"""

import importlib.util
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.adapters.inject import adapt, rejoin
from steer.adapters.lora import Adapted
from steer.adapters.store import load_adapters, save_adapters
from steer.flow import FlowMap
from steer.noise import noise_dtype
from steer.objectives import table as objectives
from steer.objectives.batch import Objective
from steer.objectives.policy import GRPO, NFT
from steer.objectives.value import Value
from steer.reward import Reward, name_of, wrap
from steer.sampling.calibrate import learn

if TYPE_CHECKING:
    from steer.tuning.module import RewardTuning
from steer.tuning.claim import _claim, _earlier
from steer.tuning.settings import RUNTIME, Settings
from steer.tuning.spread import spread
from steer.tuning.sweep import front_figures, recommended, sweep

__all__ = ["finetune"]


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
        flow: the base: a network, no prompts bound. It is never changed.
        reward: a Reward, or any callable on images (n, 3, h, w) and, if it wants them, prompts.
        prompts: what to tune on, or None for a flow without prompts.
        objective: a name of `steer.OBJECTIVES`, or an objective.
        steps: optimizer steps.
        temperature: what the reward is divided by, in its units; lower tunes harder.
        strength: instead: the temperature is the reward's standard deviation over one-jump samples
            of the same prompt, divided by this. Default: 3.
        judge: what says whether the pictures became better: it is never tuned for. The best
            adapters by it are kept in out/best.
        seed: keys all that is drawn.
        out: the run's folder; `steer.load(base, lora=out)` and peft read it. None: no files. A run
            that stopped goes on when it is called again with the same arguments; a finished one
            is loaded. A reward is known by its name: give functions names of their own.
        options: the objective's own, where it is given by name.
        held_out: name -> rewards that are not tuned for, read at checks.
        reward_prompts: what the reward is asked for each prompt, where that differs.
        overwrite: drop an earlier run in the folder.
        **settings: those of `Settings`.

    Returns:
        The base with the adapters of the last step, at scale 1, in evaluation mode. It shares the
        base's tensors.

    Raises:
        ValueError: an unknown objective, option or setting (with the nearest names), temperature
            and strength both, sizes that do not divide, a reward without spread or without the
            gradient that the objective needs, a flow without layers to adapt.
        FileExistsError: the folder holds another run, or something else.
        FloatingPointError: a reward or a loss that is not finite.
    """
    from steer.names import unknown

    for name in settings:
        if name not in Settings.__dataclass_fields__:
            raise unknown("setting", name, Settings.__dataclass_fields__)
    chosen = Settings(**settings)
    reward = wrap(reward)
    rule = objectives.build(objective, options)
    if temperature is not None and strength is not None:
        raise ValueError("temperature and strength both given: give one of them")
    for name, number in (("temperature", temperature), ("strength", strength)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name} must be a number above zero, got {number}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if isinstance(flow, Adapted):
        raise ValueError(
            "this flow has adapters already: tune its base, or steer.lora.merged(flow), which is "
            "a plain flow"
        )
    if isinstance(prompts, str):
        raise TypeError(f"prompts are a list: write prompts=[{prompts!r}]")
    prompts = None if prompts is None else list(prompts)
    folder = None if out is None else Path(out)
    learn(flow, reward, prompts, reward_prompts, seed)
    if temperature is None and (temperature := _earlier(folder, "temperature", overwrite)) is None:
        temperature = spread(flow, reward, prompts, reward_prompts, seed) / (strength or 3.0)
    from steer.tuning.module import RewardTuning
    from steer.tuning.prompts import Prompts

    tuned = adapt(flow, chosen.rank, chosen.alpha, targets=chosen.targets, seed=seed)
    tuned.checkpoint = chosen.checkpointing
    module = RewardTuning(
        tuned, rule, reward, Prompts(prompts, reward_prompts, seed), steps=steps,
        batch_size=chosen.batch_size, micro_batch=chosen.micro, temperature=temperature,
        learning_rate=chosen.learning_rate, warm=chosen.warm, average=chosen.average, seed=seed,
    )  # fmt: skip
    module.accumulate(chosen.devices)  # what does not fit is refused before a folder is made
    identity = {
        "objective": objectives.name_of(rule), "options": objectives.options_of(rule),
        "reward": name_of(reward), "prompts": prompts, "reward_prompts": reward_prompts,
        "temperature": temperature, "strength": strength, "seed": seed, "base": flow.name,
        "calls": [chosen.micro, chosen.devices] if type(rule) in PER_CALL else None,
        "base_sha256": module.base_sha256,
        "steps": steps, "settings": {k: v for k, v in asdict(chosen).items() if k not in RUNTIME},
    }  # fmt: skip
    if folder is not None:
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        if not getattr(rank_zero_only, "rank", 0):  # the first process, whoever started them
            _claim(folder, identity, overwrite)
        if (folder / "finished.json").exists():
            print(f"{folder} is finished")
            return load_adapters(flow, folder)
    _run(module, flow, reward, judge, held_out or {}, folder, chosen, identity)
    return tuned.eval().requires_grad_(False)


def _run(
    module: "RewardTuning",
    flow: FlowMap,
    reward: Reward,
    judge: Reward | None,
    held_out: Mapping[str, Reward],
    out: Path | None,
    chosen: Settings,
    identity: Mapping[str, Any],
) -> None:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar

    from steer.tuning.callbacks import SaveAdapters, Watch
    from steer.tuning.panel import Panel

    tuned, steps, temperature = module.tuned, module.steps, module.temperature
    prompts, asked, seed = module.prompts.prompts, module.prompts.asked, module.seed
    accumulate = module.accumulate(chosen.devices)
    metadata = {
        "reward": name_of(reward), "objective": identity["objective"],
        "options": identity["options"], "prompts": (prompts or [])[:8],
        "prompt_count": len(prompts or []), "temperature": temperature, "seed": seed,
        "batch": chosen.batch_size, "settings": identity["settings"],
        "base_sha256": identity["base_sha256"],
    }  # fmt: skip
    watch: Watch | None = None
    callbacks: list[L.Callback] = []
    looks = chosen.check_every > 0 and _has_pictures(tuned)
    if looks:
        check, questions = chosen.check_prompts, chosen.check_prompts
        if check is None and prompts is not None:
            check, questions = prompts[:16], list(asked or prompts)[:16]
        panel = Panel(
            tuned, check if prompts is not None else None, chosen.check_samples, reward,
            judge=judge, held_out=held_out, asked=questions, seed=seed,
        )  # fmt: skip
        watch = Watch(
            panel, out, chosen.check_every, steps=chosen.check_steps,
            early_stop=chosen.early_stop, metadata=metadata,
        )  # fmt: skip
        callbacks.append(watch)
    if chosen.progress:
        callbacks.append(RichProgressBar())
    if out is not None:
        saver = SaveAdapters(tuned, out, chosen.save_every, metadata)
        callbacks += [
            saver,
            ModelCheckpoint(
                out / "checkpoints", filename="last", every_n_train_steps=chosen.save_every,
                save_top_k=1, enable_version_counter=False,
            ),
        ]  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=chosen.accelerator,
        devices=chosen.devices,
        strategy=chosen.strategy,
        precision=_precision(chosen),  # type: ignore[arg-type]
        accumulate_grad_batches=accumulate,
        gradient_clip_val=chosen.clip,
        use_distributed_sampler=False,
        logger=_loggers(out, chosen) if out is not None else False,
        callbacks=callbacks,
        enable_checkpointing=out is not None,
        enable_progress_bar=chosen.progress,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    m, devices = chosen.micro, chosen.devices
    trainable = sum(p.numel() for p in tuned.adapters().values())
    line = (
        f"effective batch {chosen.batch_size} = {m} rows a call x {accumulate} accumulated x "
        f"{devices} process{'es' if devices > 1 else ''}; {steps} steps, temperature "
        f"{temperature:.4g}, {trainable:,} trained parameters, objective {identity['objective']}"
    )
    if trainer.is_global_zero:
        print(line)
    last = None if out is None else out / "checkpoints" / "last.ckpt"
    resumed = last is not None and last.exists()
    with warnings.catch_warnings():
        for known in (
            "Found .* in eval mode",  # so that nothing is dropped out
            "You're resuming from a checkpoint that ended before the epoch",  # batches are keyed
            "Checkpoint directory .* exists",  # it is the run's own
            "The '.*' does not have many workers",  # the loader only counts
        ):
            warnings.filterwarnings("ignore", known)
        trainer.fit(
            module, module.loader(), ckpt_path=last if resumed else None, weights_only=True
        )
    rejoin(tuned, flow)  # Lightning has moved it to the CPU
    if out is not None and trainer.is_global_zero:
        done = module.global_step
        saver.save(done)
        ended = {"steps": steps, "done": done, "nfe": module.nfe} | {
            "reward_calls": module.reward_calls,
            "stopped": watch.stopped if watch is not None else "",
            "watch_seconds": watch.seconds if watch is not None else 0.0,
        }
        if watch is not None and chosen.sweep and chosen.sweep_steps:
            front = sweep(watch.panel, chosen.sweep, chosen.sweep_steps, out)
            metadata["scale"] = recommended(front)
            metadata["figures"] = front_figures(front)
            save_adapters(tuned, out, {**metadata, "steps": done})
        from steer.files import write_atomically

        write_atomically(out / "finished.json", json.dumps(ended, indent=1).encode())
        _card(out)


def _card(out: Path) -> None:
    """Write the model card, with a sheet of base beside tuned."""
    from steer.adapters.card import write_card

    sheets = sorted((out / "sheets").glob("[0-9]*.png"))
    if sheets:
        shutil.copyfile(sheets[-1], out / "grid.png")
    write_card(out)


PER_CALL = (NFT, GRPO, Value)

"""Objectives whose loss depends, a little, on which rows are in one call."""


def _has_pictures(tuned: Adapted) -> bool:
    with torch.no_grad():
        some = next(iter(tuned.flow.parameters()))
        shape = tuned.decode(
            torch.zeros(1, *tuned.event_shape, device=some.device, dtype=noise_dtype(tuned))
        ).shape
    return len(shape) == 4 and shape[1] == 3


def _precision(chosen: Settings) -> str:
    if chosen.precision != "auto":
        return chosen.precision
    on_gpu = chosen.accelerator != "cpu" and torch.cuda.is_available()
    has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if has_bf16 else "32-true"


def _loggers(out: Path, chosen: Settings) -> list[Any]:
    """CSV always, TensorBoard where it is installed, Weights & Biases where it is asked for."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    loggers: list[Any] = [CSVLogger(out, name="log", flush_logs_every_n_steps=10)]
    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        loggers.append(TensorBoardLogger(out, name="tensorboard", version=""))
    if chosen.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise ImportError(
                f"wandb={chosen.wandb!r} needs Weights & Biases: pip install wandb, or leave "
                "wandb out; CSV and TensorBoard are written anyway"
            )
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project=chosen.wandb, save_dir=out, name=out.name))
    return loggers
