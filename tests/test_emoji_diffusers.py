"""The small pipeline that comes along: real classes with a meaning, steered and tuned offline."""

import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import steer
from recipes.cli import main
from recipes.data.emoji import load
from rewards.judge import Judge
from steer.training.metric import retrieval_rate

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "steer" / "zoo" / "emoji-diffusers"
BLOCK = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}


@pytest.fixture(scope="module")
def flow():
    return steer.load("emoji-diffusers")


@pytest.fixture(scope="module")
def pipe():
    made = DiffusionPipeline.from_pretrained(FOLDER)
    made.set_progress_bar_config(disable=True)
    return made


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def drawn(pipe, prompt="animal", seed=0, **more):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **RUN | more).images


def test_it_is_an_ordinary_folder_and_small(pipe):
    """Of diffusers' own classes, safetensors alone, at most 20 MB."""
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".txt"}
    assert type(pipe) is StableDiffusionPipeline


def test_it_is_a_map_that_keeps_the_pipelines_velocity(flow, pipe):
    assert flow.kind == "two-time"
    assert (flow.name, flow.evaluations, flow.event_shape) == ("emoji-diffusers", 1, (4, 16, 16))
    prompts = ["fox", "a smiling face with heart-eyes"]
    bound = flow.given(prompts)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    states = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    with torch.no_grad():
        bare = pipe.unet(x, torch.full((2,), 700.0), states).sample
        torch.testing.assert_close(bound.velocity(x, 0.3), -bare, rtol=1e-4, atol=1e-4)
        assert torch.equal(bound.jump(x, 0.3, 0.3), x)


@torch.no_grad()
def test_it_draws_what_it_is_asked_for(flow):
    """By the judge, 1 of 60 labels; results.md has it of 100 with three seeds."""
    labels = load().concepts[::5][:60]
    x = torch.randn(60, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    bound = flow.given(labels)
    for s, t in pairwise(flow.times(4)):
        x = bound.jump(x, s, t)
    rate, error = retrieval_rate(Judge().similarity, flow.decode(x).clamp(0, 1), labels)
    assert rate - 3 * error > 0.83  # nine tenths of the embedded map's .93


def test_scale_zero_is_the_plain_picture(pipe):
    guidance = steer.RewardGuidance(red, 0.0)
    assert torch.equal(drawn(pipe, callback_on_step_end=guidance), drawn(pipe))
    guidance.remove()


def test_the_reward_rises_in_the_pipelines_own_loop(pipe):
    """By more than three standard errors of 16 seeds."""
    guidance = steer.RewardGuidance(red, 0.3, pipe=pipe)
    many = ["animal"] * 16
    plain = red(drawn(pipe, many))
    moved = red(drawn(pipe, many, callback_on_step_end=guidance))
    guidance.remove()
    gain = moved - plain
    assert gain.mean() > 3 * gain.std() / 4


def test_it_costs_one_call_a_step_and_no_text(pipe):
    calls = {"unet": 0, "text": 0}

    def counting(name):
        def count(module, args, kwargs):
            calls[name] += 1

        return count

    parts = {"unet": pipe.unet, "text": pipe.text_encoder}
    hooks = [
        part.register_forward_pre_hook(counting(name), with_kwargs=True)
        for name, part in parts.items()
    ]
    drawn(pipe)
    before = dict(calls)
    guidance = steer.RewardGuidance(red, pipe=pipe)
    drawn(pipe, callback_on_step_end=guidance)
    guidance.remove()
    for hook in hooks:
        hook.remove()
    assert calls == {"unet": 2 * before["unet"] + 4, "text": 2 * before["text"]}


def test_methods_raise_the_reward_over_none(flow):
    """In few steps, on the same seeds."""
    rewards = {}
    for method in ("none", "fmrg-j", "reno", "best-of-n"):
        result = steer.sample(flow, red, ["animal", "plant"], 4, 4, method, seed=1)
        best = method == "best-of-n"
        rewards[method] = float((result.rewards.amax(-1) if best else result.rewards).mean())
    assert min(rewards.values()) == rewards["none"]


def test_on_the_command_line(tmp_path, capsys):
    """With its own prompts, reward and judge."""
    words = ["sample", "--model=emoji-diffusers", "--prompt=fox", "--method=fmrg-j", "--steps=2"]
    assert main([*words, "--particles=2", f"--out={tmp_path / 'out'}"]) == 0, capsys.readouterr()
    assert (tmp_path / "out" / "grid.png").is_file()


def test_the_five_minutes_run(tmp_path, monkeypatch):
    """Every block of docs/diffusers.md, as it stands, but for the length of the tuning."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    code = "\n".join(BLOCK.findall(text))
    assert "steps=60" in code
    code = code.replace("steps=60", "steps=2, batch_size=4, check_every=0, sweep=[]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "docs/diffusers.md", "exec"), {"__name__": "block"})
    made = {path.name for path in tmp_path.iterdir()}
    assert {"plain.png", "red.png", "best.png", "tuned.png", "outputs", "runs"} <= made
    assert (tmp_path / "runs" / "red" / "pytorch_lora_weights.safetensors").is_file()
