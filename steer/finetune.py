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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.learn import learn, one_jump_scores
from steer.lora import (
    WEIGHTS,
    Adapted,
    adapt,
    load_adapters,
    rejoin,
    save_adapters,
)
from steer.noise import noise_dtype
from steer.objectives import names as objectives
from steer.objectives.policy import GRPO, NFT
from steer.objectives.reward import Objective
from steer.objectives.value import Value
from steer.reward import Reward, name_of, wrap

if TYPE_CHECKING:
    from steer.tune import RewardTuning
    from steer.watch import Panel

__all__ = ["Settings", "finetune", "spread"]


@dataclass(frozen=True)
class Settings:
    """How a tuning run is run.

    Attributes:
        rank: rank of the adapters.
        alpha: their update is scaled by alpha / rank. Default: 2 rank.
        targets: names of the adapted layers, or the ends of their names. Default: all linear
            layers and convolutions.
        learning_rate: of AdamW; after the warm-up it follows a cosine to zero.
        warm: steps of linear warm-up.
        batch_size: rows of an optimizer step, over all processes and micro-batches.
        micro_batch: rows of one call on one process. Default: a process's whole share.
        average: decay of the running average of the adapters.
        clip: largest norm of the gradient.
        check_prompts: prompts that are drawn at checks; give some that are not tuned on. Default:
            the first 16 tuned ones.
        check_samples: pictures of each.
        check_steps: composed jumps of a check's pictures.
        check_every: steps between checks; 0: no instruments.
        early_stop: end the run after so many checks in a row with an alarm; 0: never.
        save_every: steps between checkpoints.
        sweep: scales of the adapters at the end of the run; empty: no sweep.
        sweep_steps: for each of these numbers of jumps.
        precision: Lightning's; "auto" is bf16-mixed where the hardware has bf16, else 32-true.
        devices: processes.
        strategy: Lightning's: auto or ddp.
        accelerator: Lightning's: auto, cpu, gpu.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        wandb: also log to Weights & Biases, in this project.
        progress: whether to show a progress bar.
    """

    rank: int = 16
    alpha: float | None = None
    targets: list[str] | None = None
    learning_rate: float = 1e-3
    warm: int = 20
    batch_size: int = 16
    micro_batch: int | None = None
    average: float = 0.98
    clip: float = 1.0
    check_prompts: list[str] | None = None
    check_samples: int = 4
    check_steps: int = 1
    check_every: int = 50
    early_stop: int = 2
    save_every: int = 25
    sweep: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    sweep_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    precision: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    accelerator: str = "auto"
    checkpointing: bool = False
    wandb: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        least = {
            "rank": 1, "batch_size": 1, "check_samples": 1, "check_steps": 1, "save_every": 1,
            "devices": 1, "check_every": 0, "early_stop": 0, "warm": 0,
        }  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if any(k < 1 for k in self.sweep_steps):
            raise ValueError(f"sweep_steps must be at least 1 each, got {self.sweep_steps}")
        if any(name in self.strategy for name in ("fsdp", "deepspeed")):
            raise ValueError(
                f"strategy {self.strategy!r} splits the weights over processes, which checks and "
                "adapter files cannot take yet: use auto or ddp, where each process holds the base"
            )
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above zero, got {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1), got {self.average}")

    @property
    def micro(self) -> int:
        """Rows of one call on one process."""
        return self.micro_batch or max(1, self.batch_size // self.devices)


RUNTIME = {
    "precision", "devices", "strategy", "accelerator", "progress", "wandb", "micro_batch",
    "checkpointing", "sweep", "sweep_steps", "save_every", "check_every", "early_stop",
}  # fmt: skip
"""Settings that may differ when a run goes on: they change no draw."""


@torch.no_grad()
def spread(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    asked: Sequence[str] | None = None,
    seed: int = 0,
    *,
    most: int = 16,
) -> float:
    """Return the reward's standard deviation over one-jump samples of the same prompt.

    Root mean square over at most `most` prompts, 8 samples each; 128 samples without prompts.

    Raises:
        ValueError: the reward is the same for all samples.
    """
    values = one_jump_scores(flow, reward, prompts, asked, seed, most)
    deviation = float(values.var(1).mean().sqrt())
    if not deviation > 1e-8:
        raise ValueError(
            f"reward {name_of(reward)!r} is the same, {float(values[0, 0]):g}, for all one-jump "
            "samples of a prompt: it has no spread to set a temperature by, so give temperature, "
            "in the reward's units, or look at the reward"
        )
    return deviation


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
    from steer.tune import Prompts, RewardTuning

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

    from steer.watch import Panel, SaveAdapters, Watch

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
        from steer.folder import write_atomically

        write_atomically(out / "finished.json", json.dumps(ended, indent=1).encode())
        _card(out)


def _card(out: Path) -> None:
    """Write the model card, with a sheet of base beside tuned."""
    from steer.card import write_card

    sheets = sorted((out / "sheets").glob("[0-9]*.png"))
    if sheets:
        shutil.copyfile(sheets[-1], out / "grid.png")
    write_card(out)


def sweep(
    panel: "Panel", scales: Sequence[float], steps: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Read the instruments at each scale of the adapters and number of jumps: the front.

    Writes front.json, and front.png: the reward against diversity and drift.

    Args:
        panel: what is drawn and read.
        scales: of the adapters; 0 is the base.
        steps: composed jumps.
        out: the folder.
    """
    from steer.folder import write_atomically
    from steer.front import plot_front

    front = []
    for k in steps:
        for scale in scales:
            reading, alarms, _ = panel.read(scale, k, drift=k == min(steps))
            entry = {"scale": scale, "steps": k, "alarms": [a.name for a in alarms]}
            front.append(entry | reading.as_dict())
    write_atomically(out / "front.json", json.dumps(front, indent=1).encode())
    plot_front(front, out / "front.png")
    return front


def recommended(front: Sequence[Mapping[str, Any]]) -> float:
    """Return the scale that the judge likes best in the fewest steps among those without alarm.

    Without a judge: the largest without alarm.
    """
    fewest = min(entry["steps"] for entry in front)
    quiet = [e for e in front if e["steps"] == fewest and not e["alarms"]]
    if not quiet:  # the base, or the nearest to it
        return min(entry["scale"] for entry in front)
    return max(quiet, key=lambda e: e.get("judge", e["scale"]))["scale"]


def front_figures(front: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return base and tuned figures at the fewest steps, for the card."""
    from steer.watch import figures

    fewest = min(entry["steps"] for entry in front)
    best = recommended(front)
    return figures(next(e for e in front if e["steps"] == fewest and e["scale"] == best))


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


def _claim(out: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Make the run's folder, or go on with the run that is in it if it is the same one.

    Raises:
        FileExistsError: it is another one.
    """
    from steer.folder import write_atomically

    file = out / "run.json"
    content = json.dumps(identity, indent=1, ensure_ascii=False)
    if overwrite and out.exists():
        shutil.rmtree(out)
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(
                f"{out} exists already and holds no tuning run: choose another folder, or say "
                "overwrite (--overwrite on the command line) to replace it"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.encode())
        return
    before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(content)
    changed = [k for k in now if before.get(k) != now[k]]
    kept = ("checkpoints/last.ckpt", "finished.json", WEIGHTS)
    if changed and not any((out / name).exists() for name in kept):  # it never got anywhere
        shutil.rmtree(out)
        return _claim(out, identity, overwrite)
    if changed:
        was = "; ".join(f"{k}: {_short(before.get(k))} -> {_short(now[k])}" for k in changed)
        raise FileExistsError(
            f"{out} holds a run that was begun otherwise ({was}): choose another folder, give the "
            "same arguments to go on with it, or say overwrite to drop it"
        )


def _earlier(out: Path | None, name: str, overwrite: bool) -> Any:
    """Return what the run in this folder was begun with, None where there is none to go on."""
    file = None if out is None or overwrite else out / "run.json"
    if file is None or not file.exists():
        return None
    return json.loads(file.read_text(encoding="utf-8")).get(name)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else text[:57] + "..."
