"""Several processes on one run: the same pictures, and nothing lost where one of them dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from recipes.crew import Crew, crew_of

SAMPLE = [
    "sample", "--reward", "colour:name=red", "--method", "renoise", "--temperature", "0.1",
    "--particles", "2", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox\nan owl\na red apple\n")
    return ["--prompts-file", str(file)]


def command(*arguments):
    return [sys.executable, "-W", "ignore", "-m", "recipes.cli", *map(str, arguments)]


def ran(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def images(folder):
    files = sorted((folder / "images").iterdir())
    return {f.name: pil_to_tensor(Image.open(f)) for f in files}


def same(one, two):
    one, two = images(one), images(two)
    assert one.keys() == two.keys()
    assert one
    # a call of fewer rows may round otherwise
    assert all((one[k].int() - two[k].int()).abs().max() <= 1 for k in one)


def test_two_processes_draw_what_one_draws(prompts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    ran(*SAMPLE, *prompts, "--steps", 3, "--out", one)
    said = ran(*SAMPLE, *prompts, "--steps", 3, "--out", two, "--devices", 2)
    same(one, two)
    assert said.stderr.count("network calls") == 1  # the first process alone speaks
    assert not list(tmp_path.glob(".two*"))
    again = ran(*SAMPLE, *prompts, "--steps", 3, "--out", two, "--devices", 2)
    assert "is finished" in " ".join(again.stderr.split())


@pytest.mark.slow
def test_a_comparison_is_shared(prompts, tmp_path):
    options = [
        "compare", "--reward", "colour:name=red", *prompts, "--seeds", 2,
        "--methods", '["none:particles=2", "fmrg-j:steps=2,particles=2"]',
        "--device", "cpu", "--judge", "null",
    ]  # fmt: skip
    ran(*options, "--out", tmp_path / "one")
    ran(*options, "--out", tmp_path / "two", "--devices", 2)
    one, two = (
        safetensors.torch.load_file(tmp_path / n / "pictures.safetensors") for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k].float(), two[k].float(), atol=1 / 255) for k in one)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_it_goes_on(prompts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = [*SAMPLE, *prompts, "--steps", 40]
    ran(*run, "--out", whole)
    started = subprocess.Popen(
        command(*run, "--out", cut, "--devices", 2), stderr=subprocess.PIPE, text=True
    )
    child = None
    while child is None and started.poll() is None:
        listed = subprocess.run(
            ["pgrep", "-P", str(started.pid)], capture_output=True, text=True
        ).stdout.split()
        begun = list(tmp_path.glob(".cut.partial/*.safetensors"))
        child = int(listed[0]) if listed and begun else None
        time.sleep(0.1)
    if child is not None:  # else the run was over before
        os.kill(child, signal.SIGKILL)
        begun = time.monotonic()
        _, said = started.communicate(timeout=60)
        assert time.monotonic() - begun < 60
        assert started.returncode != 0
        assert "terminated with code -9" in said
        assert not cut.exists()
    ran(*run, "--out", cut, "--devices", 2)
    same(whole, cut)


def test_one_process_is_no_crew():
    crew = crew_of(1)
    assert (type(crew), crew.first, crew.device) == (Crew, True, None)
    assert crew.told(lambda: 3) == 3
    assert crew.share([1, 2, 3]) == [1, 2, 3]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="devices must be at least 1"):
        crew_of(0)
    with pytest.raises(ValueError, match=r"device='cuda:1' is one device.*'cuda'"):
        crew_of(2, device="cuda:1")
