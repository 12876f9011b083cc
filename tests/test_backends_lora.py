"""LoRA of pipelines, both ways: ours by the pipeline's own loader, and others' on our flow."""

import re
import warnings

import pytest
import safetensors.torch
import torch
from diffusers.utils import convert_state_dict_to_kohya

import steer
from recipes.cli import main
from steer.adapters.attach import attach, parted
from steer.adapters.fingerprint import fingerprint
from steer.adapters.inject import adapt
from steer.adapters.shared import SHARED
from steer.adapters.store import save_adapters
from steer.objectives.direct import Direct
from steer.reward import wrap
from steer.tuning.module import RewardTuning
from steer.tuning.prompts import Prompts
from tests import tiny_pipelines as tiny
from tests.tiny_flows import FAMILIES, flow, seen_as

PROMPT = "a cat"


def red(images):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def trained(base, rank=2, alpha=6.0, seed=0):
    """Adapters that do something, with an alpha that is not the rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tuned = adapt(base, rank=rank, alpha=alpha)
    with torch.no_grad():
        for i, p in enumerate(tuned.adapters().values()):
            generator = torch.Generator().manual_seed(seed + i)
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return tuned


def looked(one, seed=0):
    x = torch.randn(1, *one.event_shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return one.given([PROMPT]).jump(x, 0.3, 1.0)


def off(a, b):
    return float((a - b).abs().max() / b.abs().max())


def loaded_by_diffusers(made, name, folder, reader, component):
    if reader == "pipeline":
        made.load_lora_weights(folder, adapter_name="reward")
    else:
        network = getattr(made, component)
        network.load_lora_adapter(
            folder, weight_name=SHARED, prefix=component, adapter_name="reward"
        )
    return seen_as(made, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_ours_load_by_the_pipelines_own_loader(name, tmp_path):
    base = flow(name)
    tuned = trained(base)
    save_adapters(tuned, tmp_path)
    wanted = looked(tuned)
    assert off(wanted, looked(base)) > 1e-3
    reader = base.about["lora_loader"]
    if reader:
        made = tiny.build(name)
        theirs = loaded_by_diffusers(made, name, tmp_path, reader, base.component)
        assert off(looked(theirs), wanted) < 1e-5
    (tmp_path / "adapter_config.json").unlink()  # and back, by the file that diffusers reads
    again = steer.load(base, lora=tmp_path)
    assert off(looked(again), wanted) < 1e-5
    assert off(looked(again.at(0.0)), looked(base)) < 1e-6


@pytest.mark.parametrize("name", ["sdxl", "sd15_ddim"])
@pytest.mark.parametrize("alpha", [None, 1.0], ids=["folded", "alpha"])
def test_kohya_files_of_stable_diffusion(name, alpha, tmp_path):
    tuned = trained(flow(name), alpha=2.0)
    save_adapters(tuned, tmp_path / "ours")
    state = convert_state_dict_to_kohya(safetensors.torch.load_file(tmp_path / "ours" / SHARED))
    if alpha is not None:  # half of rank 2, and B twice as large
        state = {
            n: torch.tensor(alpha) if n.endswith(".alpha") else 2 * p if "lora_up" in n else p
            for n, p in state.items()
        }
    safetensors.torch.save_file(state, tmp_path / "kohya.safetensors")
    again = steer.load(flow(name), lora=tmp_path / "kohya.safetensors")
    assert off(looked(again), looked(tuned)) < 1e-5


@pytest.mark.parametrize("name", ["flux", "flux3_klein", "sdxl", "sd3", "qwen_image", "z_image"])
def test_the_file_for_comfyui(name, tmp_path, monkeypatch):
    """Read as ComfyUI reads it: by names, and by `.alpha` where there is one."""
    monkeypatch.chdir(tmp_path)
    base = flow(name)
    tuned = trained(base)
    save_adapters(tuned, "ours")
    assert main(["export", "--lora=ours", "--out=comfy", "--format=comfyui"]) == 0
    state = safetensors.torch.load_file("comfy/lora.safetensors")
    assert all(float(p) == 2.0 for n, p in state.items() if n.endswith(".alpha"))  # the rank
    start = {"sdxl": "lora_unet_", "flux3_klein": "diffusion_model."}.get(name, "transformer.")
    assert all(n.startswith(start) for n in state)
    if name == "flux3_klein":
        assert not any("attn.to_" in n or "single_transformer_blocks" in n for n in state)
    again = steer.load(base, lora="comfy/lora.safetensors")
    assert off(looked(again), looked(tuned)) < 1e-5
    assert "ComfyUI's `models/loras`" in (tmp_path / "comfy" / "README.md").read_text()


@pytest.mark.parametrize("name", ["flux", "sdxl", "flux3_klein"])
def test_a_lora_that_is_on_is_steered_with(name, tmp_path):
    save_adapters(trained(flow(name)), tmp_path)
    made = tiny.build(name)
    plain = looked(seen_as(made, name))
    made.load_lora_weights(tmp_path, adapter_name="style")
    with_it = looked(seen_as(made, name))
    assert off(with_it, plain) > 1e-3
    made.set_adapters("style", 0.5)
    assert off(looked(seen_as(made, name)), with_it) > 1e-4


def test_a_lora_that_is_on_is_tuned_further(tmp_path):
    """One file comes out, of both, and the pipeline keeps its own."""
    save_adapters(trained(flow("flux")), tmp_path / "style")
    made = tiny.build("flux")
    made.load_lora_weights(tmp_path / "style", adapter_name="style")
    made.set_adapters("style", 0.5)
    base = seen_as(made, "flux")
    before = looked(base)
    tuned = steer.finetune(
        base, red, [PROMPT], steps=1, batch_size=2, sweep=[], check_every=0, temperature=0.1,
        learning_rate=1e-2, warm=0, out=tmp_path / "fox", progress=False,
    )  # fmt: skip
    assert torch.equal(looked(base), before)
    assert off(looked(tuned.base), before) < 1e-5
    assert off(looked(tuned), before) > 1e-4
    made.unload_lora_weights()
    made.load_lora_weights(tmp_path / "fox")
    assert off(looked(seen_as(made, "flux")), looked(tuned)) < 1e-5


def test_several_that_are_on_are_parted_as_one(tmp_path):
    made = tiny.build("sdxl")
    for seed, name in enumerate(("one", "two")):
        save_adapters(trained(flow("sdxl"), rank=seed + 1, seed=seed), tmp_path / name)
        made.load_lora_weights(tmp_path / name, adapter_name=name)
    made.set_adapters(["one", "two"], [0.5, 1.5])
    base = seen_as(made, "sdxl")
    plain, layers = parted(base)
    assert off(looked(plain), looked(flow("sdxl"))) < 1e-6
    assert off(looked(attach(plain, layers)), looked(base)) < 1e-5
    made.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        parted(base)


def test_an_lcm_lora_gives_the_jump_of_a_pair(tmp_path):
    """The base's velocity, and the jump of its student by a LoRA."""
    save_adapters(trained(flow("sdxl")), tmp_path)
    base = flow("sdxl")
    student = steer.load(base, lora=tmp_path)
    pair = steer.Pair(base, student)
    x = torch.randn(1, *base.event_shape)
    bound = pair.given([PROMPT])
    with torch.no_grad():
        assert torch.equal(bound.velocity(x, 0.4), base.given([PROMPT]).velocity(x, 0.4))
        assert torch.equal(bound.jump(x, 0.4, 1.0), student.given([PROMPT]).jump(x, 0.4, 1.0))


