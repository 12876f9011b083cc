"""Progress of a run: a bar in a terminal, and lines at intervals if the output is a file."""

import time
from typing import Any

import lightning as L

from steer.names import duration

__all__ = ["Lines", "progress"]


class Lines(L.Callback):
    """Print a line every few seconds, and one at the end.

    Args:
        every: seconds between lines; a line is printed at the end of a step.
    """

    def __init__(self, every: float = 30.0) -> None:
        self.every = every

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Start counting at the step at which a resumed run continues."""
        self.began = self.said = time.perf_counter()
        self.first = self.last = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Print the progress, if a line is due."""
        step = trainer.global_step
        if step == self.last or not trainer.is_global_zero:
            return
        self.last, now = step, time.perf_counter()
        if now - self.said < self.every and step < trainer.max_steps:
            return
        self.said, spent = now, now - self.began
        left = spent / (step - self.first) * (trainer.max_steps - step)
        shown = "".join(f", {k} {float(v):.4g}" for k, v in trainer.progress_bar_metrics.items())
        print(
            f"step {step} of {trainer.max_steps}{shown}; {duration(spent)}, {duration(left)} left",
            flush=True,
        )


def progress() -> L.Callback:
    """Return a bar in a terminal or a notebook, else lines."""
    from lightning.pytorch.callbacks import RichProgressBar
    from rich import get_console

    console = get_console()
    return RichProgressBar() if console.is_terminal or console.is_jupyter else Lines()
