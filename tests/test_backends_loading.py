"""Opening pipelines by name, folder and file, and what is said where that fails."""

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

import steer
from steer.adapters.store import save_adapters
from tests import tiny_pipelines as tiny
from tests.original_layout import single_file
from tests.test_backends_lora import looked, off, trained
from tests.tiny_flows import flow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three pipelines as `save_pretrained` writes them; do not change them."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("sdxl", "flux", "flux3_klein"):
        tiny.save(name, root / name)
    return root


def options(name):
    call = dict(tiny.CALLS[name])
    return {"height": call.pop("height"), "width": call.pop("width"), "call": call}


@pytest.mark.parametrize("name", ["sdxl", "flux", "flux3_klein"])
def test_a_folder_is_the_pipeline_that_was_saved(folders, name):
    cfg = {"cfg": tiny.GUIDANCE[name][1]} if tiny.GUIDANCE[name] else {}
    loaded = steer.load(folders / name, **options(name), **cfg)
    tiny.ready(loaded.source.pipe)
    assert off(looked(loaded), looked(flow(name))) < 1e-6
    assert next(loaded.network.parameters()).dtype == torch.float32
    assert loaded.name == str(folders / name)


def test_precision_and_device(folders):
    loaded = steer.load(folders / "flux", dtype=torch.bfloat16, device="cpu", **options("flux"))
    assert loaded.network.dtype == loaded.vae.dtype == torch.bfloat16
    assert loaded.given(["a"]).lookahead(torch.zeros(1, *loaded.event_shape), 0.5).isfinite().all()


def test_a_variant_of_the_weights(folders, tmp_path):
    tiny.build("flux").save_pretrained(tmp_path / "half", variant="fp16")
    loaded = steer.load(tmp_path / "half", variant="fp16", **options("flux"))
    assert off(looked(loaded), looked(flow("flux"))) < 1e-6
    for file in (tmp_path / "half").glob("*/*.safetensors"):
        assert ".fp16" in file.name
    alone = steer.load(tmp_path / "half", **options("flux"))  # there is no other
    assert off(looked(alone), looked(flow("flux"))) < 1e-6
    assert alone.network.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match=r"is incomplete: .*variant 'bf16'"):
        steer.load(tmp_path / "half", variant="bf16", **options("flux"))


def test_two_variants_and_nothing_else_are_a_question(folders, tmp_path):
    shutil.copytree(folders / "flux", tmp_path / "flux")
    file = next((tmp_path / "flux" / "vae").glob("*.safetensors"))
    shutil.copy(file, file.with_name(file.name.replace(".safetensors", ".bf16.safetensors")))
    file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    refused(
        FileNotFoundError, lambda: steer.load(tmp_path / "flux"), "vae/",
        "variant='bf16', variant='fp16'",
    )  # fmt: skip


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(tmp_path, variant):
    """Of denoiser and text encoder, and of a half-precision variant of them."""
    made, folder = tiny.build("flux"), tmp_path / "pipeline"
    made.save_pretrained(folder, variant=variant)
    for part in ("transformer", "text_encoder_2"):
        shutil.rmtree(folder / part)
        size = sum(p.numel() * p.element_size() for p in getattr(made, part).parameters())
        getattr(made, part).save_pretrained(
            folder / part, variant=variant, max_shard_size=size // 3
        )
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
        assert len(list((folder / part).glob("*.safetensors.index*.json"))) == 1
    loaded = steer.load(folder, **options("flux"))
    assert off(looked(loaded), looked(flow("flux"))) < 1e-6
    lost = sorted((folder / "transformer").glob("*-of-*.safetensors"))[0]
    lost.unlink()
    refused(FileNotFoundError, lambda: steer.load(folder), "is incomplete", lost.name)


def test_a_single_file_with_its_config(tmp_path):
    """In the layout that model sites have; its configuration from a folder."""
    made = tiny.save("sd15_ddim", tmp_path / "folder")
    safetensors.torch.save_file(single_file(made), tmp_path / "sd.safetensors")
    cfg = tiny.GUIDANCE["sd15_ddim"][1]
    loaded = steer.load(
        tmp_path / "sd.safetensors", config=tmp_path / "folder", cfg=cfg, **options("sd15_ddim")
    )
    assert off(looked(loaded), looked(flow("sd15_ddim"))) < 1e-5
    x = torch.randn(1, *loaded.event_shape)
    with torch.no_grad():
        assert off(loaded.decode(x), flow("sd15_ddim").decode(x)) < 1e-5


# ------------------------------------------------------------------ errors


def refused(error, call, *words):
    with pytest.raises(error) as found:
        call()
    text = " ".join(str(found.value).split())
    for word in words:
        assert word in text, text
    return text


def test_a_single_file_without_a_config(folders):
    file = next((folders / "sdxl" / "unet").glob("*.safetensors"))
    refused(ValueError, lambda: steer.load(file), "contains only weights", "config=")


def test_a_file_that_could_run_code(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    refused(ValueError, lambda: steer.load(tmp_path / "model.ckpt"), "not a .safetensors file")


def test_pickled_weights_in_a_folder(folders, tmp_path):
    shutil.copytree(folders / "flux", tmp_path / "flux")
    for file in (tmp_path / "flux" / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    refused(
        ValueError, lambda: steer.load(tmp_path / "flux"), "has pickled weights", "vae/",
        "safe_serialization=True",
    )  # fmt: skip


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_a_folder_that_is_not_whole(folders, tmp_path, part):
    shutil.copytree(folders / "flux", tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux" / part)
    refused(FileNotFoundError, lambda: steer.load(tmp_path / "flux"), "is incomplete", f"{part}/")


def test_one_part_of_a_pipeline(folders):
    text = refused(
        ValueError, lambda: steer.load(folders / "flux" / "transformer"), "not a pipeline"
    )
    assert "FluxTransformer2DModel, which is one part of a pipeline" in text


def test_a_class_that_diffusers_does_not_have(folders, tmp_path):
    shutil.copytree(folders / "flux", tmp_path / "new")
    index = tmp_path / "new" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "Flux9Pipeline"}))
    refused(ValueError, lambda: steer.load(tmp_path / "new"), "'Flux9Pipeline'", "pipeline=")


