"""Runs over several processes whose child is killed."""

import os
import signal
import subprocess
import time
from pathlib import Path

__all__ = ["children", "gone", "said_when_killed"]


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
