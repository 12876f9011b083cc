"""A velocity model becomes a map by adapters and a second time."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import steer
from recipes.distill import distill, velocity_of
from recipes.distill_data import data_of
from recipes.fitting import divided, place_of
from steer.adapters.inject import adapt
from steer.adapters.store import WEIGHTS, read_metadata
from steer.models.second_timed import fresh_second_time, with_second_time
from steer.training.adapting import AdapterTraining
from tests.children import said_to_be_held, say_what_is_held
from tests.tiny_flows import PROMPT, flow, pipe, seen_as

QUICK = {"steps": 4, "batch_size": 4, "rank": 4, "data": "emoji", "save_every": 2}
PROMPTS = ["fox", "red apple"]


@pytest.fixture(scope="module")
def emoji():
    return steer.load("emoji")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "map"
    return distill("emoji", "psd-m", out=out, learning_rate=1e-2, **QUICK)


def points(one, n=2):
    return torch.randn(n, *one.event_shape, generator=torch.Generator().manual_seed(3))


def euler(base, x, s, t):
    return x + (t - s) * base.velocity(x, s)


def test_before_training_the_map_is_the_model_bit_for_bit(emoji):
    timed = with_second_time(emoji, fresh_second_time(emoji))
    tuned = adapt(timed, 4)
    base, one, x = emoji.given(PROMPTS), tuned.given(PROMPTS), points(emoji)
    for t in (0.0, 0.4, 0.9):
        assert torch.equal(one.velocity(x, t), base.velocity(x, t))
        assert torch.equal(one.jump(x, t, t), x)
        assert torch.equal(one.jump(x, t, 1.0), euler(base, x, t, 1.0))
    assert (one.kind, timed.kind) == ("two-time", "two-time")


@pytest.mark.parametrize("name", ["emoji", "sd3"])
def test_the_second_time_is_trained_and_the_model_beside_it_is_not(emoji, name):
    base = emoji if name == "emoji" else velocity_of(flow(name))
    term = fresh_second_time(base)
    tuned = adapt(with_second_time(base, term), 4)
    AdapterTraining(tuned, term, None, lambda step: None, steps=1)
    for view in (tuned, copy.deepcopy(tuned)):
        one = view.given([PROMPT])
        one.jump(points(base), 0.2, 0.9).square().sum().backward()
        own = one.flow.second_time
        assert own.out.weight.grad.abs().max() > 0
        named = dict(one.named_parameters())
        assert {n for n, p in named.items() if p.grad is not None} <= {
            n for n in named if ".lora_" in n or "second_time" in n
        }


@pytest.mark.parametrize("name", ["sd15_flow", "sd3", "flux"])
def test_a_pipeline_too(name):
    base = velocity_of(flow(name))
    tuned = adapt(with_second_time(base, fresh_second_time(base)), 4)
    plain, one, x = base.given([PROMPT]), tuned.given([PROMPT]), points(base)
    assert torch.equal(one.velocity(x, 0.3), plain.velocity(x, 0.3))
    assert torch.equal(one.jump(x, 0.3, 0.8), plain.jump(x, 0.3, 0.8))
    assert one.evaluations == 1


def test_a_run_leaves_adapters_with_the_second_time_inside(made, emoji):
    notes = read_metadata(made)
    assert notes["second_time"]["module"] == "start"
    assert (notes["rule"], notes["base"]) == ("psd-m", "emoji")
    assert safetensors.torch.load_file(made / WEIGHTS)["second_time.out.weight"].abs().max() > 0
    found = steer.load("emoji", lora=made)
    x, base = points(emoji), emoji.given(PROMPTS)
    there = found.given(PROMPTS).jump(x, 0.0, 1.0)
    assert (there - euler(base, x, 0.0, 1.0)).abs().max() > 1e-4
    none = steer.load("emoji", lora=made, lora_scale=0.0).given(PROMPTS)
    assert torch.equal(none.velocity(x, 0.3), base.velocity(x, 0.3))
    assert torch.equal(none.jump(x, 0.2, 0.9), euler(base, x, 0.2, 0.9))


def test_a_fresh_process_reads_the_same_map(made, emoji):
    code = (
        "import steer, torch, sys\n"
        "x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))\n"
        f"flow = steer.load('emoji', lora={str(made)!r}).given({PROMPTS!r})\n"
        "with torch.no_grad(): print(flow.jump(x, 0.0, 1.0).double().sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    with torch.no_grad():
        here = steer.load("emoji", lora=made).given(PROMPTS).jump(points(emoji), 0.0, 1.0)
    assert float(done.stdout) == pytest.approx(here.double().sum().item(), rel=1e-5)


def test_a_resumed_run_equals_one_that_never_stopped(made, tmp_path, monkeypatch):
    whole = AdapterTraining.training_step

    def cut(self, batch, index):
        if self.global_step == 3:
            raise RuntimeError("power cut")
        return whole(self, batch, index)

    settings = {"learning_rate": 1e-2, **QUICK}
    with monkeypatch.context() as patched:
        patched.setattr(AdapterTraining, "training_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            distill("emoji", "psd-m", out=tmp_path / "map", **settings)
    with pytest.raises(ValueError, match="started with other settings"):
        distill("emoji", "psd-m", out=tmp_path / "map", seed=1, **settings)
    distill("emoji", "psd-m", out=tmp_path / "map", **settings)
    here, there = (safetensors.torch.load_file(f / WEIGHTS) for f in (tmp_path / "map", made))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_pipeline_learns_from_its_own_samples_and_from_a_folder(tmp_path):
    one = seen_as(pipe("sd15_flow"), "sd15_flow")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (40, 30), (80 * k, 10, 200)).save(folder / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": f"a plain {k}"} for k in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    quick = {**QUICK, "steps": 2}
    for data in ("samples", str(folder)):
        out = tmp_path / data.replace("/", "_")
        options = {**quick, "data": data, "own_steps": 2, "prompts": ["a fox"]}
        distill(one, "lsd", out=out, guidance=2.0, **options)
        found = steer.load(one, lora=out)
        assert found.kind == "two-time"
        assert found.given(["a fox"]).jump(points(found), 0.0, 1.0).isfinite().all()
        assert (out / "pytorch_lora_weights.safetensors").is_file()


def test_what_cannot_be_distilled_is_said(tmp_path):
    with pytest.raises(ValueError, match="lsdd"):
        distill("emoji", "lsdd", out=tmp_path / "a", **QUICK)
    with pytest.raises(ValueError, match="is not known"):
        fresh_second_time(steer.GaussianMixture([[0.0, 0.0]], 1.0))
    with pytest.raises(ValueError, match="has no module 'strat'"):
        distill("emoji", "lsd", out=tmp_path / "b", module="strat", **QUICK)
    with pytest.raises(FileNotFoundError, match="no folder of pictures"):
        distill("emoji", "psd-m", out=tmp_path / "c", **{**QUICK, "data": "nowhere"})


def test_a_file_for_another_model_is_refused(made):
    with pytest.raises(ValueError, match="were made for 'emoji'"):
        steer.load("emoji-diffusers", lora=made)


def test_a_finished_folder_is_not_taken_for_other_settings(made, capsys):
    assert distill("emoji", "psd-m", out=made, learning_rate=1e-2, **QUICK) == made
    with pytest.raises(ValueError, match="started with other settings"):
        distill("emoji", "lsd", out=made, learning_rate=1e-2, **QUICK)


def test_samples_of_another_run_are_not_trained_on(emoji, tmp_path):
    def drawn(prompt):
        sizes = {"size": 4, "seed": 0, "empty": 0.0}
        given = {"prompts": [prompt], "own_steps": 1, "name": "emoji", **sizes}
        x, told = data_of("samples", "emoji", tmp_path, **given).on(emoji)(0)
        assert set(told) == {prompt}
        return x

    one = drawn("a fox")
    file = tmp_path / "samples.safetensors"
    written = file.stat().st_mtime_ns
    assert torch.equal(one, drawn("a fox"))
    assert file.stat().st_mtime_ns == written
    assert not torch.equal(one, drawn("an owl"))


SEVERAL = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests import test_distill
if __name__ == "__main__":
    test_distill.several(*sys.argv[1:])
"""


