"""Models, adapters and judges by their names on a hub; what is in the cache is not asked for."""

import errno
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

import steer
from recipes.defaults import judge_of
from recipes.identity import adapter_files, fingerprints
from recipes.terminal import console
from rewards.judge import EMBEDDED
from steer import hub as names
from steer.adapters.store import save_adapters
from tests import small_hub
from tests import tiny_pipelines as tiny
from tests.test_backends_loading import options, refused, use_hub
from tests.test_backends_lora import looked, off, trained
from tests.tiny_flows import flow


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "flux"
    tiny.save("flux", folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with small_hub.running() as made:
        use_hub(monkeypatch, made.address, tmp_path / "cache")
        yield made


NOWHERE = "http://127.0.0.1:9"


def offline(hub, monkeypatch):
    hub.repositories.clear()
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hf://a/b", ("a/b", None, "")),
        ("hf://a-1/b.c@main", ("a-1/b.c", "main", "")),
        ("hf://a/b@refs/pr/3", ("a/b", "refs/pr/3", "")),
        ("hf://a/b@v1.0/some/x.safetensors", ("a/b", "v1.0", "some/x.safetensors")),
        (Path("hf://a/b/x.safetensors"), ("a/b", None, "x.safetensors")),
    ],
)
def test_names(text, found):
    assert tuple(names.named(text)) == found
    assert names.named(str(names.named(text))) == names.named(text)


@pytest.mark.parametrize("text", ["hf://a", "hf://a/b@", "hf://a/b/../../etc/passwd", "hf://"])
def test_names_of_nothing(text):
    with pytest.raises(ValueError, match=r"names no repository.*hf://owner/name"):
        names.named(text)


def test_a_pipeline_is_fetched_once_and_then_nothing_is_asked(hub, monkeypatch, pipeline):
    hub.repositories["someone/flux"] = pipeline
    wanted = looked(flow("flux"))
    name = "hf://someone/flux"
    sha = hub.commit("someone/flux")
    assert fingerprints(name)[name] == sha  # before anything is fetched
    loaded = steer.load(name, **options("flux"))
    tiny.ready(loaded.source.pipe)
    assert off(looked(loaded), wanted) < 1e-6
    assert loaded.name == "someone/flux"
    offline(hub, monkeypatch)
    for again in (name, "someone/flux", f"{name}@main", f"{name}@{sha}"):
        loaded = steer.load(again, **options("flux"))
        assert loaded.name == "someone/flux"
        assert fingerprints(again)[again] == sha
    assert hub.asked == []
    refused(ConnectionError, lambda: steer.load(f"{name}@other"), "the hub was not reached",
            "hf download someone/flux")  # fmt: skip


