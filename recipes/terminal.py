"""What a program says: results on standard output, all else on standard error."""

import io
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from steer.names import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

__all__ = ["Lines", "UnheardError", "console", "progress", "say"]

EVERY = 30.0
"""Seconds between two lines of progress, where there is no screen."""


class UnheardError(OSError):
    """Standard output took no more: what was to be said is lost, and nothing else is."""


def say(shown: "RenderableType") -> None:
    """Print a text as it is, or a table, on standard output.

    Raises:
        UnheardError: it cannot be written.
    """
    if isinstance(shown, str):
        text = shown + "\n"
    else:
        from rich.console import Console

        screen, page = Console(), io.StringIO()
        Console(
            file=page, width=screen.width, force_terminal=screen.is_terminal, emoji=False
        ).print(shown)
        text = page.getvalue()
    if sys.stdout is None:  # closed from the start
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise UnheardError(error.errno, error.strerror) from error


def console() -> "Console":
    """Return what shows costs and progress: texts are taken as they are, brackets and all.

    Of several processes the first one alone shows anything.
    """
    from rich.console import Console

    further = os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("NODE_RANK", "0") != "0"
    return Console(stderr=True, markup=False, emoji=False, quiet=further)


class Lines:
    """How far a run is, in lines now and then: for files and pipes. Called as rich's `Progress`.

    Args:
        console: where the lines go.
    """

    def __init__(self, console: "Console") -> None:
        self.console = console

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, description: str, total: float, note: str = "") -> int:
        """Begin to count."""
        self.description, self.total, self.note = description, total, note
        self.done, self.made = 0.0, 0.0
        self.began = self.said = time.monotonic()
        return 0

    def update(
        self,
        task: int,
        *,
        advance: float = 0,
        completed: float | None = None,
        description: str | None = None,
        note: str | None = None,
    ) -> None:
        """Note how far it is, and say so if it is time; what was done before is not timed."""
        self.description = self.description if description is None else description
        self.note = self.note if note is None else note
        self.made += advance
        self.done = self.done + advance if completed is None else completed
        now = time.monotonic()
        if now - self.said < EVERY or not advance:
            return
        self.said, spent = now, now - self.began
        left = spent / self.made * (self.total - self.done)
        note = f", {self.note}" if self.note else ""
        self.console.print(
            f"{self.description}: {self.done:g} of {self.total:g}{note}; {duration(spent)}, "
            f"{duration(left)} left",
            soft_wrap=True,
        )


def progress(console: "Console", *texts: str) -> "Progress | Lines":
    """Return what shows how far a run is: a bar on a screen, else lines.

    Args:
        console: where.
        texts: what a bar says beside itself, in rich's words.
    """
    if not (console.is_terminal or console.is_jupyter):
        return Lines(console)
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [TextColumn(text) for text in texts]
    return Progress(*columns, TimeRemainingColumn(), console=console)
