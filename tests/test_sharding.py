"""A base that is split over processes: the same curve, the same files, and nothing held whole."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import steer
from steer.training.processes import _of_another
from steer.tuning.settings import Settings
from steer.tuning.sharding import refuse_unshardable, units
from tests import test_tuning, tiny_pipelines
from tests.children import children, gone, said_to_be_held, said_when_killed, say_what_is_held

SCRIPT = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests import test_sharding
if __name__ == "__main__":
    test_sharding.several(*sys.argv[1:])
"""

PICTURES = {"check_every": 2, "check_samples": 1, "sweep": [0.0, 1.0], "sweep_steps": [1]}


def base_of(kind):
    if kind == "tiny":
        return test_tuning.tiny()
    return steer.load(tiny_pipelines.build(kind), height=32, width=32)


def several(kind, out, processes, strategy, steps, objectives="direct", *more):
    """Tune by each of some objectives, and say what this process holds of the base."""
    torch.set_num_threads(1)
    say_what_is_held()
    for name in objectives.split(","):
        tuned = test_tuning.tune(
            base_of(kind), f"{out}/{name}", int(steps), name, devices=int(processes),
            strategy=strategy, batch_size=16, micro_batch=8, **PICTURES, **dict(map(number, more)),
        )  # fmt: skip
        x = torch.randn(2, *tuned.event_shape, generator=torch.Generator().manual_seed(0))
        drawn = tuned.decode(tuned.given(["cat"]).jump(x, 0.0, 1.0))
        print(f"returned {float(drawn.double().sum()):.4f}", flush=True)


def number(text):
    name, _, value = text.partition("=")
    return name, float(value) if "." in value else int(value)


