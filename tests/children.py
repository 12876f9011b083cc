"""Runs over several processes: what each holds of a base, and a child that is killed."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

__all__ = ["children", "gone", "said_to_be_held", "said_when_killed", "say_what_is_held"]


def say_what_is_held():
    """Let each process of this script print the bytes that it holds of a sharded base."""
    from steer.tuning.sharding import ShardedBase, shards

    split = ShardedBase.model_to_device

    def told(self):
        split(self)
        held, whole = shards(self.lightning_module.tuned.flow)
        print(f"rank {self.global_rank} holds {held} of {whole} bytes", flush=True)

    ShardedBase.model_to_device = told


def said_to_be_held(text):
    """(rank, bytes held, bytes of all) of each process, as texts."""
    return re.findall(r"rank (\d) holds (\d+) of (\d+) bytes", text)


def children(process):
    """The numbers of the processes that a process has started."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def gone(number):
    """Whether a process has ended."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def said_when_killed(process, child):
    """Kill a process of a run: all of it must end inside a minute. What it writes to stderr."""
    os.kill(child, signal.SIGKILL)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 60
    assert process.returncode != 0
    return said