SNIPPETS = ("flux", "sdxl", "flux3_klein", "hunyuan_image", "prx")


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_cards_lines_do_what_they_say(name, tmp_path, monkeypatch):
    """A saved pipeline, tuned; the lines of the run's card, run as they stand."""
    monkeypatch.chdir(tmp_path)
    tiny.save(name, "base")
    made = tiny.load("base")
    tuned = steer.finetune(
        seen_as(made, name), red, [PROMPT], steps=1, batch_size=2, sweep=[], check_every=0,
        temperature=0.1, out="fox", progress=False,
    )  # fmt: skip
    card = (tmp_path / "fox" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    theirs = [b for b in blocks if "from diffusers" in b]
    assert len(theirs) == (name != "prx"), card
    for block in theirs:
        lines = [one for one in block.splitlines() if not one.startswith("pictures")]
        scope: dict = {}
        if name == "flux3_klein":  # its index names a prompt upsampler, which the tiny one lacks
            scope["pipe"] = tiny.load("base")
            lines = [one for one in lines if "lora" in one or "adapters" in one]
        exec("\n".join(lines), scope)
        tiny.ready(scope["pipe"])
        assert off(looked(seen_as(scope["pipe"], name)), looked(tuned)) < 1e-5
    assert 'lora="fox"' in blocks[-1]
    again = steer.load("base", lora="fox", **_size(name))
    tiny.ready(again.flow.source.pipe)
    assert off(looked(again), looked(tuned)) < 1e-5


def _size(name):
    call = dict(tiny.CALLS[name])
    options = {"height": call.pop("height"), "width": call.pop("width"), "call": call}
    if tiny.GUIDANCE[name]:
        options["cfg"] = tiny.GUIDANCE[name][1]
    return options


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_direct_lowers_its_loss(name):
    tuned = trained(flow(name), rank=1)
    module = RewardTuning(
        tuned, Direct(), wrap(red), Prompts([PROMPT]), steps=1, batch_size=2, micro_batch=2,
        temperature=0.1,
    )  # fmt: skip
    before = module.objective(module.batch(0, 0, 2))["loss"]
    parameters = list(tuned.adapters().values())
    slopes = torch.autograd.grad(before, parameters, materialize_grads=True, allow_unused=True)
    size = sum(float(g.square().sum()) for g in slopes) ** 0.5
    assert size > 0
    with torch.no_grad():
        for p, g in zip(parameters, slopes, strict=True):
            p.sub_(g, alpha=1e-2 / size)
        after = module.objective(module.batch(0, 0, 2))["loss"]
    assert after < before


def test_adapters_are_the_denoisers_whatever_decodes():
    """The weights that adapters were made for are the same with a LoRA on, or another decoder."""
    base = flow("sdxl")
    made = tiny.build("sdxl")
    with torch.no_grad():
        next(made.vae.parameters()).add_(1.0)
    assert fingerprint(seen_as(made, "sdxl")) == fingerprint(base) == fingerprint(trained(base))
    with torch.no_grad():
        next(made.unet.parameters()).add_(1.0)
    assert fingerprint(seen_as(made, "sdxl")) != fingerprint(base)


def test_of_a_large_denoiser_samples_are_hashed(monkeypatch):
    """Not its weights whole: at most so many values of each tensor leave the device."""
    monkeypatch.setattr("steer.adapters.fingerprint.WHOLE", 1000)
    monkeypatch.setattr("steer.adapters.fingerprint.SAMPLE", 16)
    seen = []
    monkeypatch.setattr("steer.adapters.fingerprint.hashlib.sha256", lambda: Digest(seen))
    base = flow("sdxl")
    fingerprint(base)
    tensors = len(base.network.state_dict())
    assert sum(seen) <= tensors * (2 * 16 + 120)  # bfloat16 values, and a name and shape each


class Digest:
    def __init__(self, seen):
        self.seen = seen

    def update(self, data):
        self.seen.append(len(data))

    def hexdigest(self):
        return ""


@pytest.mark.parametrize("objective", steer.OBJECTIVES)
@pytest.mark.parametrize(
    "name",
    ["flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux3_klein", "sdxl", "wan"))],
)
def test_every_objective_takes_a_step(name, objective):
    tuned = steer.finetune(
        flow(name), red, ["a cat", "a dog"], objective=objective, steps=1, batch_size=8, rank=2,
        sweep=[], check_every=0, progress=False, temperature=0.1, warm=0,
    )  # fmt: skip
    assert any(p.any() for n, p in tuned.adapters().items() if ".lora_B." in n)