def started(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ran(tmp_path, *arguments, limit=280):
    process = started(tmp_path, *arguments)
    said, wrong = process.communicate(timeout=limit)
    assert process.returncode == 0, wrong[-3000:]
    return said


def curve(folder):
    rows = csv.DictReader((folder / "log" / "version_0" / "metrics.csv").open())
    return [
        float(row[name]) for row in rows if row.get("train/loss")
        for name in ("train/loss", "train/gradient")
    ]  # fmt: skip


def readings(folder):
    return [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]


def adapters(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def alike(one, two, atol=1e-5):
    assert curve(one) == pytest.approx(curve(two), rel=1e-4, abs=1e-6)
    a, b = adapters(one), adapters(two)
    assert a.keys() == b.keys()
    assert max(float((a[k] - b[k]).abs().max()) for k in a) <= atol
    assert sum(float(p.abs().sum()) for k, p in a.items() if "lora_B" in k) > 0
    for first, second in zip(readings(one), readings(two), strict=True):
        numbers = {k: v for k, v in first.items() if isinstance(v, float)}
        assert numbers == pytest.approx({k: second[k] for k in numbers}, rel=1e-3, abs=1e-4)


def test_a_split_base_gives_the_run_of_one_process(tmp_path, capsys):
    """The same curve, checks, sweep and file, half of the base on each process."""
    several("tiny", tmp_path / "one", 1, "auto", 4)
    said = ran(tmp_path, "tiny", tmp_path / "two", 2, "fsdp", 4)
    one, two = tmp_path / "one" / "direct", tmp_path / "two" / "direct"
    alike(one, two)
    front = [json.loads((folder / "front.json").read_text()) for folder in (one, two)]
    assert [e["scale"] for e in front[0]] == [e["scale"] for e in front[1]] == [0.0, 1.0]
    assert [e["reward"] for e in front[0]] == pytest.approx([e["reward"] for e in front[1]])
    held = said_to_be_held(said)
    assert sorted(rank for rank, _, _ in held) == ["0", "1"]
    assert all(int(own) / int(whole) < 0.55 for _, own, whole in held)
    returned = [line for line in said.splitlines() if line.startswith("returned")]
    assert len(returned) == 2
    assert set(returned) == {capsys.readouterr().out.strip().splitlines()[-1]}  # on the whole base
    assert said.count("effective batch 16 = 8 rows per call x 1 accumulated x 2 processes") == 1


@pytest.mark.slow
def test_every_objective_is_the_same_on_a_split_base(tmp_path):
    """Beside DDP over as many processes: some compare the rows of a call with each other."""
    names = [name for name in steer.OBJECTIVES if name != "amortise"]
    for strategy in ("ddp", "fsdp"):
        ran(tmp_path, "tiny", tmp_path / strategy, 2, strategy, 2, ",".join(names))
    for name in names:
        alike(tmp_path / "ddp" / name, tmp_path / "fsdp" / name)


@pytest.mark.slow
def test_a_pipeline_s_adapters_load_in_plain_diffusers(tmp_path):
    """One file, the single process's, and the pipeline's own loader takes it."""
    ran(tmp_path, "flux", tmp_path / "one", 1, "auto", 3)
    ran(tmp_path, "flux", tmp_path / "two", 2, "fsdp", 3)
    one, two = tmp_path / "one" / "direct", tmp_path / "two" / "direct"
    alike(one, two)
    pipes = [tiny_pipelines.build("flux") for _ in range(3)]
    for pipe, folder in zip(pipes, (one, two), strict=False):
        pipe.load_lora_weights(str(folder))
    drawn = [
        torch.as_tensor(
            pipe(
                "cat", height=32, width=32, num_inference_steps=2, output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images
        )
        for pipe in pipes
    ]  # fmt: skip
    assert torch.allclose(drawn[0], drawn[1], atol=1e-4)
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_first_process_killed_ends_the_run_and_it_goes_on_to_the_same_result(
    tmp_path, strategy
):
    """The one that writes and that the others are started by: none of them is left behind."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = "tiny", 2, strategy, 40, "direct", "save_every=4"
    ran(tmp_path, run[0], whole, *run[1:])
    process = started(tmp_path, run[0], cut, *run[1:])
    checkpoint = cut / "direct" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    others = children(process)
    assert others, process.communicate()[1][-2000:]
    begun = time.monotonic()
    wrong = said_when_killed(process, process.pid)  # to the end of all that write to its pipe
    assert all(map(gone, others))
    assert time.monotonic() - begun < 60
    assert process.returncode == -9
    assert "waited for another one that has ended" in wrong, wrong[-2000:]
    assert not (cut / "direct" / "finished.json").exists()
    ran(tmp_path, run[0], cut, *run[1:])
    a, b = adapters(whole / "direct"), adapters(cut / "direct")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert readings(whole / "direct") == readings(cut / "direct")


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_goes_on_to_the_same_result(tmp_path):
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    ran(tmp_path, "tiny", whole, 2, "fsdp", 40, "direct", "save_every=4")
    process = started(tmp_path, "tiny", cut, 2, "fsdp", 40, "direct", "save_every=4")
    checkpoint = cut / "direct" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    listed = children(process)
    assert listed, process.communicate()[1][-2000:]
    wrong = said_when_killed(process, listed[0])
    assert "waited for another one that has ended" in wrong or "terminated with code -9" in wrong
    assert not (cut / "direct" / "finished.json").exists()
    shutil.copytree(cut, other)
    ran(tmp_path, "tiny", cut, 2, "fsdp", 40, "direct", "save_every=4")
    a, b = adapters(whole / "direct"), adapters(cut / "direct")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert readings(whole / "direct") == readings(cut / "direct")
    ran(tmp_path, "tiny", other, 1, "auto", 40, "direct", "save_every=4")  # by another split
    c = adapters(other / "direct")
    assert max(float((a[k] - c[k]).abs().max()) for k in a) < 1e-4


def test_units_leave_nothing_large_to_be_gathered_at_once():
    flow = base_of("sdxl")
    found = units(flow)
    assert found[-1] is flow.denoiser
    assert len(set(map(id, found))) == len(found)
    order = {id(m): k for k, m in enumerate(found)}
    for k, m in enumerate(found):  # the inner ones first
        assert max(order.get(id(c), -1) for c in m.modules()) == k


def test_a_denoiser_that_is_the_flow_itself_is_refused():
    class Own(steer.FlowMap):
        event_shape = (2,)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def velocity(self, x, t):
            return self.layer(x)

        def jump(self, x, s, t):
            return x + (t - s) * self.layer(x)

    with pytest.raises(ValueError, match=r"does not say which module.*use ddp"):
        refuse_unshardable(Own())


@pytest.mark.parametrize("strategy", ["fsdp_cpu_offload", "deepspeed_stage_3"])
def test_other_ways_to_split_are_refused(strategy):
    with pytest.raises(ValueError, match="use fsdp, or auto or ddp"):
        Settings(strategy=strategy)


def test_a_strategy_that_is_misspelt_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown strategy 'fdsp': did you mean fsdp"):
        Settings(strategy="fdsp")
    assert Settings(strategy="ddp_find_unused_parameters_true").strategy.startswith("ddp")


def test_weights_of_a_kind_of_their_own_are_refused():
    """Quantised ones are a class: a part of one is no part of the weight."""

    class Packed(nn.Parameter):
        pass

    flow = test_tuning.tiny()
    stem = flow.network.stem
    stem.weight = Packed(stem.weight.detach(), requires_grad=False)
    with pytest.raises(ValueError, match=r"has Packed: load it without quantisation"):
        refuse_unshardable(flow)


def test_only_the_connection_s_errors_are_of_another_process():
    assert _of_another(
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    )
    assert _of_another(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not _of_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_an_objective_whose_processes_call_unevenly_is_refused():
    with pytest.raises(ValueError, match="'amortise' guides each prompt on the process"):
        test_tuning.tune(test_tuning.tiny(), objective="amortise", strategy="fsdp")
