"""A step makes the host wait for the device once at most, on a device that is not there."""

import json
import subprocess
import sys

import pytest

import steer


def counted(what):
    command = [sys.executable, "-W", "ignore", "-m", "tests.toy_device", what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def samplers():
    return counted("sample")


TWO = {"noise-smc", "reno", "dno"}
"""Their last population is the end of two steps: an iteration, and the pictures."""


def test_every_method_reads_the_device_once_a_step(samplers):
    assert set(steer.METHODS) < set(samplers)
    for name, (counts, places) in samplers.items():
        assert max(counts[:-1]) <= 1, (name, counts, places)
        assert counts[-1] <= (2 if name in TWO else 1), (name, counts, places)


def test_every_objective_reads_the_device_once_an_optimizer_step():
    found = counted("finetune")
    assert set(found) == set(steer.OBJECTIVES)
    for name, (counts, places) in found.items():
        assert max(counts) == 1, (name, counts, places)


def test_what_a_weighted_method_decides_by_is_read(samplers):
    """The device does count: a resampling step cannot do without."""
    assert samplers["renoise"][0][0] == 1
