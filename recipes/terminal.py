"""Output of the programs: results on standard output, everything else on standard error."""

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
"""Seconds between two lines of progress if there is no terminal."""


class UnheardError(OSError):
    """Standard output was closed: the text is lost, but nothing else is."""


def say(shown: "RenderableType") -> None:
    """Print a text unchanged, or a table, on standard output.

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
    """Return the console for costs and progress, which prints texts literally, without markup.

    With several processes only the first one prints.
    """
    from rich.console import Console

    further = os.environ.get("LOCAL_RANK", "0") != "0" or os.environ.get("NODE_RANK", "0") != "0"
    return Console(stderr=True, markup=False, emoji=False, quiet=further)


class Lines:
    """Progress of a run in lines at intervals, for files and pipes; used like rich's `Progress`.

    Args:
        console: console for the lines.
    """

    def __init__(self, console: "Console") -> None:
        self.console = console

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, description: str, total: float, note: str = "") -> int:
        """Start a task."""
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
        """Update the progress, and print a line if it is due; earlier work is not timed."""
        self.description = self.description if description is None else description
        self.note = self.note if note is None else note
        self.made += advance
        self.done = self.done + advance if completed is None else completed
        now = time.monotonic()
        if now - self.said < EVERY or not advance:
            return
        self.said, spent = now, now - self.began
        left = spent / self.made * max(0.0, self.total - self.done)
        note = f", {self.note}" if self.note else ""
        self.console.print(
            f"{self.description}: {self.done:g} of {self.total:g}{note}; {duration(spent)}, "
            f"{duration(left)} left",
            soft_wrap=True,
        )


def progress(console: "Console", *texts: str) -> "Progress | Lines":
    """Return a display of the progress: a bar in a terminal, else lines.

    Args:
        console: console for it.
        texts: columns of a bar in addition to the bar itself, as for rich.
    """
    if not (console.is_terminal or console.is_jupyter):
        return Lines(console)
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [TextColumn(text) for text in texts]
    return Progress(*columns, TimeRemainingColumn(), console=console)
