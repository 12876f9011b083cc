"""`steer plan`: forecasts against measurement, and against figures of real sizes."""

import json
import shutil

import pytest
import torch

import recipes.planned
import steer
from benchmarks import card
from recipes.cli import main
from steer.adapters.inject import adapt
from steer.planning.live import Live, bytes_of, fake_mode, fused, saved_bytes
from steer.planning.report import CARDS, Lever, Plan, usable
from steer.planning.steps import Need
from steer.reward import Reward
from tests import tiny_pipelines as tiny
from tests.tiny_flows import PROMPT, flow

TOKENS = {"flux": 16, "sdxl": 16, "sana_sprint": 16, "flux3_klein": 80, "sd3": 32}
"""Tiny pipeline -> tokens of text that its denoiser sees."""


def quick(*names):
    """Return all of them, those not named here marked slow."""
    return [n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in TOKENS]


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def planned(model, reward=red, **more):
    return steer.plan(model, reward, cuda=False, levers=False, **{"tuning": False, **more})


def modules(one):
    return [m for m in one.pipe.components.values() if isinstance(m, torch.nn.Module)]


# ------------------------------------------------------------------ the counter


def test_the_counter_knows_what_is_alive():
    with Live() as live:
        a = torch.zeros(1000)
        assert (live.now, live.peak) == (4000, 4000)
        view = a[10:]
        b = a + 1
        assert live.now == 8000, "a view has no storage of its own"
        del a
        assert live.now == 8000, "the view holds it"
        del view, b
        assert (live.now, live.peak) == (0, 8000)


def test_tensors_without_values_count_as_real_ones():
    """Peaks of forward and backward pass, and what is kept between them."""
    found = []
    for real in (True, False):
        mode = fake_mode()
        x, w = torch.zeros(64, 32), torch.zeros(32, 32)
        if not real:
            x, w = mode.from_tensor(x), mode.from_tensor(w)
        x.requires_grad_()
        kept = saved_bytes(lambda x=x, w=w: ((x @ w).tanh() @ w).exp(), [w])
        with Live() as live:
            ((x @ w).tanh() @ w).exp().sum().backward()
        found.append((kept, live.peak, live.now))
    assert found[0] == found[1]
    assert found[0][0] == 2 * 64 * 32 * 4  # the outputs of tanh and exp


def test_attention_without_values_is_linear_in_the_length():
    kept = []
    for length in (256, 512):
        q = fake_mode().from_tensor(torch.zeros(1, 4, length, 16)).requires_grad_()
        with fused():
            kept.append(saved_bytes(lambda q=q: torch.nn.functional
                                    .scaled_dot_product_attention(q, q, q)))  # fmt: skip
    assert kept[1] == 2 * kept[0]


def test_bytes_of_counts_a_storage_once():
    a = torch.zeros(8)
    assert bytes_of([a, a[2:], a.view(2, 4)]) == 32


# ------------------------------------------------------------------ forecast and measurement


@pytest.mark.parametrize("name", quick("flux", "sdxl", "sana_sprint", "flux3_klein"))
def test_a_guided_step_is_as_measured(name):
    """The peak of live tensors of a real run of `steer.sample`, within 10 %."""
    one = flow(name)
    plan = planned(one, text_tokens=TOKENS[name])
    for rows in (1, 4):
        with Live().hold(*modules(one)) as live:
            steer.sample(one, red, [PROMPT], particles=rows, steps=2, method="fmrg-j")
        print(f"{name}, {rows} rows: planned {plan.guided.at(rows)}, measured {live.peak}")
        assert plan.guided.at(rows) == pytest.approx(live.peak, rel=0.1)
    assert plan.guided.row > 0.2 * plan.guided.at(1), "rows matter, or this shows nothing"


