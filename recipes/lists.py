"""`steer models | rewards | methods | objectives`: what there is, a line each."""

from collections.abc import Mapping

import rewards
import steer
from rewards.loading import missing

__all__ = ["methods", "models", "objectives", "rewards_"]


def _print(names: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # addresses whole
    for name, line in names.items():
        table.add_row(f"[bold]{name}[/bold]", line)
    Console().print(table)


def models() -> None:
    """List the models that come along."""
    _print(steer.MODELS)


def rewards_(check: bool = False) -> None:
    """List the rewards that come along, and what makes one of several.

    Args:
        check: say which are ready without a network, and what the others lack.
    """
    if check:
        _print({name: _readiness(name) for name in rewards.NAMES})
        return
    _print(rewards.NAMES)
    print("\nof rewards, as in 'min(clip, brightness)':")
    _print(rewards.FUNCTIONS)


def _readiness(name: str) -> str:
    """Say whether a reward's weights are here."""
    if name == "remote":
        return "needs a server: steer serve-reward"
    lacking = missing(name)
    return "[green]ready[/green]" if not lacking else f"download {'; '.join(lacking)}"


def methods() -> None:
    """List the sampling methods."""
    _print(steer.METHODS)


def objectives() -> None:
    """List the tuning objectives."""
    _print(steer.OBJECTIVES)
