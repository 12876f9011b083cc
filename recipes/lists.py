"""`steer models | rewards | methods | objectives`: what there is, a line each."""

from collections.abc import Mapping

import rewards
import steer

__all__ = ["methods", "models", "objectives", "rewards_"]


def _print(names: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, line in names.items():
        table.add_row(f"[bold]{name}[/bold]", line)
    Console().print(table)


def models() -> None:
    """List the models that come along."""
    _print(steer.MODELS)


def rewards_() -> None:
    """List the rewards that come along."""
    _print(rewards.NAMES)


def methods() -> None:
    """List the sampling methods."""
    _print(steer.METHODS)


def objectives() -> None:
    """List the tuning objectives."""
    _print(steer.OBJECTIVES)
