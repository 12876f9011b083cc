"""Adapters: the base bit for bit, views that share a graph, files that fit or say why not."""

import copy
import json
import pickle
import resource
import signal
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steer
from steer.adapters.fingerprint import fingerprint
from steer.adapters.inject import adapt
from steer.adapters.merge import merged
from steer.adapters.store import CONFIG, WEIGHTS, load_adapters, read_metadata, save_adapters
from steer.files import pack, read_notes
from steer.models.loading import save
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.sampling.methods import TABLE
from steer.testing import Corrected


def network(seed=0, width=16):
    torch.manual_seed(seed)
    net = TwoTimeUNet(["apple"], (8, 8), (1, 1), size=8, width=width, groups=4)
    for p in net.parameters():
        if p.abs().sum() == 0:
            nn.init.normal_(p, std=0.1)
    flow = NetworkFlow(net).eval().requires_grad_(False)
    flow.name = "tiny"
    return flow


@pytest.fixture
def flow():
    return network()


def noise(n=3, dtype=torch.float32):
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x.to(dtype)


def train(tuned, adapter=None, seed=2):
    """Give the adapters what training would have: B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in tuned.adapters(adapter).values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return tuned


def same(a, b):
    """Bit for bit, at three times."""
    x = noise()
    for s, t in ((0.0, 1.0), (0.3, 0.6)):
        assert torch.equal(a.jump(x, s, t), b.jump(x, s, t))
    assert torch.equal(a.velocity(x, 0.4), b.velocity(x, 0.4))


def differ(a, b):
    x = noise()
    return float((a.jump(x, 0.0, 1.0) - b.jump(x, 0.0, 1.0)).detach().abs().max())


# ------------------------------------------------------------------ the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_untrained_adapters_are_the_base_bit_for_bit(flow, dtype):
    flow.to(dtype)
    same(adapt(flow), flow)
    tuned = train(adapt(flow))
    assert differ(tuned, flow) > 1e-2
    same(tuned.at(0.0), flow)
    same(tuned.base, flow)


def test_the_base_is_never_changed(flow):
    flow.network.stem.weight.requires_grad_(True)
    flow.network.norm.train()
    modules = [(name, type(m), m.training) for name, m in flow.named_modules()]
    tensors = {name: (p.clone(), p.requires_grad) for name, p in flow.named_parameters()}
    attributes = set(vars(flow))
    tuned = train(adapt(flow))
    tuned.train()
    for p in tuned.adapters().values():
        p.requires_grad_(True)
    tuned.jump(noise(), 0.0, 1.0).sum().backward()
    torch.optim.SGD(tuned.adapters().values(), 0.1).step()
    assert [(name, type(m), m.training) for name, m in flow.named_modules()] == modules
    for name, p in flow.named_parameters():
        before, asks = tensors[name]
        assert torch.equal(p, before)
        assert p.requires_grad == asks
        assert p.grad is None
    assert set(vars(flow)) == attributes
    assert not any(p.requires_grad for n, p in tuned.flow.named_parameters() if "lora" not in n)


def test_modes_are_those_of_the_base(flow):
    flow.train()
    flow.network.norm.eval()
    tuned = adapt(flow, dropout=0.1)
    assert tuned.training
    assert tuned.flow.network.stem.training
    assert not tuned.flow.network.norm.training


def test_tensors_are_shared(flow):
    tuned = adapt(flow)
    own = {n.replace("base_layer.", ""): p for n, p in tuned.flow.named_parameters()}
    for name, p in flow.named_parameters():
        assert own[name].data_ptr() == p.data_ptr(), name
    views = [tuned.at(0.5), tuned.base, tuned.given(["apple"]), tuned.given(["apple"]).at(0.3)]
    for view in views:
        for name, p in view.flow.named_parameters():
            assert p is dict(tuned.flow.named_parameters())[name]


def test_views_keep_their_own_scale_and_prompts(flow):
    tuned = train(adapt(flow))
    bound = tuned.given(["apple"]).at(0.5)
    assert (tuned.scale, bound.scale, bound.base.scale) == (1.0, 0.5, 0.0)
    same(bound.base, flow.given(["apple"]))
    assert tuned.flow.prompts == [""]
    assert (bound.evaluations, bound.event_shape, bound.name) == (1, (3, 8, 8), "tiny")
    images = flow.decode(noise())
    assert torch.equal(tuned.decode(noise()), images)
    assert torch.equal(tuned.encode(images), flow.encode(images))


def test_a_flow_without_prompts_gives_itself():
    tuned = adapt(Corrected(steer.GaussianMixture(torch.zeros(1, 2), 1.0)))
    assert tuned.given(["a"]) is tuned


def test_the_seed_alone_fixes_the_adapters(flow):
    state = torch.get_rng_state()
    a, b, c = adapt(flow, seed=1), adapt(flow, seed=1), adapt(flow, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for p, q, r in zip(*(t.adapters().items() for t in (a, b, c)), strict=True):
        assert torch.equal(p[1], q[1])
        assert "lora_B" in p[0] or not torch.equal(p[1], r[1])
    first = next(p for n, p in a.adapters().items() if "head.lora_A" in n)
    bound = (8 * 9) ** -0.5
    assert bound * 0.9 < float(first.abs().max()) <= bound


def test_scales_are_linear_in_a_linear_layer():
    flow = Corrected(steer.GaussianMixture(torch.zeros(1, 2), 1.0))
    tuned = train(adapt(flow, rank=2, alpha=3.0, targets=["network.4"]))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    base, half, whole = (tuned.at(s).velocity(x, 0.5) for s in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - base, 0.5 * (whole - base))
    (b,) = (p for n, p in tuned.adapters().items() if "lora_B" in n)
    (a,) = (p for n, p in tuned.adapters().items() if "lora_A" in n)
    features = flow.network[:4](torch.cat([x, torch.tensor([0.5, 0.5, 0.0]).expand(5, 3)], 1))
    torch.testing.assert_close(whole - base, 3 / 2 * features @ a.T @ b.T)


# ------------------------------------------------------------------ switching


def switched(view):
    return view.switch.at(view.adapter, view.scale)


def again_or_not(tuned, checkpointed):
    view = tuned.at(tuned.scale, tuned.adapter)
    view.checkpoint = checkpointed
    return view


def gradients(tuned, again):
    """Base, two scales and a second adapter in one graph, each feeding the next."""
    view = again_or_not(tuned, again)
    for adapter in ("default", "other"):
        for p in view.adapters(adapter).values():
            p.requires_grad_(True)
            p.grad = None
    x = noise().requires_grad_(True)
    y = view.jump(x, 0.0, 0.3)
    y = y + 0.5 * view.base.velocity(y, 0.3)
    y = view.at(1.0, "other").jump(y, 0.3, 0.6)
    y = y - view.at(0.5).velocity(y, 0.6)
    (view.jump(y, 0.6, 1.0).square().mean() + view.base.jump(x, 0.0, 1.0).mean()).backward()
    names = [*view.adapters("default").values(), *view.adapters("other").values()]
    return [x.grad, *(p.grad for p in names)]


def test_checkpointing_changes_no_gradient(flow):
    tuned = train(adapt(flow))
    tuned.add("other")
    train(tuned, "other", seed=5)
    plain, again = gradients(tuned, False), gradients(tuned, True)
    for a, b in zip(plain, again, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_recomputing_under_other_adapters_would_be_silently_wrong(flow):
    """So the test above has power: a checkpoint within the switch raises nothing."""
    tuned = train(adapt(flow))
    tuned.add("other")
    view = train(tuned, "other", seed=5).at(1.0, "other")
    x, y = noise().requires_grad_(True), noise().requires_grad_(True)
    with switched(view):
        inside = checkpoint(lambda x: view.flow.jump(x, 0.0, 1.0), x, use_reentrant=False)
    inside.sum().backward()
    view.jump(y, 0.0, 1.0).sum().backward()
    assert float((x.grad - y.grad).abs().max()) > 1e-2


def test_dropout_is_recomputed_with_the_same_mask(flow):
    tuned = train(adapt(flow, dropout=0.5)).train()
    found = []
    for again in (False, True):
        view = again_or_not(tuned, again)
        for p in view.adapters().values():
            p.requires_grad_(True)
            p.grad = None
        torch.manual_seed(3)
        view.jump(noise(), 0.0, 1.0).square().sum().backward()
        found.append([p.grad for p in view.adapters().values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_nested_switches_and_exceptions_restore(flow):
    tuned = train(adapt(flow))
    tuned.add("other")

    def state():
        return [
            (m._disable_adapters, list(m._active_adapter), dict(m.scaling)) for m in tuned.layers
        ]

    before = state()
    expected = tuned.at(0.5).jump(noise(), 0.0, 1.0)
    with pytest.raises(RuntimeError, match="stop"), switched(tuned):  # noqa: PT012
        assert torch.equal(tuned.at(0.5).jump(noise(), 0.0, 1.0), expected)
        with switched(tuned.at(0.25)):  # not 0.25 of the outer scale
            assert torch.equal(tuned.at(0.5).jump(noise(), 0.0, 1.0), expected)
            with switched(tuned.base), switched(tuned.at(1.0, "other")):
                assert tuned.layers[0].scaling["other"] == 2.0
            raise RuntimeError("stop")
    assert state() == before
    with pytest.raises(RuntimeError):
        tuned.jump(torch.zeros(1, 5, 8, 8), 0.0, 1.0)
    assert state() == before


def test_add_copies_and_leaves_what_asks_for_gradients(flow):
    tuned = train(adapt(flow))
    for p in tuned.adapters().values():
        p.requires_grad_(True)
    tuned.add("average")
    tuned.add("up", trainable=True)  # the name of a module, too
    for adapter, asks in (("default", True), ("average", False), ("up", True)):
        own = tuned.adapters(adapter)
        assert len(own) == len(tuned.adapters())
        assert all(p.requires_grad is asks for p in own.values()), adapter
        same(tuned.at(1.0, adapter), tuned)
    train(tuned, "average", seed=9)
    assert differ(tuned.at(1.0, "average"), tuned) > 1e-3
    assert not any(p.requires_grad for n, p in tuned.flow.named_parameters() if ".lora_" not in n)
    bound = tuned.given(["apple"])
    tuned.add("late")
    same(bound.at(1.0, "late"), bound)
    with pytest.raises(ValueError, match="named 'up' already"):
        tuned.add("up")
    with pytest.raises(ValueError, match=r"no adapters named 'old': there are default, average"):
        tuned.at(1.0, "old")
    assert tuned.adapters("old") == {}
    with pytest.raises(ValueError, match="must be finite"):
        tuned.at(float("nan"))


def test_copies_and_pickles(flow):
    tuned = train(adapt(flow)).at(0.5).given(["apple"])
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        same(other, tuned)
        train(other, seed=8)
        assert differ(other, tuned) > 1e-3  # the layers that it switches are its own
        assert differ(other.base, tuned.base) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moves_keep_the_adapters_at_least_single(flow, dtype):
    tuned = train(adapt(flow))
    values = {n: p.clone() for n, p in tuned.adapters().items()}
    weight = flow.network.stem.weight.clone()
    parameters = list(tuned.adapters().values())
    tuned.to(dtype)
    kept = torch.promote_types(dtype, torch.float32)
    for p, (name, q) in zip(parameters, tuned.adapters().items(), strict=True):
        assert p is q  # an optimizer still holds it
        assert p.dtype == kept
        assert torch.equal(p.float(), values[name])
    assert tuned.flow.network.stem.base_layer.weight.dtype == dtype
    assert flow.network.stem.weight.dtype == torch.float32  # the flow is not moved with it
    assert torch.equal(flow.network.stem.weight, weight)
    assert tuned.jump(noise(), 0.0, 1.0).isfinite().all()
    same(tuned.base, flow.to(dtype))


def test_moving_the_base_leaves_what_was_made_from_it(flow):
    tuned = train(adapt(flow))
    expected = tuned.jump(noise(), 0.0, 1.0)
    flow.to(torch.bfloat16)
    assert torch.equal(tuned.jump(noise(), 0.0, 1.0), expected)
    assert fingerprint(tuned) == fingerprint(flow)


# ------------------------------------------------------------------ what is refused


def test_flows_that_cannot_have_adapters(flow):
    with pytest.raises(ValueError, match="GaussianMixture has no linear layer or convolution"):
        adapt(steer.GaussianMixture(torch.zeros(1, 2), 1.0))
    with pytest.raises(ValueError, match=r"is named 'to_q': there are network\.text\.mlp\.0"):
        adapt(flow, targets=["network.stem", "to_q"])
    with pytest.raises(ValueError, match="is named 'norm'"):
        adapt(flow, targets=["norm"])
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        adapt(flow, rank=0)
    with pytest.raises(ValueError, match=r"has adapters already: .*merged"):
        adapt(adapt(flow))


def test_targets_by_the_end_of_their_name(flow):
    names = {n.split(".lora_")[0] for n in adapt(flow, targets=["conv1", "head"]).adapters()}
    assert names == {n for n, _ in flow.named_modules() if n.endswith(("conv1", ".head"))}


# ------------------------------------------------------------------ files


@pytest.fixture
def saved(flow, tmp_path):
    tuned = train(adapt(flow, rank=3, alpha=5.0))
    notes = {"reward": "clip", "steps": 7, "prompts": ["a", '"b" ü'], "seed": "12", "none": None}
    save_adapters(tuned, tmp_path / "lora", notes)
    return tuned, tmp_path / "lora"


def test_adapters_come_back_bit_for_bit(flow, saved):
    tuned, folder = saved
    loaded = load_adapters(network(), folder)
    same(loaded, tuned)
    for (n, p), (m, q) in zip(loaded.adapters().items(), tuned.adapters().items(), strict=True):
        assert n == m
        assert torch.equal(p, q)
    same(load_adapters(flow, folder, 0.5), tuned.at(0.5))
    same(load_adapters(flow, folder, 0.0), flow)
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapters(tuned, folder)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert all("lora_" in k for k in safetensors.torch.load_file(folder / WEIGHTS))


def test_a_note_that_looks_like_json_stays_a_text(tmp_path):
    notes = {"a": "12", "b": "null", "c": [1, {"d": None}], "e": "x", "f": "[" * 50_000, "g": 2.5}
    (tmp_path / "file").write_bytes(pack({"x": torch.zeros(2, 2).T}, notes))
    assert read_notes(tmp_path / "file") == notes


def test_notes_keep_their_kind(saved):
    notes = read_metadata(saved[1])
    assert notes["prompts"] == ["a", '"b" ü']
    assert (notes["steps"], notes["seed"], notes["none"]) == (7, "12", None)
    assert (notes["base"], notes["base_sha256"]) == ("tiny", fingerprint(saved[0]))
    assert notes["flowsteer"] == steer.__version__


def test_a_second_adapter_is_saved_under_the_plain_name(flow, saved, tmp_path):
    tuned, _ = saved
    tuned.add("average")
    train(tuned, "average", seed=4)
    save_adapters(tuned.at(1.0, "average"), tmp_path / "average")
    same(load_adapters(flow, tmp_path / "average"), tuned.at(1.0, "average"))


def test_peft_reads_the_folder(tmp_path):
    from peft import PeftModel

    flow = steer.load("emoji")
    tuned = train(adapt(flow, rank=2))
    save_adapters(tuned, tmp_path)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = PeftModel.from_pretrained(steer.load("emoji"), tmp_path)
        ours = steer.load("emoji", lora=tmp_path, lora_scale=0.5)
    with torch.no_grad():
        expected = tuned.jump(x, 0.0, 1.0)
        torch.testing.assert_close(theirs.base_model.model.jump(x, 0.0, 1.0), expected)
        assert torch.equal(ours.at(1.0).jump(x, 0.0, 1.0), expected)
        assert torch.equal(ours.base.jump(x, 0.0, 1.0), flow.jump(x, 0.0, 1.0))
    assert theirs.peft_config["default"].base_model_name_or_path == "emoji"


def test_we_read_what_peft_writes(flow, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["conv1", "head"], rank_pattern={"head": 2},
        use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(network(), config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not say for which weights"):
        ours = load_adapters(flow, tmp_path)
    same(ours, theirs.base_model.model)
    same(load_adapters(flow, tmp_path, check=False), ours)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3'"),
        ({"use_dora": True}, "sets use_dora: only the plain update"),
        ({"modules_to_save": ["head"], "bias": "all"}, "sets bias, modules_to_save"),
        ({"r": 4}, "another shape .*not from the same save"),
        ({"target_modules": ["conv1"]}, "belong to layers that its denoiser does not have"),
        ({"target_modules": ["to_q"]}, "do not fit this base: .*to_q"),
        ({"r": "three"}, "r must be a whole number from 1 to 4096, got 'three'"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(flow, saved, change, words):
    file = saved[1] / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=words):
        load_adapters(flow, saved[1])


def test_adapters_of_another_base_are_refused(saved, tmp_path):
    other = network(seed=1)
    other.name = "mine"
    one, two = fingerprint(network())[:12], fingerprint(other)[:12]
    with pytest.raises(
        ValueError, match=f"'tiny' with weights {one}, and this is 'mine' with wei.*{two}"
    ):
        load_adapters(other, saved[1])
    assert differ(load_adapters(other, saved[1], check=False), other) > 1e-3
    with pytest.raises(ValueError, match="another shape"):
        load_adapters(network(width=32), saved[1], check=False)


@pytest.mark.parametrize("keep", [0, 7, 300, -9])
def test_truncated_adapters(flow, saved, keep):
    file = saved[1] / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or corrupt"):
        load_adapters(flow, saved[1])


def test_missing_files_are_named(flow, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of adapters at .*nowhere"):
        load_adapters(flow, tmp_path / "nowhere")
    (saved[1] / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not the configuration of a LoRA"):
        load_adapters(flow, saved[1])
    (saved[1] / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_adapters(flow, saved[1])
    (saved[1] / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_adapters(flow, saved[1])


def test_a_full_disk_leaves_the_earlier_adapters_whole(saved):
    tuned, folder = saved
    before = (folder / WEIGHTS).read_bytes()
    train(tuned)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            save_adapters(tuned, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


# ------------------------------------------------------------------ merging, hashes


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
def test_merged_is_the_view(flow, scale, tmp_path):
    tuned = train(adapt(flow)).at(scale)
    plain = merged(tuned)
    assert type(plain) is NetworkFlow
    x = noise()
    torch.testing.assert_close(
        plain.jump(x, 0.0, 1.0), tuned.jump(x, 0.0, 1.0), rtol=1e-4, atol=1e-5
    )
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in flow.named_parameters()}
    assert (fingerprint(plain) == fingerprint(flow)) == (scale == 0)
    save(plain, tmp_path / "model")
    same(steer.load(tmp_path / "model"), plain)
    same(adapt(plain), plain)
    assert differ(tuned.base, flow) == 0  # a copy


def test_a_model_with_adapters_is_not_saved_as_one_without(flow, tmp_path):
    with pytest.raises(TypeError, match=r"save_adapters.*merged"):
        save(adapt(flow), tmp_path / "model")
    with pytest.raises(TypeError, match="Corrected has no folder format"):
        save(Corrected(steer.GaussianMixture(torch.zeros(1, 2), 1.0)), tmp_path / "model")


def test_fingerprint(flow):
    own = fingerprint(flow)
    assert len(own) == 64
    tuned = train(adapt(flow))
    assert fingerprint(tuned) == fingerprint(tuned.given(["apple"])) == own
    assert fingerprint(copy.deepcopy(flow).to(torch.bfloat16)) == own
    assert fingerprint(copy.deepcopy(flow).double()) == own
    changed = copy.deepcopy(flow)
    changed.network.head.bias[1] += 0.01
    assert fingerprint(changed) != own
    assert fingerprint(network(seed=1)) != own


def test_of_a_large_flow_a_fixed_sample_is_hashed(flow, monkeypatch):
    values = sum(p.numel() for p in flow.state_dict().values())
    whole = fingerprint(flow)
    monkeypatch.setattr("steer.adapters.fingerprint.WHOLE", values)
    assert fingerprint(flow) == whole  # old adapters name this hash
    monkeypatch.setattr("steer.adapters.fingerprint.WHOLE", values - 1)
    assert fingerprint(flow) == whole  # all its tensors are small: all values are in the sample
    monkeypatch.setattr("steer.adapters.fingerprint.SAMPLE", 8)
    some = fingerprint(flow)
    assert some != whole
    assert fingerprint(train(adapt(flow))) == some
    assert fingerprint(copy.deepcopy(flow).to(torch.bfloat16)) == some
    assert fingerprint(copy.deepcopy(flow).double()) == some
    assert fingerprint(network(seed=1)) != some
    changed = copy.deepcopy(flow)
    changed.network.stem.weight.view(-1)[-1] += 0.1  # the last value is in the sample
    assert fingerprint(changed) != some


def test_the_embedded_models_hash_is_that_of_before():
    assert fingerprint(steer.load("emoji")).startswith("0ea6c032a6d6")


def test_adapters_fit_a_network_that_was_compiled_and_one_that_was_not(flow, saved, tmp_path):
    tuned, folder = saved
    compiled = network()
    compiled.network = torch.compile(compiled.network, backend="eager")
    assert fingerprint(compiled) == fingerprint(flow)
    loaded = load_adapters(compiled, folder)
    x = noise()
    with torch.no_grad():
        torch.testing.assert_close(loaded.jump(x, 0, 1), tuned.jump(x, 0, 1))
        assert torch.equal(loaded.at(0).jump(x, 0, 1), compiled.jump(x, 0, 1))
    save_adapters(loaded, tmp_path / "again")
    same(load_adapters(flow, tmp_path / "again"), tuned)
    pairs = (adapt(f).adapters().values() for f in (flow, compiled))
    for p, q in zip(*pairs, strict=True):
        assert torch.equal(p, q)


def test_guidance_on_top_of_a_tuned_map(flow):
    """Every method, on tiny numbers; scale 0 is guidance of the base."""
    tuned = train(adapt(flow))

    def reward(images):
        return images[:, 0].mean((1, 2))

    for method in steer.METHODS:
        options = {"temperature": 0.1} if TABLE[method].tempered else {}
        results = {
            key: steer.sample(view, reward, ["apple"], 2, 2, method, **options)
            for key, view in {"base": flow, "off": tuned.base, "on": tuned}.items()
        }
        assert torch.equal(results["base"].x, results["off"].x), method
        assert results["on"].x.isfinite().all()
        assert not torch.equal(results["on"].x, results["off"].x), method
        assert results["on"].nfe == results["base"].nfe
    mixed = steer.ClassifierFree(tuned, 2.0).given(["apple"])
    assert mixed.jump(noise(), 0.0, 1.0).isfinite().all()
