"""Progress of `steer.sample`: a bar in a terminal or a notebook, or lines on request."""

import sys
from collections.abc import Iterable, Iterator

from steer.guidance.population import Population

__all__ = ["shown"]

DELAY = 3.0
"""Seconds before a bar appears that was not requested."""

EVERY = 30.0
"""Seconds between two updates where the output is a file."""


def shown(
    populations: Iterable[Population], total: int, method: str, wanted: bool | None
) -> Iterator[Population]:
    """Yield a run's populations, and show its steps and the mean reward meanwhile (tqdm).

    Args:
        populations: after each step.
        total: number of steps, if the run is not stopped early.
        method: its name.
        wanted: None: in a terminal or a notebook, after the first seconds of the run; True:
            always, in a file at intervals; False: never.
    """
    if wanted is False or (wanted is None and not _seen()):
        yield from populations
        return
    from tqdm.auto import tqdm

    with tqdm(
        total=total,
        desc=method,
        unit="step",
        delay=DELAY if wanted is None else 0,
        mininterval=0.1 if _seen() else EVERY,
        dynamic_ncols=True,
    ) as bar:
        for population in populations:
            bar.set_postfix_str(f"reward {float(population.reward.mean()):.4g}", refresh=False)
            bar.update()
            yield population


def _seen() -> bool:
    """Return whether the output is shown in a terminal or a notebook."""
    notebook = "ipykernel" in sys.modules and hasattr(sys.stderr, "session")
    return notebook or (sys.stderr is not None and sys.stderr.isatty())
