"""Which of a run's processes this is."""

__all__ = ["is_first"]


def is_first() -> bool:
    """Return whether this is the first process of a run, for any launcher."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # not before it is needed

    return not getattr(rank_zero_only, "rank", 0)
