"""What every test finds: one thread, the same global draws, and the process as it was.

Tests run in random order (pytest-randomly; the seed is printed), in several processes where asked.
Draws from torch's global generator begin anew with each test, so no test hears of another's, and
a test that leaves the process changed fails by its own name.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for what tests start
if os.environ.get("TEST_DEVICE") != "cuda":  # tests/test_cuda.py is the one that takes a card
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import logging
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the arrays are small: two threads cost more than they give


IMPORTED = ("CUDA_", "KINETO_", "PYTEST_", "PYTORCH_", "TOKENIZERS_", "TORCHINDUCTOR_")
"""Variables that libraries set when a test is the first to import them, or to use a card."""


def found() -> dict[str, object]:
    """Return what a test may not leave changed."""
    kept = {f"${k}": v for k, v in os.environ.items() if not k.startswith(IMPORTED)}
    return {
        **kept,
        "torch's default dtype": torch.get_default_dtype(),
        "torch's grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's threads": torch.get_num_threads(),
        "the folder": Path.cwd(),
        "the level of the root logger": logging.root.level,
    }


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def left_as_found():
    before = found()
    yield
    after = found()
    names = sorted(before.keys() | after.keys())
    changed = [name for name in names if before.get(name) != after.get(name)]
    assert not changed, f"the test left changed: {', '.join(changed)}"


@pytest.fixture(autouse=True)
def replaceable(monkeypatch):
    """Fail a test whose command wrote a folder that its own `--overwrite` would refuse."""
    from steer import files

    sync = files._sync

    def checked(folder):
        strange = files._strange(folder)
        assert not strange, f"--overwrite would refuse what was just written: {strange}"
        sync(folder)

    monkeypatch.setattr(files, "_sync", checked)


def pytest_terminal_summary(terminalreporter, config):
    seed = config.getoption("randomly_seed", None)
    if seed is not None:
        terminalreporter.write_line(f"in this order again: --randomly-seed={seed}")
