"""Hand-off: each format reads back as what was exported, and the card says what it is."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import steer
from recipes.cli import main
from recipes.export import DIFFUSERS, diffusers_file
from steer.adapters.card import card, write_card
from steer.adapters.inject import adapt
from steer.adapters.store import CONFIG, WEIGHTS, read_metadata, save_adapters
from steer.models.loading import save
from steer.models.two_time import NetworkFlow, TwoTimeUNet

NOTES = {
    "reward": "0.5*clip + brightness", "objective": "direct", "options": {"jumps": 2},
    "prompts": ["a fox", "a `red`\n| apple"], "prompt_count": 200, "temperature": 0.0123456,
    "steps": 300, "batch": 16, "seed": 0, "scale": 0.7,
    "figures": {
        "reward": {"base": 0.25, "tuned": 0.375}, "judge": {"base": [1.0, 0.1], "tuned": None},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model's folder, and adapters for it with pictures."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    save(NetworkFlow(TwoTimeUNet(["fox"], (8, 8), (1, 1), size=8, width=16, groups=4)), root / "m")
    tuned = adapt(steer.load(root / "m"), rank=3, alpha=5.0)
    for p in tuned.adapters().values():
        p.data += 0.1 * torch.randn(p.shape)
    save_adapters(tuned, root / "lora", NOTES)
    Image.new("RGB", (4, 4)).save(root / "lora" / "grid.png")
    (root / "lora" / "checkpoints").mkdir()
    (root / "lora" / "checkpoints" / "last.ckpt").write_bytes(b"large")
    return root, tuned


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return made[0]


def export(root, *words):
    return main(["export", f"--lora={root / 'lora'}", "--out=out", *words])


def same(a, b, **tolerance):
    x = torch.randn(2, *a.event_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(a.jump(x, 0.0, 1.0), b.jump(x, 0.0, 1.0), **tolerance)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def front(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---")[1]), text


# ------------------------------------------------------------------ formats


def test_peft_is_a_clean_folder(made, root, tmp_path):
    assert export(root) == 0
    assert names(tmp_path / "out") == ["README.md", CONFIG, WEIGHTS, "grid.png"]
    same(steer.load(root / "m", lora="out"), made[1], rtol=0, atol=0)
    assert read_metadata("out") == read_metadata(root / "lora")
    assert names(tmp_path) == ["out"]


def test_a_scale_is_put_into_alpha(made, root):
    assert export(root, "--scale=0.7") == 0
    same(steer.load(root / "m", lora="out"), made[1].at(0.7))
    assert read_metadata("out")["scale"] == pytest.approx(1)
    before, after = (
        safetensors.torch.load_file(f / WEIGHTS) for f in (root / "lora", Path.cwd() / "out")
    )
    assert all(torch.equal(before[k], after[k]) for k in before)
    text = front(Path.cwd() / "out")[1]
    assert "alpha 3.5" in text
    assert "lora_scale=1.0" in text
    assert "at 1 0.7 of the tuned update" in text


def test_merged_is_a_model(made, root):
    assert export(root, "--format=merged", "--scale=0.5", f"--model={root / 'm'}") == 0
    out = Path.cwd() / "out"
    assert names(out) == ["README.md", "config.json", "grid.png", "model.safetensors"]
    same(steer.load(out), made[1].at(0.5), rtol=1e-4, atol=1e-5)
    values, text = front(out)
    assert values["library_name"] == "flowsteer"
    assert 'steer.load("out")' in text
    assert "Recommended scale" not in text


@pytest.mark.parametrize(
    ("words", "lead", "rest"),
    [
        ([], "transformer.", "network."),
        (["--component=unet"], "unet.", "network."),
        (["--inside=network.start", "--component=t"], None, None),
        (["--inside="], "transformer.network.", "network."),
    ],
    ids=str,
)
def test_diffusers_reads_back(root, capsys, words, lead, rest):
    code = export(root, "--format=diffusers", *words)
    err = capsys.readouterr().err
    if lead is None:
        assert code == 2
        assert "is not inside 'network.start'" in err
        return
    assert code == 0
    out = Path.cwd() / "out"
    assert names(out) == ["README.md", "grid.png", DIFFUSERS]
    theirs = safetensors.torch.load_file(out / DIFFUSERS)
    ours = safetensors.torch.load_file(root / "lora" / WEIGHTS)
    assert len(theirs) == len(ours)
    for name, p in ours.items():
        q = theirs[lead + name.removeprefix(f"base_model.model.{rest}")]
        torch.testing.assert_close(q, p * 5 / 3 if ".lora_B." in name else p)
    with safe_open(out / DIFFUSERS, "pt") as file:
        texts = file.metadata()
    header = json.loads(texts["lora_adapter_metadata"])
    component = lead.partition(".")[0]
    plain = {k.removeprefix(f"{component}."): v for k, v in header.items()}
    assert plain["r"] == plain["lora_alpha"] == 3  # alpha / r is in B
    assert f"{lead}{plain['target_modules'][0].removeprefix('network.')}.lora_A.weight" in theirs
    assert texts["reward"] == NOTES["reward"]
    from peft import LoraConfig

    LoraConfig(**plain)


def test_diffusers_with_patterns(tmp_path):
    """Ranks and alphas of their own, and the square root of the rank."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["0", "1", "2"], rank_pattern={"1": 4},
        alpha_pattern={"2": 8}, use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(torch.nn.ModuleDict({"net": net}), config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "file").write_bytes(diffusers_file(tmp_path, scale=0.5))
    state = safetensors.torch.load_file(tmp_path / "file")
    for i, m in enumerate(theirs.base_model.model["net"]):
        update = state[f"transformer.{i}.lora_B.weight"] @ state[f"transformer.{i}.lora_A.weight"]
        torch.testing.assert_close(update, 0.5 * m.get_delta_weight("default"))
    with safe_open(tmp_path / "file", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.r"] == 2
    assert header["transformer.rank_pattern"] == header["transformer.alpha_pattern"] == {"^1": 4}


@pytest.mark.parametrize("told", [True, False])
def test_diffusers_itself_reads_the_file(tmp_path, told):
    diffusers = pytest.importorskip("diffusers")

    class Denoiser(steer.FlowMap):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.path, self.event_shape = steer.Linear(), (4, 8, 8)
            self.net = diffusers.SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
                pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
            )  # fmt: skip

        def velocity(self, x, t):
            t = torch.full((len(x),), 1000.0 * (1 - t))
            text = {"encoder_hidden_states": torch.ones(len(x), 3, 16)}
            return self.net(x, timestep=t, pooled_projections=torch.ones(len(x), 16), **text)[0]

        def jump(self, x, s, t):
            return x + (t - s) * self.velocity(x, s)

    flow = Denoiser().eval()
    tuned = adapt(flow, rank=2, alpha=7.0, targets=["to_q", "to_k", "to_v", "to_out.0"])
    for p in tuned.adapters().values():
        p.data += 0.1 * torch.randn(p.shape)
    save_adapters(tuned, tmp_path)
    data = diffusers_file(tmp_path)
    if not told:  # a reader of no header
        data = safetensors.torch.save(safetensors.torch.load(data), {"format": "pt"})
    (tmp_path / DIFFUSERS).write_bytes(data)
    flow.net.load_lora_adapter(tmp_path, weight_name=DIFFUSERS, prefix="transformer")
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(flow.velocity(x, 0.3), tuned.velocity(x, 0.3))
    assert float((tuned.velocity(x, 0.3) - tuned.base.velocity(x, 0.3)).abs().max()) > 1e-3


