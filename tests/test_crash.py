"""Runs that are killed, or whose disk fills, at a write: each resumes to what it would have been.

`make crash` tries every write; see tests/crashing.py. Bit for bit: adapters and the judge's best,
readings, sheets, the log's rows, pictures, scores, trained weights.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path("/dev/shm")


def crash(kind, how, folder, writes=None, **environment):
    """Run tests/crashing.py -> its figures."""
    words = [sys.executable, "-m", "tests.crashing", kind, how, str(folder)]
    words += [] if writes is None else [json.dumps(writes)]
    known = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(words, cwd=ROOT, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kind", "write"), [("tuning", 60), ("sampling", 29)])
def test_a_run_that_is_killed_in_a_write_resumes(tmp_path, kind, write):
    figures = crash(kind, "kill", tmp_path, [write])
    assert (figures["tried"], figures["resumed"]) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("kind", ["tuning", "sampling", "training"])
def test_every_write_may_be_the_last(tmp_path, kind, how):
    figures = crash(kind, how, tmp_path)
    assert figures["resumed"] == figures["tried"] > 25


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no other file system for temporary files")
@pytest.mark.parametrize("kind", ["tuning", "training"])
def test_temporary_files_may_be_on_another_file_system(tmp_path, kind):
    assert SHARED.stat().st_dev != tmp_path.stat().st_dev
    figures = crash(kind, "kill", tmp_path, list(range(1, 60, 3)), TMPDIR=str(SHARED))
    assert figures["resumed"] == figures["tried"] == 20


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root to mount")
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("tuning", [30, 120, 200, 250, 300, 350, 420]), ("sampling", [4, 30, 60, 90])],
)
def test_a_disk_that_is_full(tmp_path, kind, sizes):
    figures = crash(kind, "disk", tmp_path, sizes)
    assert figures["resumed"] == figures["tried"] == len(sizes)
