"""`steer models | rewards | methods | objectives | rules`: what there is, a line each."""

from collections.abc import Mapping

from recipes.terminal import say

__all__ = ["methods", "models", "objectives", "rewards_", "rules"]


def _print(names: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # addresses whole
    for name, line in names.items():
        table.add_row(Text(name, "bold"), Text(line, "green" if line == READY else ""))
    say(table)


READY = "ready"


def models() -> None:
    """List the models that come along."""
    import steer

    _print(steer.MODELS)
    print("or any text-to-image pipeline of diffusers, by its folder or hub id: docs/models.md")


def rewards_(check: bool = False) -> None:
    """List the rewards that come along, and what makes one of several.

    Args:
        check: say which are ready without a network, and what the others lack.
    """
    import rewards

    if check:
        _print({name: _readiness(name) for name in rewards.NAMES})
        return
    _print(rewards.NAMES)
    say("\nof rewards, as in 'min(clip, brightness)':")
    _print(rewards.FUNCTIONS)


def _readiness(name: str) -> str:
    """Say whether a reward's weights are here."""
    from rewards.loading import missing

    if name == "remote":
        return "needs a server: steer serve-reward"
    lacking = missing(name)
    return f"download {'; '.join(lacking)}" if lacking else READY


def methods() -> None:
    """List the sampling methods."""
    import steer

    _print(steer.METHODS)


def objectives() -> None:
    """List the tuning objectives."""
    import steer

    _print(steer.OBJECTIVES)


def rules() -> None:
    """List the rules by which flow maps are trained."""
    import steer

    _print(steer.RULES)