def test_a_class_that_is_no_pipeline():
    network = tiny.build("flux").transformer
    refused(
        TypeError, lambda: steer.sample(network, lambda images: images.mean((1, 2, 3))),
        "FluxTransformer2DModel", "give the whole pipeline",
    )  # fmt: skip


def test_options_of_pipelines_are_for_pipelines():
    refused(ValueError, lambda: steer.load("emoji", height=64), "height", "diffusers pipelines")


def test_options_of_loading_are_not_for_live_ones():
    made = tiny.build("flux")
    refused(ValueError, lambda: steer.load(made, variant="fp16"), "variant", "leave it out")
    refused(ValueError, lambda: steer.load(made, heigth=32), "heigth", "did you mean height")


def test_without_diffusers(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(
        ModuleNotFoundError, lambda: steer.load(folders / "flux"),
        "pip install 'flowsteer[diffusers]'",
    )  # fmt: skip


class Refusing(BaseHTTPRequestHandler):
    """A hub that does not let anyone in."""

    code = "GatedRepo"

    def do_HEAD(self):
        self.send_response(403 if self.code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", self.code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    use_hub(monkeypatch, address, tmp_path)
    yield
    server.shutdown()


def use_hub(monkeypatch, address, cache):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for module in ("file_download", "hf_api", "utils._http"):
        found = sys.modules.get(f"huggingface_hub.{module}")
        for name, value in (("ENDPOINT", address), ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            if hasattr(found, name):
                monkeypatch.setattr(found, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("GatedRepo", ("is gated", "https://huggingface.co/someone/model", "hf auth login")),
        ("RepoNotFound", ("the hub has no someone/model",)),
    ],
)
def test_a_model_that_the_hub_does_not_give(hub, monkeypatch, code, words):
    monkeypatch.setattr(Refusing, "code", code)
    refused(ConnectionError, lambda: steer.load("someone/model"), *words)


def test_a_hub_that_is_not_reached(monkeypatch, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    text = refused(
        ConnectionError, lambda: steer.load("someone/model"), "the hub was not reached",
        "model_index.json", "hf download someone/model",
    )  # fmt: skip
    assert str(tmp_path) in text  # where files were looked for


def test_offline_says_so_too(monkeypatch, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(ConnectionError, lambda: steer.load("someone/model"), "the hub was not reached")


# ------------------------------------------------------------------ LoRA files


def test_a_lora_of_another_base(tmp_path):
    save_adapters(trained(flow("flux")), tmp_path)
    refused(ValueError, lambda: steer.load(flow("sdxl"), lora=tmp_path), "were made for")
    (tmp_path / "adapter_config.json").unlink()
    refused(ValueError, lambda: steer.load(flow("sdxl"), lora=tmp_path), "made for another base")
    refused(ValueError, lambda: steer.load(flow("sd3"), lora=tmp_path), "made for another base")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"transformer.a.dora_scale": torch.ones(1)}, ("more than a plain LoRA", "dora_scale")),
        ({"transformer.a.lokr_w1": torch.ones(1)}, ("more than a plain LoRA",)),
        ({"something.else": torch.ones(1)}, ("made for another base",)),
    ],
)
def test_a_file_that_is_no_plain_lora(tmp_path, state, words):
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    refused(ValueError, lambda: steer.load(flow("flux"), lora=tmp_path / "x.safetensors"), *words)


def test_lora_files_that_are_none(tmp_path):
    base = flow("flux")
    refused(FileNotFoundError, lambda: steer.load(base, lora=tmp_path / "no"), "no LoRA at")
    refused(FileNotFoundError, lambda: steer.load(base, lora=tmp_path), "contains no LoRA")
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 20)
    refused(ValueError, lambda: steer.load(base, lora=tmp_path), "is damaged")
    (tmp_path / "b.safetensors").write_bytes(b"")
    refused(ValueError, lambda: steer.load(base, lora=tmp_path), "several LoRA files")
    (tmp_path / "c.bin").write_bytes(b"")
    refused(ValueError, lambda: steer.load(base, lora=tmp_path / "c.bin"), "run code")


# ------------------------------------------------------------------ who imports diffusers


def test_only_the_backends_import_diffusers():
    for file in [*(ROOT / "steer").rglob("*.py"), *(ROOT / "recipes").rglob("*.py"),
                 *(ROOT / "rewards").rglob("*.py")]:  # fmt: skip
        lines = [line.strip() for line in file.read_text().splitlines()]
        if any(line.startswith(("import diffusers", "from diffusers")) for line in lines):
            assert file.parent.name == "backends" or file.name == "emoji_pipeline.py", file


def test_steering_imports_no_diffusers():
    """Neither `import steer`, nor a run on the embedded model."""
    code = (
        "import sys, steer, rewards, recipes.cli\n"
        "flow = steer.GaussianMixture([[0.0, 0.0]], 1.0)\n"
        "steer.sample(flow, lambda x: x[:, 0], steps=2, particles=2)\n"
        "assert not any(m.partition('.')[0] == 'diffusers' for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
