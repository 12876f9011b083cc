"""`steer models | rewards | methods | objectives | rules | cite`: lists of names."""

from collections.abc import Mapping

from recipes.terminal import say

__all__ = ["cite", "methods", "models", "objectives", "rewards_", "rules"]


def _print(names: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # with complete addresses
    for name, line in names.items():
        table.add_row(Text(name, "bold"), Text(line, "green" if line == READY else ""))
    say(table)


READY = "ready"


def models() -> None:
    """List the models of the package."""
    import steer

    _print(steer.MODELS)
    print("also any text-to-image pipeline of diffusers, by its folder or hub id: docs/models.md")


def rewards_(check: bool = False) -> None:
    """List the rewards of the package, and how to combine them.

    Args:
        check: say which are available offline, and what the others need.
    """
    import rewards

    if check:
        _print({name: _readiness(name) for name in rewards.NAMES})
        return
    _print(rewards.NAMES)
    say("\ncombinations of rewards, as in 'min(clip, brightness)':")
    _print(rewards.FUNCTIONS)


def _readiness(name: str) -> str:
    """Return a text on whether a reward's weights are available."""
    from rewards.loading import missing

    if name == "remote":
        return "needs a server: steer serve-reward"
    lacking = missing(name)
    return f"download {'; '.join(lacking)}" if lacking else READY


STEPS = 16
"""The number of steps for which the calls of a step are counted."""


def methods(names: bool = False) -> None:
    """List the sampling methods: what each samples, what it needs, and what it costs.

    Calls: network calls (NFE) a step and particle, at 16 steps; a gradient through the network
        counts as one more. Law: the law of the particles, including their weights.

    Args:
        names: one line per method, without the columns.
    """
    import steer

    if names:
        _print(steer.METHODS)
        return
    from rich.table import Table
    from rich.text import Text

    from steer.sampling.citations import CITATIONS
    from steer.sampling.forecast import plan
    from steer.sampling.methods import TABLE

    table = Table(box=None, pad_edge=False)
    for column in ("method", "law", "gradient", "calls", "source"):
        table.add_column(column, justify="right" if column == "calls" else "left")
    table.add_column("what it does", overflow="fold")
    for name, line in steer.METHODS.items():
        one = TABLE[name]
        calls = plan(name, STEPS)["nfe"] / STEPS
        source = ", ".join(CITATIONS[k].arxiv or CITATIONS[k].venue for k in one.source)
        needs = "needed" if one.gradient else _used(name)
        table.add_row(Text(name, "bold"), one.law, needs, f"{calls:.1f}", source, line)
    say(table)
    print("BibTeX: steer cite METHOD. Laws and options: docs/methods.md")


def _used(name: str) -> str:
    """Return a text on whether a method that needs no gradient uses one if there is one."""
    from steer.sampling.forecast import plan

    with_one, without = (plan(name, STEPS, differentiable=d)["nfe"] for d in (True, False))
    return "used" if with_one != without else "no"


def cite(name: str) -> None:
    """Print the BibTeX entries to cite for some methods.

    Args:
        name: one or more names that `steer methods` lists.
    """
    from steer.sampling.citations import bibtex
    from steer.sampling.methods import method_of

    chosen = {one: method_of(one).source for one in name.replace(",", " ").split()}
    print(bibtex(key for keys in chosen.values() for key in keys))
    ours = [one for one, keys in chosen.items() if not keys]
    if ours:
        print(f"% no citation for {', '.join(ours)}")


def objectives() -> None:
    """List the tuning objectives."""
    import steer

    _print(steer.OBJECTIVES)


def rules() -> None:
    """List the rules by which flow maps are trained."""
    import steer

    _print(steer.RULES)
