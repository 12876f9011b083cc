"""Every YAML parses against its program's signature, and runs two steps; the room's own order."""

import ast
import importlib
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
FILES = sorted((ROOT / "recipes").rglob("*.py"))
LONGEST = 350

# file -> its program, and what makes it small
TUNED = {
    "steps": 2, "batch_size": 4, "rank": 2, "check_every": 2, "check_samples": 2, "sweep": [1.0],
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
    "compare_methods": (
        "recipes.compare:compare",
        {
            "methods": ["best-of-n:steps=1", "noise-smc:steps=2,particles=2,move=slice"],
            "prompts": ["fox"], "seeds": 1,
        },
    ),
    "demo": ("recipes.sample:sample", {"steps": 2, "particles": 1}),
    **dict.fromkeys(
        ("finetune", "finetune_amortise", "finetune_draft", "finetune_transport"),
        ("recipes.finetune:finetune", TUNED),
    ),
    **dict.fromkeys(  # these compare eight rows of a prompt
        ("finetune_grpo", "finetune_nft"),
        ("recipes.finetune:finetune", {**TUNED, "batch_size": 8}),
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
    "train_emoji_diffusers": (
        "recipes.train_pipeline:train_pipeline",
        {
            "autoencoder_steps": 2, "velocity_steps": 2, "map_steps": 2, "batch_size": 4,
            "vae_channels": [8, 8], "channels": [32, 32], "text_width": 32,
        },
    ),
    "train_fashion": (
        "recipes.train:train",
        {
            "folder": None, "velocity_steps": 2, "map_steps": 2, "posterior_steps": 2,
            "batch_size": 4, "channels": [8, 8, 8], "posterior_channels": [8, 8, 8],
            "width": 16,
        },
    ),
    "train_judge": (
        "recipes.train_judge:train_judge",
        {"steps": 2, "batch_size": 4, "channels": [8, 16], "blocks": [1, 1]},
    ),
}  # fmt: skip


def test_all_are_found():
    real = CONFIGS / "real"  # those for published models: see test_recipes_real.py
    assert {p.stem for p in CONFIGS.rglob("*.yaml") if p.parent != real} == set(PROGRAMS)


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
        "compare_methods": "table.md",
        "demo": "grid.png",
        "train_clip": "open_clip_model.safetensors",
        "train_emoji": "model.safetensors",
        "train_emoji_diffusers": "model_index.json",
        "train_fashion": "model.safetensors",
        "train_judge": "model.safetensors",
    }.get(name, "front.png")
    assert expected in made


# ------------------------------------------------------------------ the room


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """(module, name) of what a file imports from this repository, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_says_what_it_is_and_what_it_gives(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text))
    private = [f"{where}.{name}" for where, name in imported(path) if name.startswith("_")]
    assert not private
    found = importlib.import_module(module(path))
    names = getattr(found, "__all__", [])
    plain = [name for name in names if name.isupper()]
    classes = [name for name in names if name[0].isupper() and not name.isupper()]
    functions = [name for name in names if name[0].islower()]
    assert names == [*sorted(plain), *sorted(classes), *sorted(functions)]
    assert all(hasattr(found, name) for name in names)


def test_no_file_is_in_a_circle():
    known = {module(path) for path in FILES}
    left = {}
    for path in FILES:
        needs = {w for where, name in imported(path) for w in (where, f"{where}.{name}")}
        left[module(path)] = (needs & known) - {module(path)}
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]
