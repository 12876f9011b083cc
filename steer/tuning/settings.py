"""Settings of a tuning run, validated once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer.names import unknown
from steer.ranges import above, finite

__all__ = ["RENAMED", "RUNTIME", "Settings"]

RUNTIME = {
    "precision", "devices", "strategy", "accelerator", "progress", "wandb", "micro_batch",
    "checkpointing", "sweep", "sweep_steps", "save_every", "check_every", "early_stop",
}  # fmt: skip
"""Settings that may differ when a run is resumed, because they change no random numbers."""

RENAMED = {"clip": "gradient_clip"}
"""Earlier names of settings -> current names."""


@dataclass(frozen=True)
class Settings:
    """Settings of a tuning run.

    Attributes:
        rank: rank of the adapters.
        alpha: their update is scaled by alpha / rank. Default: 2 rank.
        targets: names of the adapted layers, or the ends of their names. Default: all linear
            layers and convolutions.
        learning_rate: learning rate of AdamW; after the warm-up it follows a cosine to zero.
        warm: steps of linear warm-up.
        batch_size: rows of an optimizer step, over all processes and micro-batches.
        micro_batch: rows of one call on one process. Default: all rows of the process, and 64 for
            the one-jump samples at the start of a run.
        average: decay of the running average of the adapters.
        gradient_clip: largest norm of the adapters' gradient.
        check_prompts: prompts that are sampled at checks; give some that are not used for tuning.
            Default: the first 16 tuning prompts.
        check_samples: pictures per prompt.
        check_steps: number of jumps for the pictures of a check.
        check_every: steps between checks; 0: no checks.
        early_stop: end the run after this many consecutive checks with an alarm; 0: never.
        save_every: steps between checkpoints.
        sweep: scales of the adapters that are evaluated at the end of the run; empty: no sweep.
        sweep_steps: numbers of jumps for the sweep. If neither is given, the scales are 0, .25,
            .5, .75 and 1 and the numbers of jumps 1, 2, 4 and 8, fewest first, as long as the
            sweep costs at most a tenth of the run's own network calls; a very short run has no
            sweep. If one of them is given, the sweep is done in full.
        precision: precision of Lightning; "auto" is bf16-mixed if the hardware has bf16, else
            32-true.
        devices: number of processes.
        strategy: strategy of Lightning: auto or ddp (each process holds the base), or fsdp (the
            denoiser's weights are sharded over the processes).
        accelerator: accelerator of Lightning: auto, cpu, gpu.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        wandb: also log to Weights & Biases, in this project.
        progress: show the progress: a bar in a terminal, else a line from time to time.
    """

    rank: int = 16
    alpha: float | None = None
    targets: list[str] | None = None
    learning_rate: float = 1e-3
    warm: int = 20
    batch_size: int = 16
    micro_batch: int | None = None
    average: float = 0.98
    gradient_clip: float = 1.0
    check_prompts: list[str] | None = None
    check_samples: int = 4
    check_steps: int = 1
    check_every: int = 50
    early_stop: int = 2
    save_every: int = 25
    sweep: list[float] | None = None
    sweep_steps: list[int] | None = None
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
        if any(k < 1 for k in self.sweep_steps or ()):
            raise ValueError(f"sweep_steps must be at least 1 each, got {self.sweep_steps}")
        from lightning.pytorch.strategies import StrategyRegistry

        known = ("auto", "ddp", "fsdp")
        splits = "deepspeed" in self.strategy or ("fsdp" in self.strategy and not self.sharded)
        if self.strategy not in {*known, *StrategyRegistry} and not splits:
            raise unknown("strategy", self.strategy, known)
        if splits:
            raise ValueError(
                f"strategy {self.strategy!r} splits the weights over processes in a way that "
                "checks and adapter files cannot take: use fsdp, or auto or ddp, where each "
                "process holds the base"
            )
        for name in ("learning_rate", "gradient_clip"):
            above(name, getattr(self, name))
        if self.alpha is not None:
            above("alpha", self.alpha)
        for scale in self.sweep or ():
            finite("sweep", scale)
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be in [0, 1), got {self.average}")

    @property
    def sharded(self) -> bool:
        """Whether the base is sharded over the processes, so that all of them make each call."""
        return self.strategy == "fsdp"

    @property
    def micro(self) -> int:
        """Rows of one call on one process."""
        return self.micro_batch or max(1, self.batch_size // self.devices)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Settings":
        """Return the settings of these names.

        Raises:
            ValueError: an unknown name (the message has similar ones, or the new name of an old
                one); a number out of its range.
        """
        known = cls.__dataclass_fields__
        for name in settings:
            if name not in known:
                raise unknown("setting", name, known, RENAMED)
        return cls(**settings)