def several(kind, out, strategy, rule):
    """Distill in two processes, and say what this one holds of the base."""
    torch.set_num_threads(1)
    say_what_is_held()
    one = "emoji" if kind == "emoji" else seen_as(pipe(kind), kind)
    settings = {**QUICK, "data": "samples", "own_steps": 2, "prompts": ["a fox", "an owl"]}
    distill(
        one, rule, out=Path(out), devices=2, strategy=strategy, learning_rate=1e-2,
        derivative="difference", device="cpu", guidance=2.0, **settings,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rule"), [("emoji", "lsd"), ("sd3", "psd-m")])
def test_a_sharded_base_learns_the_map_of_a_whole_one(kind, rule, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SEVERAL)
    for strategy in ("ddp", "fsdp"):
        done = subprocess.run(
            [sys.executable, script, kind, tmp_path / strategy, strategy, rule],
            capture_output=True, text=True, timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    held = said_to_be_held(done.stdout)
    assert sorted(rank for rank, _, _ in held) == ["0", "1"]
    assert all(int(own) / int(whole) < 0.6 for _, own, whole in held)
    a, b = (safetensors.torch.load_file(tmp_path / s / WEIGHTS) for s in ("ddp", "fsdp"))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-5
    assert sum(float(p.abs().sum()) for name, p in a.items() if "lora_B" in name) > 0
    drawn = [
        safetensors.torch.load_file(tmp_path / s / "samples.safetensors")["x"]
        for s in ("ddp", "fsdp")
    ]
    assert torch.allclose(*drawn, atol=1e-5)


def test_what_a_sharded_base_cannot_do_is_said(tmp_path):
    with pytest.raises(ValueError, match="no forward-mode"):
        distill("emoji", "lsd", out=tmp_path, strategy="fsdp", derivative="jvp", **QUICK)
    with pytest.raises(ValueError, match="does not divide by 3 processes"):
        divided(16, 3)
    with pytest.raises(ValueError, match="takes one for each process"):
        place_of("cpu:0", 2)
    one = seen_as(pipe("sd3"), "sd3")
    with pytest.raises(ValueError, match="encoded before the run"):
        distill(one, "psd-m", out=tmp_path, strategy="fsdp", device="cpu", **QUICK)


def test_a_learned_weight_is_learned(emoji):
    from steer.training.rules import MapObjective, build

    term = fresh_second_time(emoji)
    tuned = adapt(with_second_time(emoji, term), 2)
    rule = MapObjective(build("psd-m"), weight="learned")
    training = AdapterTraining(tuned, term, rule, lambda step: None, steps=1)
    optimizer = training.configure_optimizers()["optimizer"]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in rule.parameters()} <= trained
    assert list(rule.parameters())
