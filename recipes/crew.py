"""Several processes for one run: each computes its share of the units, the first one joins them.

Lightning's Fabric starts them on one machine, or under SLURM, torchrun and other launchers. The
random numbers of a unit are a function of the seed and of the indices of its prompts, so the
number of processes does not change the pictures. Units are files in a folder that all processes
share: no collective operation is needed, and a run in which a process died is resumed like any
other.

If there are fewer units than processes, all of them compute each unit together, with its particles
spread over them: see `steer.Ranks`.
"""

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

from steer.ranges import count
from steer.ranks import Ranks

__all__ = ["Crew", "Spread", "crew_of"]

T = TypeVar("T")

Spread = Literal["prompts", "particles"]
"""What several processes divide: prompts, or the particles of each."""

LOOK = 0.2
"""Seconds between two checks of what the others have finished."""


class Crew:
    """A single process.

    Attributes:
        rank: index of this process.
        count: number of processes.
        device: device of this process; None: as given by the user.
        together: whether all processes compute each unit together, each with its share of the
            particles.
    """

    rank, count = 0, 1
    device: str | None = None
    together = False

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, joins and writes."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the units that it computes."""
        return self.first or not self.together

    def spread(self, by: Spread | None, units: int, particles: int) -> None:
        """Choose what is divided among the processes.

        Args:
            by: the user's choice. None: particles if there are fewer units than processes.
            units: number of units.
            particles: maximum number of particles per prompt.

        Raises:
            ValueError: a choice without several processes, or a single particle to divide.
        """
        if by is not None and self.count == 1:
            raise ValueError(
                f"spread={by!r} says how several processes divide the work, but there is only one "
                "process: give devices or num_nodes as well, or leave spread out"
            )
        if by == "particles" and particles < 2:
            raise ValueError(
                "spread='particles' divides the particles of a prompt, and there is one: give "
                "more particles, or spread='prompts'"
            )
        fewer = units < self.count and particles > 1
        self.together = by == "particles" or (by is None and fewer)

    def joint(self) -> AbstractContextManager[Any]:
        """Return the context in which a unit is computed."""
        return nullcontext()

    def told(self, value: Callable[[], T]) -> T:
        """Call a function on the first process, and return its result on all."""
        return value()

    def share(self, units: Sequence[T]) -> Sequence[T]:
        """Return this process's units."""
        return units if self.together else units[self.rank :: self.count]

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until all units are there."""


class _Several(Crew):
    """One of several processes."""

    def __init__(self, fabric: Any) -> None:
        self.fabric = fabric
        self.rank, self.count = fabric.global_rank, fabric.world_size
        self.device = str(fabric.device)

    def told(self, value: Callable[[], T]) -> T:
        found = value() if self.first else None
        try:
            return self.fabric.broadcast(found)  # type: ignore[no-any-return]
        except RuntimeError as error:
            if self.first:
                raise
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                print(
                    f"process {self.rank} of {self.count} waited for the first one, which did "
                    f"not answer in time: {error}",
                    file=sys.stderr,
                )
            sys.exit(1)  # else the first process has ended with a message

    def joint(self) -> AbstractContextManager[Any]:
        return Ranks(self.fabric) if self.together else nullcontext()

    def wait(self, done: Callable[[], bool]) -> None:
        while not done():
            time.sleep(LOOK)


def crew_of(devices: int, num_nodes: int = 1, device: str | None = None) -> Crew:
    """Start the processes of a run, and return the one that this process is.

    If no launcher has started them, this process runs the same command again for each further
    device. If one of them dies, Lightning reports it and kills the others within seconds. A
    process ends with the one that started it.

    Args:
        devices: processes on each machine, one per device.
        num_nodes: number of machines.
        device: "cpu", "cuda" or another kind. Default: chosen by Lightning.

    Raises:
        ValueError: a number below one, or a device with an index for several processes.
    """
    count("devices", devices)
    count("num_nodes", num_nodes)
    if devices * num_nodes == 1:
        return Crew()
    if device is not None and ":" in device:
        raise ValueError(
            f"device={device!r} is one device, and {devices * num_nodes} processes need one each: "
            f"give only its kind, {device.partition(':')[0]!r}, or devices=1"
        )
    from lightning.fabric import Fabric

    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather")  # Lightning's
    parent = os.getppid()
    fabric = Fabric(
        accelerator=device or "auto", devices=devices, num_nodes=num_nodes, strategy="ddp"
    )
    fabric.launch()
    made = _Several(fabric)
    if not made.first and "LOCAL_RANK" in os.environ and parent > 1:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    return made


def _follow(parent: int) -> None:
    """End with the process that started this one."""
    while os.getppid() == parent:
        time.sleep(1.0)
    print(
        "the first process of this run has ended, so this process ends, too",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