def test_what_is_missing_in_the_cache_is_fetched_at_its_commit(hub, pipeline, tmp_path):
    """A repository that moved on in between is not mixed with what was there."""
    shutil.copytree(pipeline, tmp_path / "flux")
    hub.repositories["someone/flux"] = tmp_path / "flux"
    loaded = steer.load("hf://someone/flux", **options("flux"))
    cached = names.cached(names.Named("someone/flux"), "model_index.json")
    (cached / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    hub.asked.clear()
    steer.load("hf://someone/flux", **options("flux"))
    assert any(cached.name in asked and "/vae/" in asked for asked in hub.asked)
    assert not any("/main/" in asked for asked in hub.asked if "resolve" in asked)
    assert loaded.name == "someone/flux"


def test_a_repository_of_half_precision_alone(hub, tmp_path):
    tiny.build("flux").save_pretrained(tmp_path / "half", variant="fp16")
    hub.repositories["someone/half"] = tmp_path / "half"
    loaded = steer.load("hf://someone/half", **options("flux"))
    assert off(looked(loaded), looked(flow("flux"))) < 1e-6


def test_what_the_hub_does_not_have(hub, pipeline):
    refused(ConnectionError, lambda: steer.load("hf://no/one"), "the hub has no no/one")
    hub.repositories["someone/flux"] = pipeline
    text = "hf://someone/flux@v9"
    refused(ConnectionError, lambda: steer.load(text), "someone/flux has no such revision")
    text = "hf://someone/flux/vae/config.json"
    refused(ValueError, lambda: steer.load(text), "names a file", "hf://someone/flux")
    refused(
        ValueError, lambda: steer.load("hf://someone/flux@main", revision="v1"), "leave one of"
    )


def test_adapters(hub, monkeypatch, tmp_path):
    base, tuned = flow("flux"), trained(flow("flux"))
    save_adapters(tuned, tmp_path / "lora")
    hub.repositories["someone/lora"] = tmp_path / "lora"
    x = torch.randn(2, *base.event_shape)
    wanted = tuned.given(["a"]).jump(x, 0.2, 0.9)
    for name in ("hf://someone/lora", Path("hf://someone/lora@main")):
        loaded = steer.load(base, lora=name)
        assert torch.allclose(loaded.given(["a"]).jump(x, 0.2, 0.9), wanted, atol=1e-6)
        assert all(Path(file).is_file() for file in adapter_files(Path(name)))
        offline(hub, monkeypatch)
    assert hub.asked == []


@pytest.fixture
def lora_file(hub, tmp_path):
    """A repository with one LoRA under a name of its own: its folder, the base, the tuned flow."""
    base, tuned = flow("flux"), trained(flow("flux"))
    save_adapters(tuned, tmp_path / "lora")
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(tmp_path / "lora" / "pytorch_lora_weights.safetensors", folder / "a.safetensors")
    hub.repositories["someone/files"] = folder
    return folder, base, tuned


def test_a_lora_file_and_several_of_them(lora_file):
    folder, base, tuned = lora_file
    x = torch.randn(2, *base.event_shape)
    wanted = tuned.given(["a"]).jump(x, 0.2, 0.9)
    loaded = steer.load(base, lora="hf://someone/files")
    assert torch.allclose(loaded.given(["a"]).jump(x, 0.2, 0.9), wanted, atol=1e-5)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    refused(
        ValueError, lambda: steer.load(base, lora="hf://someone/files"), "several LoRA files",
        "hf://someone/files/a.safetensors",
    )  # fmt: skip
    loaded = steer.load(base, lora="hf://someone/files/b.safetensors")
    assert torch.allclose(loaded.given(["a"]).jump(x, 0.2, 0.9), wanted, atol=1e-5)
    (folder / "a.safetensors").unlink()
    (folder / "b.safetensors").unlink()
    (folder / "config.json").write_text("{}")
    refused(FileNotFoundError, lambda: steer.load(base, lora="hf://someone/files"), "no LoRA")


def test_a_lora_file_in_the_cache_needs_no_network(lora_file, monkeypatch, tmp_path):
    _, base, _ = lora_file
    steer.load(base, lora="hf://someone/files")
    use_hub(monkeypatch, NOWHERE, tmp_path / "cache")
    assert steer.load(base, lora="hf://someone/files").kind == base.kind
    use_hub(monkeypatch, NOWHERE, tmp_path / "empty")
    refused(ConnectionError, lambda: steer.load(base, lora="hf://someone/files"), "not reached")


def test_a_hub_that_is_not_reached_is_said_to_be(monkeypatch, tmp_path):
    """Without the offline flag: the HTTP client's own error is no OSError."""
    use_hub(monkeypatch, NOWHERE, tmp_path / "cache")
    name = names.Named("owner/name")
    assert names.commit(name, "config.json") is None
    for ask in (
        lambda: names.listing(name), lambda: names.file_of(name, "config.json"),
        lambda: names.lora_of(name), lambda: steer.load("hf://owner/name"),
        lambda: steer.load("owner/name"), lambda: steer.load("emoji", lora="hf://owner/name"),
    ):  # fmt: skip
        refused(ConnectionError, ask, "the hub was not reached", "hf download owner/name")


def test_files_of_two_commits_are_not_mixed(hub, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_text("1")
    hub.repositories["someone/own"] = folder
    name = names.Named("someone/own")
    first = names.file_of(name, "config.json")
    assert names.folder_with(name, "config.json", "model.safetensors") == first.parent
    (first.parent / "model.safetensors").unlink()
    (folder / "config.json").write_text("2")
    hub.asked.clear()
    refused(
        ConnectionError,  # this small hub has the newest commit alone
        lambda: names.folder_with(name, "config.json", "model.safetensors"), "no such revision",
    )  # fmt: skip
    assert any(first.parent.name in asked for asked in hub.asked)


def test_a_judge_and_a_model_of_our_own_format(hub, monkeypatch):
    hub.repositories["someone/judge"] = EMBEDDED
    hub.repositories["someone/emoji"] = Path(steer.__file__).with_name("zoo") / "emoji"
    images, texts = torch.rand(2, 3, 32, 32), ["a fox", "a cat"]
    for _ in range(2):
        judge = judge_of("emoji", "hf://someone/judge", console())
        assert torch.equal(
            judge(images, texts), judge_of("emoji", "own", console())(images, texts)
        )
        mine = steer.load("hf://someone/emoji")
        x = torch.randn(1, *mine.event_shape)
        found = [one.given(["a fox"]).jump(x, 0, 1) for one in (mine, steer.load("emoji"))]
        assert torch.equal(*found)
        offline(hub, monkeypatch)
    assert hub.asked == []


def test_what_is_wrong_on_this_machine_is_not_blamed_on_the_network():
    full = OSError(28, "No space left on device")
    told = names.explained(full, "owner/name", "config.json")
    assert type(told) is OSError
    assert "HF_HOME" in str(told)
    assert "No space left" in str(told)
    wrong = huggingface_hub.errors.HFValidationError("Repo id must use alphanumeric chars")
    told = names.explained(wrong, "owner/--name", "config.json")
    assert isinstance(told, ValueError)
    assert "'owner/--name' is not the name of a repository" in str(told)


def test_a_firewall_of_this_machine_is_no_full_disk():
    """Both are errors of the system; only a file's has a name."""
    reached = ConnectionError("no route")
    reached.__cause__ = OSError(errno.EPERM, "Operation not permitted")
    assert isinstance(names.explained(reached, "owner/name", "weights"), ConnectionError)
    for number, name in ((errno.EPERM, "/cache/x"), (errno.ENOSPC, None)):
        kept = RuntimeError("not kept")
        kept.__cause__ = OSError(number, "no", name)
        assert "could not be written into" in str(names.explained(kept, "owner/name", "weights"))
