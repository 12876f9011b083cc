"""What a program says: results on standard output, all else on standard error."""

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["UnheardError", "console", "say"]


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
    """Return what shows costs and progress: texts are taken as they are, brackets and all."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False)
