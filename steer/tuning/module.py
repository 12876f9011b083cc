"""Lightning module that tunes a flow map's adapters by a reward: average, counts, exact resume.

Student and teacher are one network, with its adapters on and off. All random numbers of step k are
a function of (seed, k, row): they do not depend on micro-batches, processes and restarts. Import
it by name: `import steer` does not load Lightning.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from steer.adapters.fingerprint import fingerprint
from steer.adapters.lora import Adapted
from steer.noise import Draws, noise_dtype
from steer.objectives.batch import Batch, Objective, refuse_not_finite
from steer.reward import Reward, learners
from steer.sampling.counts import CountedReward
from steer.training.average import follow
from steer.training.optim import warm_cosine
from steer.tuning.counts import Metered, TuningCounts
from steer.tuning.halving import Halving, advice
from steer.tuning.prompts import Prompts

__all__ = ["AVERAGE", "RewardTuning"]

AVERAGE = "average"
"""The adapters that hold the running average."""


class RewardTuning(L.LightningModule):
    """Tune the adapters of a flow by an objective, keeping their running average.

    Args:
        tuned: the flow with adapters; they are changed in place.
        objective: what the reward does to them.
        reward: in its own units.
        prompts: the prompts of each step.
        steps: optimizer steps of the run.
        batch_size: rows of an optimizer step, over all processes and micro-batches.
        micro_batch: rows of one call on one process.
        temperature: what the reward is divided by.
        learning_rate: of AdamW.
        warm: steps of linear warm-up; the rate then follows a cosine to zero.
        average: decay of the running average (shorter at the start).
        seed: with the step and the row, it determines all random numbers.

    Raises:
        ValueError: sizes that do not divide, or an objective that needs a gradient that the reward
            does not have.
    """

    strict_loading = False  # checkpoints hold only the adapters

    def __init__(
        self,
        tuned: Adapted,
        objective: Objective,
        reward: Reward,
        prompts: Prompts,
        *,
        steps: int,
        batch_size: int,
        micro_batch: int,
        temperature: float,
        learning_rate: float = 1e-3,
        warm: int = 20,
        average: float = 0.98,
        seed: int = 0,
    ) -> None:
        super().__init__()
        group = objective.group
        if objective.differentiable and not reward.differentiable:
            raise ValueError(
                f"objective {type(objective).__name__.lower()!r} needs the reward's gradient, and "
                "the reward is declared not differentiable: take nft or grpo, which need values "
                "alone, or a differentiable reward"
            )
        if micro_batch % group:
            raise ValueError(
                f"{micro_batch} rows a call are not whole groups of {group} rows a prompt, which "
                f"this objective compares: make it a multiple of {group}"
            )
        for p in tuned.adapters().values():
            p.requires_grad_(True)
        if not tuned.adapters(AVERAGE):
            tuned.add(AVERAGE)
        self.tuned, self.objective = tuned, objective
        self.counts = TuningCounts()
        self._reward = [CountedReward(reward, self.counts)]  # a list: not a submodule
        self.prompts, self.steps, self.seed = prompts, steps, seed
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.temperature, self.decay = temperature, average
        self.learning_rate, self.warm = learning_rate, warm
        self._terms: list[dict[str, Tensor]] = []
        self._seen: list[tuple[Tensor, Sequence[str] | None]] = []
        self._micro = 0
        self._halving = Halving(self)

    @property
    def reward(self) -> Reward:
        """The reward, counted."""
        return self._reward[0]

    @cached_property
    def base_sha256(self) -> str:
        """The hash of the base's weights, which never change."""
        return fingerprint(self.tuned)

    @property
    def nfe(self) -> int:
        """The cost of the run so far, over all processes, which all have the same cost."""
        return self.counts.nfe * (1 if self._trainer is None else self.trainer.world_size)

    @property
    def reward_calls(self) -> int:
        """Number of reward calls by the objective, over all processes."""
        return self.counts.reward * (1 if self._trainer is None else self.trainer.world_size)

    @property
    def between_steps(self) -> bool:
        """Whether no micro-batch of an unfinished step has been processed."""
        return self._micro == 0

    def loader(self) -> DataLoader:
        """Return a loader that only counts: the data of a step is a function of its index."""
        return DataLoader(range(self.steps * self.accumulate()), batch_size=None)  # type: ignore[arg-type]

    def accumulate(self, processes: int | None = None) -> int:
        """Return the number of micro-batches per optimizer step on each process."""
        count = processes or (self.trainer.world_size if self._trainer is not None else 1)
        if self.batch_size % (self.micro_batch * count):
            raise ValueError(
                f"a batch of {self.batch_size} rows does not split into calls of "
                f"{self.micro_batch} rows on {count} processes: make it a multiple of "
                f"{self.micro_batch * count}"
            )
        return self.batch_size // (self.micro_batch * count)

    def batch(self, step: int, first: int, last: int) -> Batch:
        """Return rows first to last of a step's batch, its flows bound to their prompts."""
        group = self.objective.group
        draws = Draws(
            self.seed, step, (first, last), device=self.device, dtype=noise_dtype(self.tuned)
        )
        start = step * self.batch_size
        places = (start + first) // group, (start + last) // group
        names, asked = self.prompts(*places)

        # once: student, base and average are views of one bound flow
        flow = self.tuned if names is None else self.tuned.given(names)
        views = flow, flow.base, flow.at(1.0, AVERAGE), self.tuned.base
        student, base, mean, unbound = (
            Metered(view, self.counts, trained=view is flow) for view in views
        )
        return Batch(
            student, base, mean, self.reward, self.temperature, draws, names, asked, unbound,
            None if names is None else self.prompts.epochs(*places),
        )  # fmt: skip

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of the micro-batch that is this process's turn."""
        m = self.micro_batch
        first = (self._micro * self.trainer.world_size + self.trainer.global_rank) * m
        self._micro += 1
        if Halving.applies(self.objective, self._sharded):
            loss, terms, seen = self._halving.loss(self.global_step, first, first + m)
        else:
            loss, terms, seen = self._whole(self.global_step, first, first + m)
        self._seen += seen
        self._terms.append(terms)
        return loss

    @property
    def _sharded(self) -> bool:
        return bool(getattr(self.trainer.strategy, "splits", False))

    def _whole(self, step: int, first: int, last: int) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Return loss, terms and rewards of rows that must be in one call.

        Raises:
            torch.OutOfMemoryError: too little memory; the message says what to do.
        """
        drawn = self.batch(step, first, last)
        try:
            terms = self.objective(drawn)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{error}\n{advice(self.objective, last - first, self._sharded)}"
            ) from error
        kept = {name: value.detach().float() for name, value in terms.items()}
        return terms["loss"], kept, drawn.seen

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Take the backward pass.

        Raises:
            torch.OutOfMemoryError: too little memory; the message says what to do.
        """
        try:
            super().backward(loss, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            rows = self.micro_batch
            raise torch.OutOfMemoryError(
                f"{error}\n{advice(self.objective, rows, self._sharded)}"
            ) from error

    def on_before_backward(self, loss: Tensor) -> None:
        """Count weight gradients from here on."""
        self.counts.learning = True

    def on_after_backward(self) -> None:
        """Stop counting weight gradients."""
        self.counts.learning = False

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the step's terms, their mean over its micro-batches and processes.

        The device is read only once, for the terms and for whether all values are finite.

        Raises:
            FloatingPointError: a reward, the loss or the gradient is not finite; no step is taken.
        """
        gradients = [p.grad for p in self.tuned.adapters().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).reshape(1)
        names = list(self._terms[0])
        own = torch.stack([torch.stack([t[n] for n in names]) for t in self._terms]).mean(0)
        values = self.trainer.strategy.reduce(own.clone(), reduce_op="mean")
        bad = [(~torch.isfinite(v)).any().reshape(1) for v, _ in self._seen]
        parts = [values, own[names.index("loss")].reshape(1), norm, *bad]
        read = torch.cat([part.float() for part in parts]).tolist()
        loss, length, *flags = read[len(names) :]
        self._refuse(loss, length, flags)
        terms = dict(zip(names, read, strict=False)) | {"gradient": length}
        self._terms, self._seen, self._micro = [], [], 0
        for part in learners(self.reward):
            part.update(self._summed)
        step = self.global_step + 1
        costs = {"nfe": float(self.nfe), "reward_calls": float(self.reward_calls)}
        for logger in self.trainer.loggers:  # a tenth of the cost of self.log
            logger.log_metrics({f"train/{k}": v for k, v in terms.items()} | costs, step)
        if "reward" in names:  # kept on the device, which the bar reads at intervals
            self.log("reward", values[names.index("reward")], prog_bar=True, logger=False)

    def _refuse(self, loss: float, length: float, bad: Sequence[float]) -> None:
        for flag, (values, texts) in zip(bad, self._seen, strict=True):
            if flag:
                refuse_not_finite(values, texts)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.global_step} is {loss}: lower learning_rate, raise the "
                "temperature or a penalty; the last checkpoint is intact"
            )
        if not math.isfinite(length):
            raise FloatingPointError(
                f"the gradient of step {self.global_step} is not finite, though the loss is: look "
                "at the reward's square roots, logarithms and divisions at flat pictures; the "
                "last checkpoint is intact"
            )

    def _summed(self, noted: Tensor) -> Tensor:
        """Sum what a reward's scale has recorded over processes."""
        if self.trainer.world_size == 1:
            return noted
        return self.trainer.strategy.reduce(noted.to(self.device), reduce_op="sum")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make an optimizer step, then update the running average of the adapters.

        It is updated here and not at the end of the batch, because checkpoints are written before
        that.
        """
        k = self.global_step + 1
        super().optimizer_step(*args, **kwargs)
        old, new = self.tuned.adapters(AVERAGE), self.tuned.adapters()
        follow(old.values(), new.values(), self.decay, k)

    def configure_optimizers(self) -> Any:
        """Return AdamW without weight decay, `warm` steps of warm-up, then a cosine to zero."""
        optimizer = torch.optim.AdamW(
            self.tuned.adapters().values(),
            lr=self.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        schedule = warm_cosine(optimizer, self.steps, max(1, self.warm))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_start(self) -> None:
        """Take the rates from this run's schedule: an earlier run may have been shorter."""
        schedule: Any = self.lr_schedulers()
        places = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas,
                     strict=True)  # fmt: skip
        for group, base, rate in places:
            group["lr"] = base * rate(schedule.last_epoch)

    def on_fit_start(self) -> None:
        """Move the reward, which is not a submodule, to the flow's device."""
        self.reward.to(self.device)
        for part in learners(self.reward):
            part.forget()
            part.training = True  # from here on it records the objective's scores

    def on_fit_end(self) -> None:
        """Keep the reward's scales constant from here on."""
        for part in learners(self.reward):
            part.forget()
            part.training = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save adapters, the objective's state, counts and generators, but not the base."""
        state = checkpoint["state_dict"]
        kept = {k: v for k, v in state.items() if "lora_" in k or k.startswith("objective.")}
        checkpoint["state_dict"] = kept
        checkpoint["base"] = {"name": self.tuned.name, "sha256": self.base_sha256}
        checkpoint["counts"] = asdict(self.counts)
        checkpoint["scales"] = [part.statistics.clone() for part in learners(self.reward)]
        checkpoint["generators"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            checkpoint["generators"]["cuda"] = torch.cuda.get_rng_state_all()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, else restore its state.

        Raises:
            ValueError: it was made with other weights.
        """
        theirs = checkpoint["base"]
        if theirs["sha256"] != self.base_sha256:
            raise ValueError(
                f"the checkpoint was made on {theirs['name']!r} with weights "
                f"{theirs['sha256'][:12]}, and this base, {self.tuned.name!r}, has other weights "
                f"({self.base_sha256[:12]}): resume with the same base, or choose another folder"
            )
        for name, value in checkpoint["counts"].items():
            setattr(self.counts, name, value)
        for part, statistics in zip(
            learners(self.reward), checkpoint.get("scales", []), strict=True
        ):
            part.statistics = statistics.to(part.statistics)
        torch.set_rng_state(checkpoint["generators"]["cpu"].cpu())
        if torch.cuda.is_available() and "cuda" in checkpoint["generators"]:
            torch.cuda.set_rng_state_all(checkpoint["generators"]["cuda"])