@pytest.mark.parametrize("name", quick("flux"))
def test_a_tuning_step_is_as_measured(name):
    """The peak of a real run of `steer.finetune`, three steps, within 10 %."""
    one = flow(name)
    plan = planned(one, tuning=True, rank=4, text_tokens=TOKENS[name])
    for rows in (1, 4):
        with Live().hold(*modules(one)) as live:
            steer.finetune(
                one, red, [PROMPT], "direct", steps=3, options={"jumps": [4]}, temperature=0.1,
                rank=4, batch_size=rows, check_every=0, precision="32-true", accelerator="cpu",
                progress=False,
            )  # fmt: skip
        print(f"{name}, {rows} rows: planned {plan.tuning.at(rows)}, measured {live.peak}")
        assert plan.tuning.at(rows) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.slow
def test_a_base_split_over_processes():
    """Weights fall as 1 / N, down to what is gathered; rows, adapters and reward stay."""
    one = flow("flux")
    size = sum(p.numel() * p.element_size() for p in one.denoiser.parameters())
    given = {"tuning": True, "rank": 4, "text_tokens": TOKENS["flux"]}
    whole = planned(one, **given)
    less = {}
    for count in (2, 4):
        plan = planned(one, devices=count, strategy="fsdp", **given)
        assert plan.tuning.row == whole.tuning.row
        less[count] = whole.tuning.base - plan.tuning.base
        assert f"each of {count} processes" in plan.notes[-1]
    assert less[4] - less[2] == pytest.approx(size / 4, rel=0.01)
    assert planned(one, devices=4, strategy="ddp", **given).tuning == whole.tuning


@pytest.mark.slow
def test_the_benchmark_of_a_card_measures_what_is_planned():
    """On a CPU: random weights from configurations, no text encoder, and the same bars."""
    one = flow("sd3")
    size = {"height": one.height, "width": one.width, "text_tokens": TOKENS["sd3"]}
    row = card.measured(one.pipe, torch.device("cpu"), [1, 2], 1, **size)
    assert "said" not in row
    for name in ("guided, 1 rows", "guided, 2 rows", "tuning, 1 row"):
        found, plan = row[name]
        assert found == pytest.approx(plan, rel=0.1), name
    assert 0.5 < row["step / hand"] < 2
    assert next(one.parameters()).device.type == "cpu", "the model's own tensors are left alone"


def test_an_embedded_model_is_as_measured():
    one = steer.load("emoji")
    plan = planned("emoji", text_tokens=None)
    with Live().hold(one) as live:
        steer.sample(one, red, ["a fox"], particles=4, steps=2, method="fmrg-j")
    assert plan.guided.at(4) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize(("name", "part"), [("fashion", "denoiser"), ("emoji-diffusers", "unet")])
def test_the_other_embedded_models_are_planned_at_their_size(name, part):
    plan = planned(name)
    assert plan.model == name
    assert plan.size == {"fashion": (28, 28), "emoji-diffusers": (32, 32)}[name]
    assert plan.weights[part] == bytes_of(steer.load(name).denoiser.parameters())


def test_a_method_without_a_gradient_needs_less():
    one = flow("flux")
    guided, plain = (planned(one, method=m, text_tokens=16) for m in ("fmrg-j", "best-of-n"))
    assert plain.guided.row < 0.8 * guided.guided.row
    with Live().hold(*modules(one)) as live:
        steer.sample(one, red, [PROMPT], particles=4, steps=2, method="best-of-n")
    assert plain.guided.at(4) == pytest.approx(live.peak, rel=0.1)


def test_a_folder_needs_its_json_files_alone(tmp_path):
    """No weights are there; figures are those of the live pipeline."""
    tiny.save("flux", tmp_path / "whole")
    for file in (tmp_path / "whole").rglob("*.json"):
        target = tmp_path / "bare" / file.relative_to(tmp_path / "whole")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    assert not list((tmp_path / "bare").rglob("*.safetensors"))
    bare = planned(str(tmp_path / "bare"), height=16, width=16, text_tokens=16)
    assert bare.guided == planned(flow("flux"), text_tokens=16).guided
    assert set(bare.weights) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    shutil.rmtree(tmp_path / "bare" / "vae")
    with pytest.raises(FileNotFoundError, match="weights are not needed"):
        planned(str(tmp_path / "bare"), height=16, width=16)


