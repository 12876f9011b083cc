"""Every YAML parses against its program's signature, and runs two steps."""

import importlib
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"

# file -> its program, and what makes it small
TUNED = {
    "steps": 2, "batch_size": 8, "rank": 2, "check_every": 2, "check_samples": 2, "sweep": [1.0],
    "sweep_steps": [1], "progress": False, "accelerator": "cpu", "check_prompts": ["owl", "fox"],
    "reward": "colour:name=red", "judge": None,
}  # fmt: skip
PROGRAMS = {
    "brute_force": (
        "recipes.compare:compare",
        {
            "methods": ["none:steps=1", "best-of-n:steps=1,particles=3", "reno:steps=2"],
            "prompts": ["fox"], "seeds": 2,
        },
    ),
    "compare": (
        "recipes.compare:compare",
        {
            "methods": ["none:steps=1", "best-of-n:steps=1", "fmtt:steps=2,particles=1"],
            "prompts": ["fox"], "seeds": 1,
        },
    ),
    "demo": ("recipes.sample:sample", {"steps": 2, "particles": 1}),
    **dict.fromkeys(
        (
            "finetune", "finetune_amortise", "finetune_draft", "finetune_grpo", "finetune_nft",
            "finetune_transport",
        ),
        ("recipes.finetune:finetune", TUNED),
    ),
    "train_clip": (
        "recipes.train_clip:train_clip",
        {"steps": 2, "batch_size": 4, "vision_width": 32, "vision_layers": 1, "text_width": 32},
    ),
    "train_emoji": (
        "recipes.train:train",
        {
            "velocity_steps": 2, "map_steps": 2, "batch_size": 4, "channels": [8, 8],
            "blocks": [1, 1], "width": 16,
        },
    ),
    "train_judge": (
        "recipes.train_judge:train_judge",
        {"steps": 2, "batch_size": 4, "channels": [8, 16], "blocks": [1, 1]},
    ),
}  # fmt: skip


def test_all_are_found():
    assert {p.stem for p in CONFIGS.rglob("*.yaml")} == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_config_runs(name, tmp_path):
    target, small = PROGRAMS[name]
    module, function = target.split(":")
    program = getattr(importlib.import_module(module), function)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(program)
    config = parser.parse_args(["--config", str(CONFIGS / f"{name}.yaml")])
    config.pop("config")
    settings = {**parser.instantiate(config).as_dict(), **small, "out": tmp_path / "run"}
    program(**settings)
    made = {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()}
    expected = {
        "brute_force": "reward_nfe.png",
        "compare": "table.md",
        "demo": "grid.png",
        "train_clip": "open_clip_model.safetensors",
        "train_emoji": "model.safetensors",
        "train_judge": "model.safetensors",
    }.get(name, "front.png")
    assert expected in made
