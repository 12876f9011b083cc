"""Signals end a run between two steps and save it: SIGINT as KeyboardInterrupt, SIGTERM as 143.

Lightning's own handling differs: after SIGTERM an unfinished script exits with code 0, and after
SIGINT the caller gets no KeyboardInterrupt.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from steer.training.checkpoints import LAST

__all__ = ["Signals", "StepEnd", "Terminated"]


class Terminated(SystemExit):
    """SIGTERM was received: the exit code is 143, as in a shell; the text says what was saved."""

    def __init__(self, text: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.text = text

    def __str__(self) -> str:
        return self.text


class _Stopped(BaseException):
    """An exception that passes through Lightning, which converts a KeyboardInterrupt."""


class Signals:
    """Handling of SIGINT and SIGTERM during a run.

    Within the loop the first signal ends the run after the current step. A second signal, and any
    signal outside the loop, ends it immediately.

    Args:
        left: returns a message on what is saved and how to resume.
    """

    def __init__(self, left: Callable[[], str]) -> None:
        self.left, self.asked, self.patient = left, 0, False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Handle signals while the block runs, and end it as described.

        Raises:
            KeyboardInterrupt: SIGINT was received; the text says what was saved.
            Terminated: SIGTERM was received.
        """
        before = self.listen()
        try:
            yield
        except (_Stopped, KeyboardInterrupt, SystemExit) as error:
            of_lightning = isinstance(error, SystemExit) and isinstance(
                error.__context__, KeyboardInterrupt
            )
            if isinstance(error, SystemExit) and not of_lightning:
                raise  # the error was not caused by a signal
            text = self.left()
            if self.asked == signal.SIGTERM:
                print(text, file=sys.stderr, flush=True)
                raise Terminated(text) from None
            raise KeyboardInterrupt(text) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> dict[int, Any]:
        """Install the signal handlers, and return the previous ones; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {n: signal.getsignal(n) for n in numbers}
        if None in before.values():  # not set by Python, so it cannot be restored
            return {}
        for n in numbers:
            signal.signal(n, self._hear)
        return {int(n): handler for n, handler in before.items()}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = bool(self.asked), self.asked or number
        if again or not self.patient:
            raise _Stopped
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


class StepEnd(L.Callback):
    """End the loop between two steps after a signal, and save the last state.

    Args:
        signals: the signal handling.
        folder: folder of the checkpoints; None: nothing is saved.
        boundary: module -> whether its step is complete.
    """

    def __init__(
        self, signals: Signals, folder: Path | None, boundary: Callable[[Any], bool]
    ) -> None:
        self.signals, self.folder, self.boundary = signals, folder, boundary

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Install the handlers, since Lightning has just installed its own for SIGTERM."""
        self.signals.listen()
        self.signals.patient = True

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Save and stop, if this process or another one received a signal."""
        if not self.boundary(module):
            return
        asked = bool(self.signals.asked)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self._save(trainer)
            raise _Stopped

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Save the end of the run, from which a longer run continues."""
        self.signals.patient = False
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Let further signals end the run immediately."""
        self.signals.patient = False

    def _save(self, trainer: L.Trainer) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / LAST)
