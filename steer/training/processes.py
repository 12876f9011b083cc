"""The index of this process in a run, and its error when another process has ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from steer.names import reason

__all__ = ["is_first", "with_others"]


def is_first() -> bool:
    """Return whether this is the first process of a run, for any launcher."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # imported only when needed

    return not getattr(rank_zero_only, "rank", 0)


@contextmanager
def with_others(trainer: Any) -> Iterator[None]:
    """Turn a connection error between processes into a message that another process has ended.

    Args:
        trainer: Lightning's, whose loop the block runs.

    Raises:
        ChildProcessError: another process of the run has ended, and this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size > 1 and _of_another(error):
            raise ChildProcessError(
                f"process {trainer.global_rank} of {trainer.world_size} waited for another one "
                "that has ended (killed, out of memory, or with an error of its own above) or "
                f"cannot be reached ({reason(error)}): the run ends; give the same command again "
                "to resume from its last checkpoint"
            ) from error
        raise


def _of_another(error: RuntimeError) -> bool:
    """Return whether an error comes from the connection to other processes."""
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed by peer")
    )
