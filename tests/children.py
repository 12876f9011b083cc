"""Runs over several processes whose child is killed."""

import os
import signal
import subprocess
import time

__all__ = ["children", "said_when_killed"]


def children(process):
    """The numbers of the processes that a process has started."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def said_when_killed(process, child):
    """Kill a child of a run: it must fail inside a minute. What it writes to stderr."""
    os.kill(child, signal.SIGKILL)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 60
    assert process.returncode != 0
    return said
