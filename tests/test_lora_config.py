"""A LoRA's configuration is a stranger's file: known keys, in bounds, and nothing of it runs."""

import json
import random
import shutil
import time
from contextlib import suppress

import pytest
import safetensors.torch
import torch

from steer.adapters.config import understood
from steer.adapters.store import CONFIG, WEIGHTS, load_adapters, read_config
from tests.test_lora import adapt, network, noise, same, save_adapters, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("lora")
    save_adapters(train(adapt(network(), rank=3, alpha=5.0)), made)
    return made


@pytest.fixture
def changed(folder, tmp_path):
    def write(**change):
        shutil.copytree(folder, tmp_path / "lora", dirs_exist_ok=True)
        found = json.loads((folder / CONFIG).read_text())
        (tmp_path / "lora" / CONFIG).write_text(json.dumps({**found, **change}))
        return tmp_path / "lora"

    return write


HANGS = "(a+)+" * 12 + "$"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 1_000_000}, "r must be a whole number from 1 to 4096, got 1000000"),
        ({"r": 0}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": 2.0}, "r must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": 10**400}, "lora_alpha must be"),
        ({"lora_alpha": "8"}, "lora_alpha must be"),
        ({"target_modules": HANGS}, "target_modules must be a list .* without patterns"),
        ({"target_modules": "all-linear"}, "target_modules must be a list"),
        ({"target_modules": [1]}, "target_modules must be a list"),
        ({"target_modules": ["x"] * 10_001}, "target_modules must be a list of at most 10000"),
        ({"target_modules": ["x" * 513]}, "target_modules must be a list"),
        ({"rank_pattern": {HANGS: 3}}, "rank_pattern must be at most .* each with its rank"),
        ({"rank_pattern": {"head": 5000}}, "rank_pattern must be"),
        ({"rank_pattern": ["head"]}, "rank_pattern must be"),
        ({"alpha_pattern": {".*": 3}}, "alpha_pattern must be"),
        ({"alpha_pattern": {"head": float("inf")}}, "alpha_pattern must be"),
        ({"exclude_modules": HANGS}, "exclude_modules must be a list"),
        ({"layers_pattern": HANGS}, "layers_pattern must be a list"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be at most"),
        ({"lora_dropout": 2}, "lora_dropout must be a fraction from 0 to 1, got 2"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication: only the plain update"),
        ({"target_parameters": ["x"]}, "sets target_parameters"),
        ({"peft_type": {"a": 1}}, "its peft_type is"),
        ({"rank_pattern": {"head": 4096}}, "another shape"),
        ({"r": 4096}, "another shape"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_is_out_of_bounds_is_refused_at_once(changed, change, words):
    start = time.process_time()
    with pytest.raises(ValueError, match=words) as caught:
        load_adapters(network(), changed(**change))
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "how", ["olora", "pissa", "pissa_niter_4", "gaussian", True, False, "x", 3]
)
def test_how_it_was_initialised_is_ignored(folder, changed, how, recwarn):
    flow = network()
    before = {n: p.clone() for n, p in flow.state_dict().items()}
    loaded = load_adapters(flow, changed(init_lora_weights=how))
    assert all(torch.equal(p, before[n]) for n, p in flow.state_dict().items())
    same(loaded, load_adapters(network(), folder))
    same(loaded.base, flow)
    said = [str(w.message) for w in recwarn if "was initialised with" in str(w.message)]
    assert bool(said) == (how in ("olora", "pissa", "pissa_niter_4"))


def test_nothing_else_is_taken(changed):
    odd = {"megatron_config": {"x": 1}, "eva_config": {"rho": 2}, "loftq_config": {"a": 1}}
    known = read_config(changed(**odd, auto_mapping={"base_model_class": "os.system"}, new=[1]))
    assert known.keys() == understood({"peft_type": "LORA"}, "x").keys()
    assert known["init_lora_weights"] is True
    load_adapters(network(), changed(**odd))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not the configuration of a LoRA"),
        ("[]", "not a table of settings"),
        ("null", "not a table of settings"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "not the configuration of a LoRA"),
        (" " * (1 << 24) + "{}", "larger than"),
    ],
    ids=["deep", "list", "null", "digits", "large"],
)
def test_texts_that_are_none(changed, text, words):
    where = changed()
    (where / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_config(where)


def test_only_some_layers_of_those_that_are_named(tmp_path):
    """peft's choice of layers by numbers is in the file of weights: that says which."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["conv1"], layers_to_transform=[0], layers_pattern=["down"],
        init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(network(), config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapters(network(), tmp_path, check=False)
    assert 0 < len(ours.adapters()) < len(adapt(network(), targets=["conv1"]).adapters())
    same(ours, theirs.base_model.model)
    save_adapters(ours, tmp_path / "again")
    same(load_adapters(network(), tmp_path / "again"), ours)


def test_pattern_names_are_literal(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["conv1", "head"], init_lora_weights=False,
        rank_pattern={"^network.head": 3}, alpha_pattern={"0.conv1": 5},
    )  # fmt: skip
    theirs = get_peft_model(network(), config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapters(network(), tmp_path, check=False)
    same(ours, theirs.base_model.model)


def test_many_names_take_no_time(folder, changed):
    many = [f"x{i}.conv1" for i in range(9_000)]
    named = json.loads((folder / CONFIG).read_text())["target_modules"]
    start = time.process_time()
    where = changed(
        target_modules=named + many,
        rank_pattern=dict.fromkeys(many, 3),
        alpha_pattern={f"^{name}": 5 for name in many},
    )
    same(load_adapters(network(), where), load_adapters(network(), folder))
    assert time.process_time() - start < 5


def mutated(config, source):
    odd = [
        None,
        -1,
        0,
        2**70,
        1e308,
        "",
        "a",
        "(x+)+$",
        [],
        [[]],
        {},
        {"a": {}},
        True,
        "\0",
        ["é"],
    ]
    keys = source.sample(sorted(config), source.randint(1, 4))
    return {**config, **{k: source.choice(odd) for k in keys}}


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 23))]
)
def test_mutated_configurations_load_or_are_refused(folder, changed, seed):
    """A dozen a seed: a ValueError, or adapters as they are; the base is untouched."""
    source = random.Random(seed)
    config = json.loads((folder / CONFIG).read_text())
    flow = network()
    before = {n: p.clone() for n, p in flow.state_dict().items()}
    for _ in range(12):
        with suppress(ValueError):
            loaded = load_adapters(flow, changed(**mutated(config, source)))
            assert loaded.jump(noise(), 0.0, 1.0).shape == noise().shape
            same(loaded.base, flow)
    assert all(torch.equal(p, before[n]) for n, p in flow.state_dict().items())


@pytest.mark.parametrize("name", ["x", "", ".lora_A.weight", "network.head.lora_A.up.weight"])
def test_tensors_of_other_names_are_refused(changed, name):
    where = changed()
    state = safetensors.torch.load_file(where / WEIGHTS)
    safetensors.torch.save_file({**state, name: torch.zeros(2)}, where / WEIGHTS)
    with pytest.raises(ValueError, match="do not fit this base"):
        load_adapters(network(), where, check=False)
