"""Lightning callbacks of a tuning run: instruments, sheets, the best adapters, an early stop.

Everything is drawn from fixed noise for fixed prompts that are not tuned on, base beside tuned.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from steer.folder import Row, captioned_grid, write_atomically
from steer.instruments import Alarm, Drift, Instruments, Reading, velocity_distance
from steer.lora import Adapted, save_adapters
from steer.noise import Noise, noise_dtype
from steer.reward import Reward, dissect, learners

__all__ = ["Panel", "SaveAdapters", "Watch"]

ROWS = 64
"""Rows of one network call when pictures are drawn for a check."""


class Panel:
    """Fixed prompts and fixed noise, and the base's pictures of them for each number of steps.

    Args:
        tuned: the flow with its adapters.
        prompts: what is drawn; None for a flow without prompts.
        samples: pictures of each prompt.
        reward: what is tuned for.
        judge: what is not.
        held_out: further rewards that are not tuned for.
        asked: what the rewards are asked, where that differs.
        seed: fixes the noise.
    """

    def __init__(
        self,
        tuned: Adapted,
        prompts: Sequence[str] | None,
        samples: int,
        reward: Reward,
        *,
        judge: Reward | None = None,
        held_out: Mapping[str, Reward] | None = None,
        asked: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.tuned, self.samples = tuned, samples
        self.prompts = None if prompts is None else list(prompts)
        self.asked = list(asked or self.prompts or [""])
        self.reward, self.judge, self.held_out = reward, judge, dict(held_out or {})
        p = 1 if prompts is None else len(prompts)
        noise = Noise(seed, range(p), samples, step="panel", dtype=noise_dtype(tuned))
        self.x_0 = noise.normal(tuned.event_shape)
        self._instruments: dict[int, Instruments] = {}
        self.base: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the flow is now."""
        return next(iter(self.tuned.parameters())).device

    @torch.no_grad()
    def draw(self, scale: float = 1.0, steps: int = 1) -> Tensor:
        """Draw the pictures (p * n, 3, h, w) by so many composed jumps."""
        flow, n = self.tuned.at(scale), self.samples
        group = max(1, ROWS // n)  # prompts of one call
        names = self.prompts or [""]
        parts = []
        for a in range(0, len(names), group):
            some = names[a : a + group]
            x = self.x_0[a * n : (a + len(some)) * n].to(self.device)
            bound = flow if self.prompts is None else flow.given(some)
            for k in range(steps):
                x = bound.jump(x, k / steps, (k + 1) / steps)
            parts.append(flow.decode(x).float())
        return torch.cat(parts)

    def instruments(self, steps: int = 1) -> Instruments:
        """Return the instruments, built on the base's pictures by so many steps."""
        if steps not in self._instruments:
            for reward in (self.reward, self.judge, *self.held_out.values()):
                if reward is not None:
                    reward.to(self.device)
            self.base[steps] = self.draw(0.0, steps)
            self._instruments[steps] = Instruments(
                self.base[steps], self.asked, self.reward, judge=self.judge, held_out=self.held_out
            )
        return self._instruments[steps]

    def read(
        self, scale: float = 1.0, steps: int = 1, drift: bool = False
    ) -> tuple[Reading, list[Alarm], Tensor]:
        """Draw, and return the reading, its alarms, and the pictures."""
        instruments = self.instruments(steps)
        images = self.draw(scale, steps)
        reading = instruments.read(images, self.drift(scale) if drift else None)
        return reading, instruments.alarms(reading), images

    def drift(self, scale: float = 1.0, prompts: int = 8) -> Drift:
        """Return how far velocity and jump are from the base's, one noise for each prompt."""
        flow, base, x = self.tuned.at(scale), self.tuned.base, self.x_0[:: self.samples][:prompts]
        if self.prompts is None:
            x = self.x_0[:prompts]
        else:
            names = self.prompts[:prompts]
            flow, base = flow.given(names), base.given(names)
        return velocity_distance(flow, base, x.to(self.device))

    def terms(self, images: Tensor) -> dict[str, float]:
        """Return each term's mean score and mean share of the gradient, of a composed reward.

        `term/NAME` is in the term's own units, `gradient/NAME` is the norm of what the term adds
        to the whole reward's gradient with respect to a picture.
        """
        asked = [text for text in self.asked for _ in range(self.samples)]
        scores, gradients = dissect(self.reward, images, asked, ROWS)
        return {f"term/{k}": float(v.mean()) for k, v in scores.items()} | {
            f"gradient/{k}": float(v.mean()) for k, v in gradients.items()
        }

    def sheet(self, images: Tensor, steps: int, shown: int = 8) -> list[Row]:
        """Return the rows of a sheet: the base's pictures of a prompt, the tuned ones below."""
        n = self.samples
        rows: list[Row] = []
        for i, prompt in enumerate((self.prompts or [""])[:shown]):
            part = slice(i * n, (i + 1) * n)
            for whose, pictures in (("base", self.base[steps]), ("tuned", images)):
                scores = self.reward(pictures[part], [self.asked[i]] * n).tolist()
                rows.append((f"{prompt!r} {whose}", pictures[part], [f"{s:.3g}" for s in scores]))
        return rows


class Watch(L.Callback):
    """Read the instruments every so many steps, and act on what they say.

    Args:
        panel: what is drawn, and by what it is measured.
        out: the run's folder: readings.jsonl, sheets/ and best/ go there; None: nothing is kept.
        every: steps between checks.
        steps: composed jumps of a check's pictures.
        early_stop: end the run when so many checks in a row raised an alarm; 0: never.
        metadata: what best/ is told of the run.
    """

    def __init__(
        self,
        panel: Panel,
        out: Path | None,
        every: int,
        *,
        steps: int = 1,
        early_stop: int = 2,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.panel, self.out, self.every, self.steps = panel, out, every, steps
        self.early_stop, self.metadata = early_stop, dict(metadata or {})
        self.readings: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.alarmed, self.seconds, self.stopped = 0, 0.0, ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "readings": json.dumps(self.readings),
            "best": json.dumps(self.best),
            "alarmed": self.alarmed,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a run was."""
        self.readings, self.best = json.loads(state["readings"]), json.loads(state["best"])
        self.alarmed, self.seconds = state["alarmed"], state["seconds"]
        self.stopped = state["stopped"]

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Look once before the first step: the tuned pictures are the base's."""
        if not self.readings:
            self.check(trainer, module)
        if self.stopped:  # a run that was stopped by alarms is not taken up
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Look at the last weights, where the run does not end at a check."""
        if self.readings and self.readings[-1]["step"] < trainer.global_step:
            self.check(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Look after every so many optimizer steps."""
        k = trainer.global_step
        if k % self.every == 0 and k and (not self.readings or self.readings[-1]["step"] < k):
            self.check(trainer, module)

    def check(self, trainer: L.Trainer, module: Any) -> None:
        """Read, log, keep the best, and stop where the alarms say so; on the first process."""
        start = time.perf_counter()
        if trainer.is_global_zero:
            self._check(trainer, module)
        self.seconds += time.perf_counter() - start
        stop = trainer.strategy.broadcast(self.stopped)
        if stop:
            trainer.should_stop = True

    def _check(self, trainer: L.Trainer, module: Any) -> None:
        learning = learners(self.panel.reward)  # from the objective's pictures, not from these
        modes = [(m, m.training) for m in [*self.panel.tuned.modules(), *learning]]
        self.panel.tuned.eval()
        for learner in learning:
            learner.training = False
        reading, alarms, images = self.panel.read(1.0, self.steps, drift=True)
        numbers = reading.as_dict() | self.panel.terms(images)
        step = trainer.global_step
        entry = {
            "step": step, "nfe": module.nfe, "reward_calls": module.reward_calls,
            "alarms": [str(a) for a in alarms], **numbers,
        }  # fmt: skip
        self.readings.append(entry)
        for logger in trainer.loggers:
            logger.log_metrics({f"check/{k}": v for k, v in numbers.items()}, step)
        for alarm in alarms:
            print(f"step {step}: alarm: {alarm}")
        self.alarmed = self.alarmed + 1 if alarms else 0
        if self.early_stop and self.alarmed >= self.early_stop:
            self.stopped = f"step {step}: {alarms[0]}"
            print(f"stopped at step {step}, after {self.alarmed} checks with an alarm in a row")
        self._keep_best(entry, alarms)
        if self.out is not None:
            self._write(step, images, trainer)
        for part, training in modes:  # each its own: a frozen network stays in evaluation mode
            part.training = training

    def _keep_best(self, entry: dict[str, Any], alarms: Sequence[Alarm]) -> None:
        """Keep the adapters that the judge likes best; without a judge, the last without alarm."""
        name = "judge" if "judge" in entry else "reward"
        if name == "reward" and alarms:
            return
        if self.best is None or name == "reward" or entry[name] > self.best[name]:
            self.best = entry
            if self.out is not None:
                known = {**self.metadata, "steps": entry["step"], "figures": figures(entry)}
                save_adapters(self.panel.tuned, self.out / "best", known)

    def _write(self, step: int, images: Tensor, trainer: L.Trainer) -> None:
        assert self.out is not None
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.readings)
        write_atomically(self.out / "readings.jsonl", lines.encode())
        folder = self.out / "sheets"
        folder.mkdir(exist_ok=True)
        with torch.no_grad():
            sheet = captioned_grid(self.panel.sheet(images, self.steps))
        partial = folder / f".{step:06d}.png"
        sheet.save(partial, format="PNG")
        partial.replace(folder / f"{step:06d}.png")
        for logger in trainer.loggers:
            board: Any = getattr(logger, "experiment", None)
            if hasattr(board, "add_image"):  # TensorBoard
                import torchvision.transforms.functional as tf

                board.add_image("sheet", tf.to_tensor(sheet), step)


class SaveAdapters(L.Callback):
    """Write the adapters of the last step, beside Lightning's own checkpoint.

    Args:
        tuned: whose.
        out: the folder.
        every: steps between writes.
        metadata: what the file is told of the run.
    """

    def __init__(
        self, tuned: Adapted, out: Path, every: int, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.tuned, self.out, self.every = tuned, out, every
        self.metadata, self.saved = dict(metadata or {}), 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Write every so many optimizer steps, once each."""
        k = trainer.global_step
        if trainer.is_global_zero and k % self.every == 0 and k != self.saved:
            self.saved = k
            self.save(k)

    def save(self, step: int) -> None:
        """Write now."""
        save_adapters(self.tuned, self.out, {**self.metadata, "steps": step})


def figures(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return what a model card tells: name -> base and tuned."""
    names = [k.removesuffix("/base") for k in entry if k.endswith("/base")]
    return {n: {"base": entry[f"{n}/base"], "tuned": entry[n]} for n in names}