def test_a_reward_is_weighed():
    class Wide(Reward):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1000)

        def forward(self, images, prompts=None, metadata=None):
            return self.layer(images.mean((2, 3))).mean(1)

    plan = planned(flow("flux"), Wide(), text_tokens=16)
    assert plan.weights["reward"] == 16000
    bare = planned(flow("flux"), text_tokens=16)
    assert plan.guided.at(1) >= bare.guided.at(1) + 16000


# ------------------------------------------------------------------ real sizes

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "weights", "denoiser", "decoder"),
    [
        pytest.param("flux-dev", 22.2, 17.1, None, marks=pytest.mark.slow),
        pytest.param("flux3-klein", 10.3, 16.4, 11.1, marks=pytest.mark.slow),
        pytest.param("sana-sprint-0.6b", 1.1, 2.8, None, marks=pytest.mark.slow),
        pytest.param("sana-sprint-1.6b", 3.0, 3.8, None, marks=pytest.mark.slow),
    ],
)
def test_real_sizes(name, weights, denoiser, decoder):
    """Earlier figures of the same kind, computed on tensors that were said to be on CUDA."""
    plan = steer.plan(name, levers=False, tuning=False)
    assert plan.weights["transformer"] / GIB == pytest.approx(weights, abs=0.06)
    assert plan.saved["denoiser"] / GIB == pytest.approx(denoiser, abs=0.06)
    if decoder is not None:
        assert plan.saved["decoder"] / GIB == pytest.approx(decoder, abs=0.06)
    assert plan.guided.at(1) > plan.weight + sum(plan.saved.values())


# ------------------------------------------------------------------ what is said of it


def test_levers_say_what_they_save():
    plan = steer.plan(flow("flux", dtype=torch.bfloat16), red, text_tokens=16, rows=2)
    levers = {lever.name: lever.need.at(2) for lever in plan.levers}
    here = plan.guided.at(2)
    texts = sum(size for name, size in plan.weights.items() if "text" in name)
    assert here - levers["text encoders dropped"] == texts > 0
    assert levers["checkpointing"] < here
    assert levers["weights with requires_grad"] > here
    assert levers["8-bit weights of the denoiser"] > here, "kept whole for the backward pass"
    assert levers["half-size pictures for the gradient"] < here
    assert plan.stack[3].need.at(2) < levers["checkpointing"], "the levers add up"


def need(base, row):
    return Need(round(base * GIB), round(row * GIB))


def a_plan(base=10.0, row=4.0, **more):
    known = {
        "model": "m", "source": "s", "size": (64, 64), "dtype": "bfloat16", "cuda": True,
        "rows": 4, "method": "fmtt", "objective": "direct", "reward": "r", "parameters": {},
        "weights": {"transformer": 8 * GIB}, "saved": {}, "guided": need(base, row),
    }  # fmt: skip
    return Plan(**{**known, **more})


def test_what_fits_a_card():
    plan = a_plan()
    assert [plan.fits(card).rows for card in CARDS] == [0, 1, 2, 8, 16, 30]
    assert usable(24) == pytest.approx(21.85 * GIB)
    assert usable(0.5) == 0


def test_the_line_says_what_to_do():
    plan = a_plan()
    assert plan.line() == (
        "memory: weights 8.0 GiB (bfloat16), a guided step of 4 rows at 64 x 64 about 26.0 GiB"
    )
    assert plan.line(70 * GIB, 80 * GIB).endswith("the device has 80.0 GiB, 70.0 GiB of it free")
    assert plan.line(20 * GIB, 24 * GIB).endswith("too little, take --batch-size 2")
    assert "too little for one row" in plan.line(12 * GIB, 16 * GIB)
    tuned = a_plan(tuning=need(12, 8))
    assert tuned.line(30 * GIB, 32 * GIB).endswith("too little, take --micro-batch 2")


