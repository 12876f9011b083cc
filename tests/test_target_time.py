"""FLUX.3's base becomes a map: an embedder of the jump's end, filled, trained and read again."""

import copy

import diffusers
import pytest
import safetensors.torch
import torch

import steer
from recipes.distill import distill
from steer.adapters.store import WEIGHTS, read_metadata
from steer.backends.target_time import TargetTime
from steer.models.second_timed import fresh_second_time, with_second_time
from tests import tiny_pipelines as tiny
from tests.tiny_flows import PROMPT, flow, pipe, seen_as

TOLD = {"height": 16, "width": 16, "call": {"text_encoder_out_layers": (0, 1, 3)}, "cfg": None}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux3") / "base"
    tiny.save("flux3_base", folder)
    return folder


def points(one, n=2):
    return torch.randn(n, *one.event_shape, generator=torch.Generator().manual_seed(3))


def as_map(folder):
    """The base with a map's transformer, as diffusers reads it: the embedder is left on meta."""
    made = copy.deepcopy(pipe("flux3_base"))
    network = diffusers.Flux3Transformer2DModel.from_pretrained(
        folder, subfolder="transformer", flow_map=True
    )
    assert next(network.target_timestep_embedder.parameters()).is_meta
    made.update_components(transformer=network)
    return made


def trained(one, seed=0):
    """A term that does something."""
    term = fresh_second_time(one)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        term.linear_2.weight.normal_(0, 0.3, generator=generator)
    return term


def test_a_map_read_from_a_base_is_filled_and_equals_the_base_bit_for_bit(base_folder):
    with pytest.warns(UserWarning, match="without target_timestep_embedder"):
        one = seen_as(as_map(base_folder), "flux3_base", cfg=None).given([PROMPT])
    base = seen_as(pipe("flux3_base"), "flux3_base", cfg=1.0).given([PROMPT])
    assert (one.kind, base.kind) == ("two-time", "velocity")
    x = points(base)
    for t in (0.0, 0.4, 0.9):
        assert torch.equal(one.velocity(x, t), base.velocity(x, t))
        assert torch.equal(one.jump(x, t, 1.0), base.jump(x, t, 1.0))


def test_on_the_base_it_is_the_network_that_a_map_is(base_folder):
    """Added by a hook, or in the place of the map's own: the same numbers, bit for bit."""
    base = seen_as(pipe("flux3_base"), "flux3_base", cfg=1.0)
    term = trained(base)
    with pytest.warns(UserWarning, match="Euler step"):
        shaped = seen_as(as_map(base_folder), "flux3_base", cfg=None)
    x = points(base)
    one, two = (with_second_time(f, term).given([PROMPT]) for f in (base, shaped))
    assert torch.equal(one.jump(x, 0.2, 0.9), two.jump(x, 0.2, 0.9))
    native = shaped.network
    native.target_timestep_embedder.load_state_dict(term.state_dict())  # as plain diffusers has it
    assert torch.equal(shaped.given([PROMPT]).jump(x, 0.2, 0.9), one.jump(x, 0.2, 0.9))
    far = one.jump(x, 0.2, 0.4) - x
    assert float((far / 0.2 - (one.jump(x, 0.2, 1.0) - x) / 0.8).abs().max()) > 1e-4
    assert base.network.target_timestep_embedder is None  # the base is what it was
    assert not base.network.timestep_embedder._forward_hooks


def test_bfloat16_and_checkpointing():
    base = seen_as(pipe("flux3_base"), "flux3_base", cfg=1.0)
    term = trained(base)

    def gradient(**options):
        one = seen_as(pipe("flux3_base"), "flux3_base", cfg=1.0, **options)
        y = points(base).requires_grad_()
        one = with_second_time(one, term).given([PROMPT])
        return torch.autograd.grad(one.lookahead(y, 0.2).square().sum(), y)[0]

    torch.testing.assert_close(gradient(checkpointing=True), gradient(), rtol=1e-5, atol=1e-6)
    low = copy.deepcopy(pipe("flux3_base"))
    low.transformer.to(torch.bfloat16)
    one = with_second_time(seen_as(low, "flux3_base", cfg=1.0), term).given([PROMPT])
    wanted = with_second_time(base, term).given([PROMPT]).jump(points(base), 0.2, 0.9)
    assert float((one.jump(points(base), 0.2, 0.9) - wanted).abs().max()) < 0.1


@pytest.mark.parametrize("shaped", [False, True])
def test_distill_trains_it_and_the_file_holds_it(base_folder, tmp_path, monkeypatch, shaped):
    """On the base, and on a map's transformer that was read from the base's file."""
    import warnings

    source = as_map(base_folder) if shaped else pipe("flux3_base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one = seen_as(source, "flux3_base", cfg=None if shaped else 1.0)
    monkeypatch.setattr("recipes.distill.load_model", lambda *a, **k: one)
    out = distill(
        "flux3", "psd-m", rank=2, out=tmp_path / "map", steps=3, batch_size=2, guidance=1.0,
        prompts=[PROMPT], own_steps=2, learning_rate=1e-2, save_every=3,
    )  # fmt: skip
    assert read_metadata(out)["second_time"]["form"] == "target_timestep_embedder"
    told = TOLD if shaped else {**TOLD, "cfg": 1.0}
    held = safetensors.torch.load_file(out / WEIGHTS)
    assert held["second_time.linear_2.weight"].abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = steer.load(source, lora=out, **told).given([PROMPT])
    assert found.kind == "two-time"
    x, plain = points(one), one.given([PROMPT])
    assert float((found.jump(x, 0.1, 1.0) - plain.jump(x, 0.1, 1.0)).abs().max()) > 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        none = steer.load(source, lora=out, lora_scale=0.0, **told).given([PROMPT])
    assert torch.equal(none.jump(x, 0.1, 1.0), plain.jump(x, 0.1, 1.0))


def test_an_embedder_of_another_model_is_refused():
    term = trained(seen_as(pipe("flux3_base"), "flux3_base", cfg=1.0))
    with pytest.raises(ValueError, match=r"for a FLUX\.3 transformer of width 32"):
        term.check(flow("sd3").network)
    with pytest.raises((RuntimeError, ValueError)):
        TargetTime.of({"channels": 32, "width": 32}, {"linear_1.weight": torch.zeros(3, 3)})
