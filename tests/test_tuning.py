import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import steer
from rewards.combine.normalised import Normalised
from rewards.pixels.tone import Contrast
from steer.adapters.fingerprint import fingerprint
from steer.adapters.inject import adapt, rejoin
from steer.adapters.store import load_adapters
from steer.models.loading import load, save
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.noise import Draws
from steer.objectives.batch import Batch, refuse_not_finite
from steer.objectives.direct import Direct
from steer.objectives.table import TABLE, build
from steer.reward import wrap
from steer.sampling.calibrate import spread
from steer.tuning.module import RewardTuning
from steer.tuning.prompts import Prompts
from steer.tuning.settings import Settings

PROMPTS = ["cat", "red fox", "blue dog", "owl", "", "red cat"]
QUICK = {
    "rank": 2, "batch_size": 4, "warm": 2, "check_every": 0, "save_every": 2, "progress": False,
    "precision": "32-true", "accelerator": "cpu",
}  # fmt: skip


def redness(images):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def tiny(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TwoTimeUNet(
            ["cat", "red", "fox", "blue", "dog", "owl"], [8, 8], [1, 1], size=8, width=16, groups=2
        )
        for p in network.parameters():  # the zero layers too: a base that does something
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return NetworkFlow(network).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def flow():
    return tiny()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(tiny(), folder)
    return folder


def tune(flow, out=None, steps=5, objective="direct", reward=redness, **changes):
    return steer.finetune(
        flow, reward, PROMPTS, objective, steps, temperature=0.1, out=out, **{**QUICK, **changes}
    )


def state(tuned):
    return {k: p.detach().clone() for k, p in tuned.adapters().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("objective", TABLE)
def test_every_objective_takes_steps_on_the_adapters_alone(flow, objective):
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    tuned = tune(flow, steps=2, objective=objective, batch_size=8)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    x = torch.randn(3, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tuned.base.jump(x, 0.0, 1.0), flow.jump(x, 0.0, 1.0))
    assert not torch.equal(tuned.jump(x, 0.0, 1.0), flow.jump(x, 0.0, 1.0))


@pytest.mark.parametrize("objective", sorted(set(TABLE) - {"value", "grpo", "nft"}))
def test_losses_do_not_depend_on_micro_batches(flow, objective):
    """Rows 0 to 16 at once, or in two calls: the loss is a mean over rows.

    Not so for nft and grpo, whose advantages share one deviation, nor for value, which remembers.
    """
    rule = build(objective)
    tuned = adapt(flow, 2)
    module = RewardTuning(
        tuned, rule, wrap(redness), Prompts(PROMPTS), steps=9, batch_size=16, micro_batch=16,
        temperature=0.1,
    )  # fmt: skip
    with torch.no_grad():  # student and base differ
        for k, p in enumerate(tuned.adapters().values()):
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    whole = rule(module.batch(3, 0, 16))["loss"]
    halves = [rule(module.batch(3, a, a + 8))["loss"] for a in (0, 8)]
    assert torch.allclose(whole, sum(halves) / 2, rtol=1e-4, atol=1e-5)


def test_a_step_starts_at_the_base(flow):
    """Before the first step the student's pictures are the base's, bit for bit."""
    tuned = adapt(flow, 2)
    batch = RewardTuning(
        tuned, Direct(), wrap(redness), Prompts(PROMPTS), steps=1, batch_size=4, micro_batch=4,
        temperature=0.1,
    ).batch(0, 0, 4)  # fmt: skip
    x = batch.noise()
    for other in (batch.base, batch.average):
        assert torch.equal(batch.student.jump(x, 0.0, 1.0), other.jump(x, 0.0, 1.0))


def test_tuning_raises_the_reward(flow):
    tuned = tune(flow, steps=40, learning_rate=1e-2, options={"jumps": [1], "anchor": 0.1})
    x = torch.randn(64, *flow.event_shape, generator=torch.Generator().manual_seed(3))
    gain = redness(tuned.decode(tuned.jump(x, 0.0, 1.0))) - redness(
        flow.decode(flow.jump(x, 0.0, 1.0))
    )
    assert gain.mean() > 10 * gain.std() / 8


def test_resume_after_kill_9_equals_a_run_that_never_stopped(model, tmp_path):
    """The weights, bit for bit: optimizer, average, data order and counts are taken up."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, signal
import test_tuning, steer
from steer.tuning.module import RewardTuning
whole = RewardTuning.training_step
def step(self, batch, index):
    if self.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, batch, index)
RewardTuning.training_step = step
test_tuning.tune(steer.load({str(model)!r}), sys.argv[1], 7, micro_batch=2)
"""
    killed = [sys.executable, "-c", script, str(tmp_path / "cut"), "5"]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    for name in ("whole", "cut"):
        tune(steer.load(model), tmp_path / name, 7, micro_batch=2)
    a, b = (steer.load(model, lora=tmp_path / name) for name in ("whole", "cut"))
    assert same(state(a), state(b))
    ends = [json.loads((tmp_path / n / "finished.json").read_text()) for n in ("whole", "cut")]
    assert ends[0]["nfe"] == ends[1]["nfe"]


def test_a_finished_run_is_loaded_and_another_is_refused(model, tmp_path):
    flow = load(model)
    first = state(tune(flow, tmp_path / "run", steps=3))
    start = time.perf_counter()
    again = tune(flow, tmp_path / "run", steps=3)
    assert same(first, state(again))
    assert time.perf_counter() - start < 2
    with pytest.raises(FileExistsError, match=r"with other arguments \(temperature"):
        steer.finetune(
            flow, redness, PROMPTS, "direct", 3, temperature=0.2, out=tmp_path / "run", **QUICK
        )
    other = tiny(1)
    with pytest.raises(FileExistsError, match="base_sha256"):
        tune(other, tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match="were made for"):
        load_adapters(other, tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="contains no tuning run"):
        tune(flow, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_run_begun_under_earlier_names_goes_on(model, tmp_path, monkeypatch):
    """Its options and settings are told by today's names; only what differs is refused."""
    names = {"data_anchor": 0.2, "noise_anchor": 0.1}
    whole = tune(load(model), None, 5, options=names, gradient_clip=0.5)
    step = RewardTuning.training_step

    def cut(self, batch, index):
        if self.global_step == 3:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTuning, "training_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            tune(load(model), tmp_path / "run", 5, options=names, gradient_clip=0.5)
    file = tmp_path / "run" / "run.json"
    known = json.loads(file.read_text())
    for part, old, new in (
        ("options", "data", "data_anchor"),
        ("options", "noise", "noise_anchor"),
        ("settings", "clip", "gradient_clip"),
    ):
        known[part][old] = known[part].pop(new)
    file.write_text(json.dumps(known))
    with pytest.raises(FileExistsError, match=r"\(settings.gradient_clip: 0.5 -> 1.0\)"):
        tune(load(model), tmp_path / "run", 5, options=names)
    with pytest.raises(FileExistsError, match=r"\(options.data_anchor: 0.2 -> 0.0\)"):
        tune(load(model), tmp_path / "run", 5, options={"noise_anchor": 0.1}, gradient_clip=0.5)
    tuned = tune(load(model), tmp_path / "run", 5, options=names, gradient_clip=0.5)
    assert same(state(whole), state(tuned))


def test_a_checkpoint_of_another_base_is_refused(model, tmp_path):
    tune(load(model), tmp_path / "run", steps=2)
    (tmp_path / "run" / "finished.json").unlink()
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    other = tiny(1)
    identity["base_sha256"], identity["base"] = fingerprint(other), ""
    (tmp_path / "run" / "run.json").write_text(json.dumps(identity))
    with pytest.raises(ValueError, match="checkpoint was made on"):
        tune(other, tmp_path / "run", steps=2)


def test_checkpoints_hold_the_adapters_alone(model, tmp_path):
    tuned = tune(load(model), tmp_path / "run", steps=2)
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["state_dict"]
    assert all("lora_" in name for name in kept["state_dict"])
    assert kept["base"]["sha256"] == fingerprint(tuned)
    # peft's own reader
    from peft import PeftModel

    again = PeftModel.from_pretrained(load(model), tmp_path / "run").base_model.model
    x = torch.randn(2, *tuned.event_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.jump(x, 0.0, 1.0), tuned.jump(x, 0.0, 1.0))


def test_a_full_disk_leaves_the_last_checkpoint_whole(model, tmp_path):
    flow = load(model)
    tune(flow, tmp_path / "run", steps=2)
    (tmp_path / "run" / "finished.json").unlink()
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = file.read_bytes()
    adapters = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    identity["steps"] = 6
    (tmp_path / "run" / "run.json").write_text(json.dumps(identity))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
        with pytest.raises(OSError, match="too large"):
            tune(flow, tmp_path / "run", steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == adapters
    tune(flow, tmp_path / "run", steps=6)  # and it goes on


def test_two_processes_give_the_same_loss_curve(model, tmp_path, capsys):
    """DDP over two processes at the same effective batch, as a user's script would run it.

    The reward learns its scale over the run, from the pictures of both.
    """
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_tuning, steer
if __name__ == "__main__":
    test_tuning.tune(
        steer.load({str(model)!r}), sys.argv[1], 4, micro_batch=2, devices=2,
        reward=test_tuning.Normalised(test_tuning.redness), strategy="ddp",
    )
""")
    curves, reward = [], Normalised(redness)
    tune(steer.load(model), tmp_path / "1", 4, micro_batch=2, reward=reward)
    command = [sys.executable, script, tmp_path / "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 rows per call x 2 accumulated x 1 process" in capsys.readouterr().out
    assert "x 2 processes" in done.stdout
    for n in (1, 2):
        out = tmp_path / str(n)
        lines = (out / "log" / "version_0" / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("train/loss")
        curves.append(
            [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
        )
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    a, b = (steer.load(model, lora=tmp_path / name) for name in "12")
    for p, q in zip(state(a).values(), state(b).values(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_costs_are_counted(flow):
    """One jump with its weights' gradient, the base's jump, no gradient in the noise."""
    tuned = adapt(flow, 2)
    module = RewardTuning(
        tuned, Direct(jumps=[1]), wrap(redness), Prompts(PROMPTS), steps=1, batch_size=4,
        micro_batch=4, temperature=0.1,
    )  # fmt: skip
    loss = module.objective(module.batch(0, 0, 4))["loss"]
    module.on_before_backward(loss)
    loss.backward()
    module.on_after_backward()
    counts = module.counts
    assert (counts.forward, counts.backward, counts.weights, counts.again) == (8, 0, 4, 0)
    assert (counts.reward, counts.reward_gradient, counts.nfe) == (4, 4, 12)


def test_checkpointing_gives_the_same_gradients(flow):
    def gradients(checkpoint):
        tuned = adapt(flow, 2)
        tuned.checkpoint = checkpoint
        module = RewardTuning(
            tuned, Direct(jumps=[2], consistency=1.0), wrap(redness), Prompts(PROMPTS), steps=1,
            batch_size=4, micro_batch=4, temperature=0.1,
        )  # fmt: skip
        with torch.no_grad():
            for k, p in enumerate(tuned.adapters().values()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * 0.05)
        module.objective(module.batch(0, 0, 4))["loss"].backward()
        return torch.cat([p.grad.flatten() for p in tuned.adapters().values()]), module.counts

    (plain, first), (again, second) = gradients(False), gradients(True)
    assert torch.equal(plain, again)
    assert second.again > 0 == first.again


def test_prompts_are_all_seen_before_any_twice():
    prompts = Prompts(list("abcdefg"), seed=1)
    seen, _ = prompts(0, 21)
    assert [sorted(seen[k : k + 7]) for k in (0, 7, 14)] == [list("abcdefg")] * 3
    assert seen[:7] != seen[7:14]
    assert prompts(5, 9)[0] == seen[5:9]
    assert prompts.epochs(5, 9) == [0, 0, 1, 1]


def test_draws_belong_to_rows():
    whole = Draws(3, 5, (0, 700))
    parts = [Draws(3, 5, (0, 130)), Draws(3, 5, (130, 700))]
    for draw in (lambda d: d.normal((2,)), lambda d: d.uniform(), lambda d: d.normal((3, 8, 8))):
        assert torch.equal(draw(whole), torch.cat([draw(d) for d in parts]))
    assert whole.choice(1000) == parts[0].choice(1000)
    assert not torch.equal(Draws(3, 6, (0, 9)).normal(()), Draws(3, 5, (0, 9)).normal(()))


def test_temperature_comes_from_the_spread(flow):
    deviation = spread(flow, wrap(redness), PROMPTS)
    assert deviation == pytest.approx(2 * spread(flow, 0.5 * wrap(redness), PROMPTS))
    with pytest.raises(ValueError, match="from a standard deviation of zero"):
        spread(flow, wrap(lambda x: x.new_ones(len(x))), PROMPTS)


@pytest.mark.parametrize(("prompts", "micro"), [(PROMPTS * 3, None), (PROMPTS * 3, 2), (None, 16)])
def test_one_jump_samples_come_in_micro_batches(flow, monkeypatch, prompts, micro):
    """128 of them, at most 64 rows a call, or micro_batch; the spread is that of one call."""
    rows = []

    def noted(images):
        rows.append(len(images))
        return redness(images)

    whole = spread(flow, wrap(noted), prompts, batch_size=1000)
    assert rows == [128]
    rows.clear()
    networks = []
    jump = NetworkFlow.jump
    monkeypatch.setattr(
        NetworkFlow, "jump", lambda self, x, *t: networks.append(len(x)) or jump(self, x, *t)
    )
    tuned = steer.finetune(
        flow, noted, prompts, "direct", 1, **QUICK | {"micro_batch": micro, "batch_size": 16}
    )
    most = 64 if micro is None else micro
    assert max(rows) == max(networks) == most
    assert tuned.adapters()
    assert spread(flow, wrap(noted), prompts, batch_size=most) == pytest.approx(whole, rel=1e-5)


def test_errors_say_what_to_do(flow, tmp_path):
    cases = [
        ({"objective": "dirct"}, ValueError, "did you mean direct"),
        ({"options": {"ancor": 1}}, ValueError, "takes no option 'ancor': did you mean anchor"),
        ({"options": {"noise": 1}}, ValueError, "it is called noise_anchor now"),
        ({"rankk": 3}, ValueError, "did you mean rank"),
        ({"clip": 3.0}, ValueError, "it is called gradient_clip now"),
        ({"gradient_clip": 0.0}, ValueError, "gradient_clip must be above zero"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"batch_size": 6, "micro_batch": 4}, ValueError, "multiple of 4"),
        ({"objective": "nft", "batch_size": 6}, ValueError, "multiple of 4"),
        ({"targets": ["attention"]}, ValueError, "no linear layer or convolution of NetworkFlow"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            tune(flow, **changes)
    with pytest.raises(ValueError, match="temperature and strength both"):
        steer.finetune(flow, redness, PROMPTS, temperature=1.0, strength=2.0)
    with pytest.raises(TypeError, match=r"prompts=\['cat'\]"):
        steer.finetune(flow, redness, "cat")
    with pytest.raises(ValueError, match="list of prompts is empty"):
        steer.finetune(flow, redness, [], temperature=1.0, **QUICK)
    with pytest.raises(ValueError, match="no linear layer"):
        steer.finetune(
            steer.GaussianMixture(torch.zeros(1, 2), 1.0), steer.LinearReward(torch.ones(2))
        )
    with pytest.raises(FloatingPointError, match="reward is nan in row 0 of prompt"):
        steer.finetune(
            flow, lambda x: x.mean((1, 2, 3)) * torch.nan, PROMPTS, temperature=1.0, **QUICK
        )
    blind = wrap(redness, differentiable=False)
    with pytest.raises(ValueError, match="take nft or grpo"):
        steer.finetune(flow, blind, PROMPTS, temperature=0.1, **QUICK)
    steer.finetune(flow, blind, PROMPTS, "nft", 1, temperature=0.1, **QUICK)
    with pytest.raises(ValueError, match=r"average must be in \[0, 1\)"):
        Settings(average=1.0)
    with pytest.raises(ValueError, match="one number per image"):
        steer.finetune(flow, lambda x: x.mean(), PROMPTS, temperature=1.0, **QUICK)


@pytest.mark.parametrize("options", [{}, {"normalise": 1.0}])
def test_a_reward_without_the_gradient_it_declares_is_found_out(flow, options):
    with pytest.raises(ValueError, match=r"carry no gradient .* nft or grpo"):
        steer.finetune(
            flow, lambda x: x.detach().mean((1, 2, 3)), PROMPTS, temperature=1.0, options=options,
            **QUICK,
        )  # fmt: skip


def test_a_gradient_that_is_not_finite_ends_the_run(flow):
    def flat(images):
        return (images - images.detach()).square().sum((1, 2, 3)).sqrt()  # sqrt at zero

    with pytest.raises(FloatingPointError, match=r"(gradient|loss) of step 0 is"):
        steer.finetune(flow, flat, PROMPTS, temperature=1.0, **QUICK)


def test_the_batch_refuses_what_is_not_finite(flow):
    batch = Batch(flow, flow, flow, wrap(lambda x: x.sum((1, 2, 3)) / 0), 1.0, Draws(0, 0, (0, 2)))
    values = batch.score(batch.noise())  # looked at once an optimizer step, with all others
    assert not values.isfinite().any()
    ((seen, texts),) = batch.seen
    with pytest.raises(FloatingPointError, match="the reward is"):
        refuse_not_finite(seen, texts)


def test_what_is_refused_leaves_no_folder(flow, tmp_path):
    """The corrected command starts in the same folder."""
    with pytest.raises(ValueError, match="multiple of"):
        tune(flow, tmp_path / "run", 1, batch_size=6, micro_batch=4)
    assert not (tmp_path / "run").exists()
    tune(flow, tmp_path / "run", 1)


def test_a_flow_of_doubles_is_tuned_in_doubles():
    flow = tiny().double()
    tuned = steer.finetune(flow, redness, PROMPTS, steps=1, **QUICK | {"check_every": 1})
    x = torch.randn(2, *flow.event_shape, dtype=torch.float64)
    assert tuned.jump(x, 0.0, 1.0).dtype == torch.float64


def test_checks_leave_the_modes_and_adapters_are_written_once_a_step(flow, tmp_path, monkeypatch):
    from steer.tuning import callbacks

    seen, written = [], []
    step, save = RewardTuning.training_step, callbacks.SaveAdapters.save
    monkeypatch.setattr(
        RewardTuning, "training_step",
        lambda self, *a: seen.append(self.tuned.flow.network.training) or step(self, *a),
    )  # fmt: skip
    monkeypatch.setattr(
        callbacks.SaveAdapters, "save", lambda self, k: written.append(k) or save(self, k)
    )
    tune(flow, tmp_path / "run", 4, micro_batch=1, check_every=1, sweep=[])
    assert not any(seen)
    assert written == [2, 4, 4]  # and the last one with the run's end


def test_a_front_of_alarms_recommends_the_least(flow):
    from steer.tuning.front import front_figures, recommended

    front = [
        {"scale": s, "steps": 1, "alarms": ["x"], "reward": s, "reward/base": 0.0}
        for s in (1.0, 0.5)
    ]
    assert recommended(front) == 0.5
    assert front_figures(front) == {"reward": {"base": 0.0, "tuned": 0.5}}


CHECKED = {"check_every": 2, "check_samples": 4, "check_prompts": ["cat", "owl"], "sweep": []}


def readings(folder):
    lines = (folder / "readings.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def spoiled(images):
    """A judge that likes everything but what is tuned for."""
    return 1 - 20 * redness(images)


def test_alarms_end_a_run_and_the_judges_best_is_kept(model, tmp_path):
    steer.finetune(
        load(model), redness, PROMPTS, "direct", 40, temperature=0.01, judge=wrap(spoiled),
        out=tmp_path / "run", **QUICK | CHECKED | {"early_stop": 2, "learning_rate": 1e-2},
    )  # fmt: skip
    seen = readings(tmp_path / "run")
    ended = json.loads((tmp_path / "run" / "finished.json").read_text())
    assert ended["done"] == seen[-1]["step"] < 40
    assert seen[-1]["alarms"]
    assert seen[-2]["alarms"]
    assert "judge" in ended["stopped"]
    best = max(seen, key=lambda e: e["judge"])
    from steer.adapters.store import read_metadata

    assert read_metadata(tmp_path / "run" / "best")["steps"] == best["step"] < seen[-1]["step"]
    assert seen[0]["step"] == 0 == seen[0]["reward/change"]  # step 0 is the base, bit for bit


def test_a_watched_run_resumes_exactly(model, tmp_path, monkeypatch):
    """The same readings and adapters as a run that never stopped, the last weights read too."""
    extra = QUICK | CHECKED | {"early_stop": 0}
    tune(load(model), tmp_path / "whole", 7, **extra)
    step = RewardTuning.training_step

    def cut(self, batch, index):
        if self.global_step == 5:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTuning, "training_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            tune(load(model), tmp_path / "cut", 7, **extra)
    tune(load(model), tmp_path / "cut", 7, **extra)
    whole, again = (readings(tmp_path / name) for name in ("whole", "cut"))
    assert whole == again
    assert [e["step"] for e in whole] == [0, 2, 4, 6, 7]
    a, b = (steer.load(model, lora=tmp_path / name) for name in ("whole", "cut"))
    assert same(state(a), state(b))


def test_a_scale_is_learnt_over_the_run_and_resumes_exactly(model, tmp_path, monkeypatch):
    """Micro-batches and a restart change nothing; each term's gradient is in the readings."""

    def reward():
        return Normalised(redness) + 0.5 * Normalised(Contrast())

    extra = QUICK | CHECKED | {"early_stop": 0}
    known = reward()
    whole = tune(load(model), tmp_path / "whole", 6, reward=known, **extra)
    scales = [part.statistics for part in known.rewards]
    assert all(float(s[0]) == 7 for s in scales)  # before the run, and at each of its 6 steps
    step = RewardTuning.training_step

    def cut(self, batch, index):
        if self.global_step == 5:
            raise RuntimeError("power cut")
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTuning, "training_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            tune(load(model), tmp_path / "cut", 6, reward=reward(), **extra)
    again = reward()
    resumed = tune(load(model), tmp_path / "cut", 6, reward=again, **extra)
    assert same(state(whole), state(resumed))
    assert readings(tmp_path / "whole") == readings(tmp_path / "cut")
    assert all(torch.equal(a, p.statistics) for a, p in zip(scales, again.rewards, strict=True))
    small = reward()
    tune(load(model), None, 6, reward=small, **QUICK | {"micro_batch": 2})
    for a, part in zip(scales, small.rewards, strict=True):
        assert torch.allclose(a, part.statistics, rtol=1e-4, atol=1e-6)
    last = readings(tmp_path / "whole")[-1]
    for name in ("redness", "Contrast"):
        assert last[f"gradient/{name}"] > 0
        assert f"term/{name}" in last


def test_a_run_that_never_got_anywhere_is_replaced(model, tmp_path):
    with pytest.raises(FloatingPointError):
        steer.finetune(
            load(model), lambda x: x.mean((1, 2, 3)) * torch.nan, PROMPTS, temperature=1.0,
            out=tmp_path / "run", **QUICK,
        )  # fmt: skip
    tune(load(model), tmp_path / "run", 2)
    with pytest.raises(
        FileExistsError, match=r"with other arguments \(steps: 2 -> 1\).*only steps may"
    ):
        tune(load(model), tmp_path / "run", 1)


def test_a_flow_that_was_moved_comes_back(flow):
    tuned = adapt(flow, 2)
    for p in tuned.flow.parameters():  # as Lightning does at the end of a run on a GPU
        p.data = p.data.clone()
    rejoin(tuned, flow)
    assert tuned.flow.network.stem.weight.data_ptr() == flow.network.stem.weight.data_ptr()