def test_the_command_prints_tables_and_json(monkeypatch, capsys):
    """Of one plan, which is made for real in the other tests."""
    asked, saving = {}, Lever("checkpointing", "checkpointing=True", need(9, 1))
    made = a_plan(
        calls={"nfe": 48, "reward_calls": 17}, parameters={"transformer": 4 * 10**9},
        tuning=need(12, 8), stack=[Lever("", "", need(10, 4)), saving], levers=[saving],
    )  # fmt: skip
    monkeypatch.setattr(steer, "plan", lambda *given, **more: asked.update(more) or made)
    assert main(["plan", "--model", "m", "--rows", "4", "--height", "64", "--card", "12"]) == 0
    said = capsys.readouterr().out
    for text in ("a guided step (fmtt)", "a tuning step (direct)", "141 GB", "kept for the",
                 "12 GB: 1 row a call with checkpointing", "a particle costs 48 NFE"):  # fmt: skip
        assert text in said
    assert (asked["rows"], asked["height"], asked["cuda"]) == (4, 64, True)
    assert main(["plan", "--model", "m", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["steps"]["guided"]["peak"] == 26 * GIB
    assert figures["cards"]["12"] == {"rows": 1, "levers": ["checkpointing"]}
    assert main(["plan", "--table", "--models", "[m]"]) == 0
    assert "| 1 c | 1 | 2 | 8 | 16 | 30 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "--model", "m", "--card", "8"])


def test_a_name_that_is_not_known_is_answered_with_the_nearest(capsys):
    assert main(["plan", "--model", "flux-def"]) == 2
    said = capsys.readouterr().err
    assert "flux-dev" in said
    assert "--include '*.json'" in said


def test_a_run_says_its_memory_where_that_is_known(tmp_path, monkeypatch, capsys):
    """On a device with a made-up memory; nothing on the CPU, whose memory is not asked for."""
    command = ["sample", "--model", "emoji", "--reward", "colour:name=red", "--prompt", "a fox",
               "--particles", "2", "--steps", "1", "--overwrite", "--out"]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "400")
    assert main([*command, str(tmp_path / "a")]) == 0
    assert "memory:" not in capsys.readouterr().err
    monkeypatch.setattr(recipes.planned, "memory_of", lambda device: (15 * 2**20, 24 * 2**20))
    assert main([*command, str(tmp_path / "b")]) == 0
    said = capsys.readouterr().err
    assert "memory: weights 12 MiB (float32), a guided step of 2 rows at 32 x 32" in said
    assert "24 MiB, 15 MiB of it free: too little" in said


def test_tuning_says_its_memory_too(monkeypatch):
    from rich.console import Console

    screen = Console(record=True, width=400)
    monkeypatch.setattr(recipes.planned, "memory_of", lambda device: (2**30, 2**31))
    recipes.planned.say_memory(
        screen, flow("flux"), "colour:name=red", "cuda", rows=4, tuning=True, rank=4
    )
    assert "a tuning step of 4 rows at 16 x 16" in screen.export_text()
    recipes.planned.say_memory(screen, "no/such", "colour:name=red", "cuda", rows=4)
    assert screen.export_text() == "", "what cannot be planned is run all the same"


def test_the_models_own_tensors_are_left_alone():
    one = flow("flux")
    before = {name: p.requires_grad for name, p in one.named_parameters()}
    planned(one, tuning=True, rank=2, text_tokens=16)
    assert {name: p.requires_grad for name, p in one.named_parameters()} == before
    assert adapt(one, 2) is not None, "no adapters were left on it"
