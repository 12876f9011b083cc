"""Several processes on one run: the same pictures, and nothing lost where one of them dies."""

import json
import os
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from recipes.crew import Crew, crew_of
from tests.children import children, said_when_killed

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
    assert said.stderr.count("reward calls") == 1  # the first process alone speaks
    assert not list(tmp_path.glob(".two*"))
    again = ran(*SAMPLE, *prompts, "--steps", 3, "--out", two, "--devices", 2)
    assert "is finished" in " ".join(again.stderr.split())


def one_prompt(tmp_path, devices, *options):
    """Sample one prompt, its particles over processes, two rows a call whatever their number."""
    out = tmp_path / f"{devices}"
    ran(
        *SAMPLE[:-4], "--particles", 8, *SAMPLE[-2:], "--prompt", "a fox", "--steps", 3,
        "--batch-size", 2, "--out", out, *options,
        *(["--devices", devices] if devices > 1 else []),
    )  # fmt: skip
    return out


def equal(one, other):
    """Whether two run folders have the same pictures, scores and figures, bit for bit."""
    assert (one / "scores.jsonl").read_bytes() == (other / "scores.jsonl").read_bytes()
    files = [sorted(p.name for p in (f / "images").iterdir()) for f in (one, other)]
    assert files[0] == files[1]
    assert len(files[0]) == 8
    for name in files[0]:
        assert (one / "images" / name).read_bytes() == (other / "images" / name).read_bytes()
    mine, others = (json.loads((f / "metrics.json").read_text()) for f in (one, other))
    differ = {k for k in mine if mine[k] != others[k]}
    assert differ <= {"seconds", "peak_memory"}
    assert mine["log_z"] is not None


def test_two_processes_share_the_particles_of_one_prompt(tmp_path):
    equal(one_prompt(tmp_path, 1), one_prompt(tmp_path, 2))


@pytest.mark.slow
def test_four_processes_share_the_particles_of_one_prompt(tmp_path):
    equal(one_prompt(tmp_path, 1), one_prompt(tmp_path, 4, "--spread", "particles"))


@pytest.mark.slow
def test_the_particles_of_a_comparison_are_shared(tmp_path):
    options = [
        "compare", "--reward", "colour:name=red", "--prompts", "[a fox, an owl]", "--seeds", 1,
        "--methods", '["best-of-n:steps=1,particles=4", "fmrg-j:steps=2,particles=4"]',
        "--device", "cpu", "--judge", "null",
    ]  # fmt: skip
    ran(*options, "--out", tmp_path / "one")
    ran(*options, "--out", tmp_path / "two", "--devices", 2, "--spread", "particles")
    one, two = (
        safetensors.torch.load_file(tmp_path / n / "pictures.safetensors") for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k].float(), two[k].float(), atol=1 / 255) for k in one)


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
@pytest.mark.parametrize("spread", ["prompts", "particles"])
def test_a_process_that_is_killed_ends_the_run_and_it_goes_on(prompts, tmp_path, spread):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = [*SAMPLE, *prompts, "--steps", 40]
    ran(*run, "--out", whole)
    started = subprocess.Popen(
        command(*run, "--out", cut, "--devices", 2, "--spread", spread),
        stderr=subprocess.PIPE,
        text=True,
    )
    child = None
    while child is None and started.poll() is None:
        listed = children(started)
        begun = list(tmp_path.glob(".cut.partial/identity.json"))
        child = listed[0] if listed and begun else None
        time.sleep(0.1)
    if child is not None:  # else the run was over before
        said = said_when_killed(started, child)
        assert "terminated with code -9" in said or "processes of this run has ended" in " ".join(
            said.split()
        )
        assert not cut.exists()
    ran(*run, "--out", cut, "--devices", 2, "--spread", spread)
    same(whole, cut)


def test_one_process_is_no_crew():
    crew = crew_of(1)
    assert (type(crew), crew.first, crew.device) == (Crew, True, None)
    assert crew.told(lambda: 3) == 3
    assert crew.share([1, 2, 3]) == [1, 2, 3]
    crew.spread(None, 1, 4)
    assert not crew.together


def test_particles_are_divided_where_prompts_are_too_few():
    crew = Crew()
    crew.count = 4
    for by, units, particles, together in (
        (None, 1, 4, True), (None, 4, 4, False), (None, 1, 1, False), ("prompts", 1, 4, False),
        ("particles", 9, 4, True),
    ):  # fmt: skip
        crew.spread(by, units, particles)
        assert crew.together == together


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="devices must be at least 1"):
        crew_of(0)
    with pytest.raises(ValueError, match=r"device='cuda:1' is one device.*'cuda'"):
        crew_of(2, device="cuda:1")
    with pytest.raises(ValueError, match="there is only one process: give devices"):
        Crew().spread("particles", 1, 4)
    several = Crew()
    several.count = 2
    with pytest.raises(ValueError, match="give more particles"):
        several.spread("particles", 1, 1)
