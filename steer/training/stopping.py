"""Signals end a run between two steps, its state saved: SIGINT as KeyboardInterrupt, SIGTERM 143.

Lightning's own ways are others: SIGTERM ends a script with exit code 0, unfinished, and SIGINT is
no KeyboardInterrupt to who called.
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
    """SIGTERM came: the exit code is 143, as a shell has it; the text says what there is."""

    def __init__(self, text: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.text = text

    def __str__(self) -> str:
        return self.text


class _Stopped(BaseException):
    """What passes through Lightning, which makes something else of a KeyboardInterrupt."""


class Signals:
    """What SIGINT and SIGTERM do while a run is under way.

    In the loop the first one ends the run after the step that is being taken; a second one, and
    each outside the loop, ends it at once.

    Args:
        left: returns a message on what is saved and how to resume.
    """

    def __init__(self, left: Callable[[], str]) -> None:
        self.left, self.asked, self.patient = left, 0, False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Handle signals while the block runs, and end it as described.

        Raises:
            KeyboardInterrupt: SIGINT came; the text says what there is.
            Terminated: SIGTERM came.
        """
        before = self.listen()
        try:
            yield
        except (_Stopped, KeyboardInterrupt, SystemExit) as error:
            of_lightning = isinstance(error, SystemExit) and isinstance(
                error.__context__, KeyboardInterrupt
            )
            if isinstance(error, SystemExit) and not of_lightning:
                raise  # somebody else's
            text = self.left()
            if self.asked == signal.SIGTERM:
                print(text, file=sys.stderr, flush=True)
                raise Terminated(text) from None
            raise KeyboardInterrupt(text) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> dict[int, Any]:
        """Take the signals over, and return who had them; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {n: signal.getsignal(n) for n in numbers}
        if None in before.values():  # not Python's to give back
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
        signals: who listens.
        folder: of the checkpoints; None: nothing is saved.
        boundary: module -> whether its step is whole.
    """

    def __init__(
        self, signals: Signals, folder: Path | None, boundary: Callable[[Any], bool]
    ) -> None:
        self.signals, self.folder, self.boundary = signals, folder, boundary

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Listen: Lightning has taken SIGTERM for itself just before, and gives it back after."""
        self.signals.listen()
        self.signals.patient = True

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Save and stop, if a signal came to this process or another one."""
        if not self.boundary(module):
            return
        asked = bool(self.signals.asked)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self._save(trainer)
            raise _Stopped

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Save the end of the run: a longer run continues from here."""
        self.signals.patient = False
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Be patient no more."""
        self.signals.patient = False

    def _save(self, trainer: L.Trainer) -> None:
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / LAST)