def test_the_embedded_model_is_no_pipeline_and_export_says_so(root, capsys, tmp_path):
    save_adapters(adapt(steer.load("emoji"), targets=["head"]), tmp_path / "e")
    assert main(["export", "--lora=e", "--out=out", "--format=diffusers"]) == 0
    assert "emoji is not a diffusers pipeline" in " ".join(capsys.readouterr().err.split())
    assert main(["export", "--lora=e", "--out=merged", "--format=merged"]) == 0
    same(steer.load("merged"), steer.load("emoji"), rtol=0, atol=0)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--scale=0"], ["scale must be above zero"]),
        (["--scale=-1"], ["scale must be above zero"]),
        (["--format=comfy"], ["format"]),
        (["--component=unet"], ["component is for format diffusers or comfyui, not peft"]),
        (["--model=emoji"], ["model is for format merged"]),
        (["--format=merged", "--model=emoji"], ["were made for", "'emoji'"]),
        (["--private"], ["private needs push"]),
        (["--push=me"], ["user/name", "'me'"]),
        (["--lora=none"], ["none"]),
        (["--scala=1"], ["unknown option 'scala'", "scale"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_with_its_mend(root, capsys, tmp_path, words, parts):
    assert export(root, *words) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
    assert names(tmp_path) == []


def test_nothing_is_overwritten_unasked(root, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert export(root) == 2
    assert "exists already" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["mine"]
    assert export(root, "--overwrite") == 2
    assert "it contains no run of flowsteer, but mine" in capsys.readouterr().err
    (tmp_path / "out" / "mine").unlink()
    for _ in range(2):  # an empty folder, and an export
        assert export(root, "--overwrite") == 0


def test_adapters_that_name_no_base(root, capsys, tmp_path):
    flow = steer.load(root / "m")
    flow.name = ""
    save_adapters(adapt(flow), tmp_path / "x")
    assert main(["export", "--lora=x", "--out=out", "--format=merged"]) == 2
    assert "does not name its base: give it with --model" in capsys.readouterr().err
    assert names(tmp_path) == ["x"]
    words = ["--lora=x", "--out=out", "--format=merged", f"--model={root / 'm'}"]
    assert main(["export", *words]) == 0


def test_what_a_file_names_is_not_loaded(root, capsys, tmp_path):
    """Only an embedded model is: a name in a file may be code, or a folder of somebody's."""
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()")
    for base in (str(root / "m"), "evil.py:Flow", "subprocess.Popen:args=['touch', 'ran']"):
        flow = steer.load(root / "m")
        flow.name = base
        save_adapters(adapt(flow), tmp_path / "x")
        assert main(["export", "--lora=x", "--out=out", "--format=merged"]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert "not one of the embedded models (emoji, emoji-diffusers, fashion)" in err
        assert "give the base with --model" in err
        assert names(tmp_path) == ["evil.py", "x"]


def test_links_are_not_followed(made, root, capsys, tmp_path):
    (tmp_path / "secret").write_text("a key")
    save_adapters(made[1], tmp_path / "x", NOTES)
    (tmp_path / "x" / "grid.png").symlink_to(tmp_path / "secret")
    (tmp_path / "x" / "samples.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x" / "front.png").mkdir()
    assert main(["export", "--lora=x", "--out=out"]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "grid.png is a link and is not copied: copy the picture itself" in err
    assert "samples.png is a link" in err
    assert names(tmp_path / "out") == ["README.md", CONFIG, WEIGHTS]
    assert ".png" not in (tmp_path / "out" / "README.md").read_text()


def test_notes_of_another_kind_are_left_out(made, root, tmp_path):
    odd = {
        "scale": "large", "baked_scale": [1], "options": ["a"], "settings": "x", "versions": 3,
        "figures": {"reward": 3, "judge": {"base": {"a": 1}, "tuned": [1, 2, 3]}}, "prompts": 7,
        "prompt_count": "many", "licence": {"a": 1}, "base": ["emoji"], "steps": {}, "reward": [1],
    }  # fmt: skip
    save_adapters(made[1], tmp_path / "x", odd)
    for form, more in (("peft", []), ("diffusers", []), ("merged", [f"--model={root / 'm'}"])):
        words = ["--lora=x", f"--out={form}", f"--format={form}", "--scale=0.5", *more]
        assert main(["export", *words]) == 0
        assert "large" not in (tmp_path / form / "README.md").read_text()


@pytest.mark.parametrize(
    ("state", "part"),
    [
        ({}, "there are no adapters"),
        ({"base_model.model.net.lora_embedding_A": torch.zeros(2, 2)}, "diffusers has no name"),
        ({"base_model.model.net.lora_B.weight": torch.zeros(2, 2)}, "diffusers has no name"),
    ],
    ids=["none", "embedding", "half"],
)
def test_adapters_that_diffusers_has_no_name_for(made, root, capsys, tmp_path, state, part):
    save_adapters(made[1], tmp_path / "x")
    safetensors.torch.save_file(state, tmp_path / "x" / WEIGHTS)
    assert main(["export", "--lora=x", "--out=out", "--format=diffusers"]) == 2
    assert part in " ".join(capsys.readouterr().err.split())
    assert names(tmp_path) == ["x"]


# ------------------------------------------------------------------ the hub


class Hub:
    calls: list = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, repository, *, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append((repository, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, names(folder_path)))


def test_push_uploads_the_finished_folder(root, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    assert export(root, "--push=me/fox", "--private") == 0
    files = ["README.md", CONFIG, WEIGHTS, "grid.png"]
    assert Hub.calls == [("me/fox", True, True), ("me/fox", files)]
    assert "https://huggingface.co/me/fox" in capsys.readouterr().err
    assert "hf download me/fox --local-dir out" in (Path.cwd() / "out/README.md").read_text()


def test_a_push_that_fails_leaves_the_folder_and_says_so(root, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "error", OSError("Name or service not known"))
    assert export(root, "--push=me/fox") == 2
    err = capsys.readouterr().err
    assert "could not be uploaded to me/fox (Name or service not known)" in err
    assert "hf upload me/fox out" in err
    assert "Traceback" not in err
    assert CONFIG in names(tmp_path / "out")


# ------------------------------------------------------------------ the card


def test_the_card_says_what_it_is(made, root, tmp_path):
    folder = tmp_path / "lora"
    save_adapters(made[1], folder, NOTES)
    Image.new("RGB", (4, 4)).save(folder / "grid.png")
    assert write_card(folder) == folder / "README.md"
    values, text = front(folder)
    assert values["library_name"] == "peft"
    assert "base_model" not in values  # a folder on this disk is no hub's name
    assert "lora" in values["tags"]
    for part in (
        "![base and tuned, same seeds](grid.png)", "0.5\\*clip + brightness", "direct",
        "jumps 2", "Prompts: 200 (`a fox`, `a 'red' | apple`, ...)", "0.01235", "300",
        "Recommended scale: 0.7", "| reward | 0.25 | 0.375 |", "| judge | 1 ± 0.1 | – |",
        "rank 3, alpha 5", f"flowsteer {steer.__version__}, torch ",
        read_metadata(folder)["base_sha256"],
        "Effective batch (pictures per step): 16", "licence",
    ):  # fmt: skip
        assert part in text, part
    assert re.search(r"steer sample --model \S+ --lora lora --lora-scale 0\.7 --reward", text)


def test_the_cards_three_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = adapt(steer.load("emoji"), rank=2, targets=["head"])
    save_adapters(tuned, "tuned", {"reward": "brightness", "prompts": ["fox"], "scale": 0.5})
    text = write_card("tuned").read_text()
    values = yaml.safe_load(text.split("---")[1])
    assert (values["base_model"], values["base_model_relation"]) == ("emoji", "adapter")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(block.splitlines()) == 3
    exec(block, {})
    assert "grid.png" in names(tmp_path / "pictures")


def test_a_card_of_nothing_and_of_odd_things():
    text = card({})
    assert "does not say how it was made" in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    odd = card({"base": "a: b\n---", "scale": 0, "reward": "x|<b>", "licence": "mit"})
    values = yaml.safe_load(odd.split("---\n")[1])
    assert values["license"] == "mit"
    assert "base_model" not in values
    assert "Recommended scale: 0, which is the base" in odd
    assert "x\\|\\<b\\>" in odd
    merged = card({"base": "org/model"}, form="merged", where="here")
    assert yaml.safe_load(merged.split("---")[1])["base_model_relation"] == "merge"
    diffusers = card({"base": "org/model"}, form="diffusers", repository="me/it")
    assert 'pipe.load_lora_weights("me/it"' in diffusers
