"""What a file names is not run; what a dotted path gives is looked at; tokens stay hidden."""

import io
import json
import os
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import rewards
from recipes.cli import main
from rewards.loading import load_plain
from rewards.trust import LONGEST
from steer.reward import Reward
from steer.secrets import HIDDEN, redacted

MODULE = """
import functools, pathlib, torch, steer

def touch(*args, **kwargs):
    pathlib.Path("canary").touch()

class Popen:
    def __init__(self, args=None):
        touch()
    def __call__(self, anything):
        touch()

class Mean(steer.Reward):
    def __init__(self, by: float = 1.0):
        super().__init__()
        self.by = by
    def forward(self, images, prompts=None, metadata=None):
        return self.by * images.mean((1, 2, 3))

class Net(torch.nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3))

class Scorer:
    def score(self, pixels, prompts=None):
        return pixels.mean((1, 2, 3))

def mean(images, prompts=None):
    return images.mean((1, 2, 3))

def remove(path, images=None):
    touch()

@functools.wraps(mean)
def wrapped(*args):
    return mean(*args)

ready, net, scorer, made = Mean(2.0), Net(), Scorer(), Popen.__new__(Popen)
lazy = lambda name: touch()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "strange_mod.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("strange_mod", None)


# ------------------------------------------------------------------ dotted paths


@pytest.mark.parametrize(
    "text",
    [
        "subprocess.Popen:args=[touch,canary]",
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.print",
        "shutil.rmtree",
        "os.remove",
        "runpy.run_path",
        "torch.load",
        "torch.hub.load",
        "pathlib.Path:args=canary",
        "torch.nn.Linear:in_features=3,out_features=1",
        "strange_mod.Popen",
        "strange_mod.Popen:args=1",
        "strange_mod.made",
        "strange_mod.touch",
        "strange_mod.remove",
        "strange_mod.lazy",
        "strange_mod.torch",
        "0.5*clip + min(brightness, strange_mod.Popen)",
    ],
)
def test_what_takes_no_images_is_refused_and_not_called(text, here):
    with pytest.raises(ValueError, match=r"is not a reward but a .* so it was not called"):
        rewards.load(text)
    assert not (here / "canary").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("strange_mod.Mean:by=3", 3.0),
        ("strange_mod.ready", 2.0),
        ("strange_mod.Net", 1.0),
        ("strange_mod.net", 1.0),
        ("strange_mod.Scorer", 1.0),
        ("strange_mod.scorer", 1.0),
        ("strange_mod.mean", 1.0),
        ("strange_mod.wrapped", 1.0),
    ],
)
def test_what_takes_images_is_a_reward(text, value, here):
    reward = rewards.load(text)
    assert isinstance(reward, Reward)
    assert float(reward(torch.ones(1, 3, 4, 4))) == value


def test_metrics_by_their_dotted_path():
    assert rewards.load("torchmetrics.image.TotalVariation").takes[0] == "images"


# ------------------------------------------------------------------ texts from files


@pytest.mark.parametrize(
    "text",
    [
        "clip",
        " Brightness ".lower(),
        "0.7*clip - 0.3*colour:name=red",
        "capped(min(clip, 2*brightness), at=0.3)",
        "product(brightness, jpeg:quality=80, at=[0.1, 0.2], width=[1, 2])",
        "normalised(clip) + augmented(brightness, views=2, flip=true)",
    ],
)
def test_plain_texts_are_made(text):
    assert isinstance(load_plain(text), Reward)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("strange_mod.Mean", "'strange_mod.Mean' is not a reward of the package"),
        ("strange_mod.py:mean", "not a reward of the package"),
        ("subprocess.Popen:args=[touch,canary]", "not a reward of the package"),
        ("http://127.0.0.1:9", "'http' is not a reward of the package"),
        ("remote:url=http://127.0.0.1:9", "'remote' is not a reward of the package"),
        ("min(clip, strange_mod.py:mean)", "not a reward of the package"),
        ("2*(brightness + strange_mod.mean)", "not a reward of the package"),
        ("clip:model=hf-hub:some/one", "option 'model' may name"),
        ("clip:model=ViT-B-32,pretrained=x.pt", "option 'model' may name"),
        ("classifier:model=strange_mod.py:Net", "option 'model' may name"),
        ("aesthetic:head=x.pth", "option 'head' may name"),
        ("similarity:image=x.png", "option 'image' may name"),
        ("layout:mask=/etc/passwd", "option 'mask' may name"),
        ("colour:name=../x", "option 'name' may name"),
        ("colour:name=strange_mod.py", "option 'name' may name"),
        ("capped(clip, at=[[1]])", "option 'at' may name"),
        ("batched(clip, size=2, url=http)", "cannot read 'url=http'"),
        ("+".join(["clip"] * LONGEST), f"more than the limit of {LONGEST}"),
        ("", "cannot read"),
    ],
)
def test_other_texts_are_refused(text, words, here):
    with pytest.raises(ValueError, match=words):
        load_plain(text)
    assert not (here / "canary").exists()


FETCHED = [
    "siglip", "pickscore", "hpsv2", "hpsv2:version=2.0", "imagereward", "aesthetic", "vqa",
    "classifier", "0.5*brightness + min(clip, pickscore)",
]  # fmt: skip
"""Rewards that come along without their weights."""


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """None of the published weights are here, and whatever asks for them is noted."""
    import huggingface_hub
    import huggingface_hub.constants

    monkeypatch.setenv("FLOWSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    asked = []

    def note(*where, **options):
        asked.append((where, options))
        raise OSError("no network")

    class Closed(socket.socket):
        connect = connect_ex = note

    monkeypatch.setattr(torch.hub, "download_url_to_file", note)
    monkeypatch.setattr(socket, "socket", Closed)
    monkeypatch.setattr(socket, "getaddrinfo", note)
    return asked


@pytest.mark.parametrize("text", FETCHED)
def test_a_text_from_a_file_downloads_nothing(text, no_weights):
    with pytest.raises(ValueError, match=r"the weights of '\w+', .*, are not on this machine"):
        load_plain(text)
    assert not no_weights


def test_every_reward_is_made_of_what_is_here_or_refused(no_weights):
    made = []
    for name in rewards.NAMES:
        try:
            load_plain(name)
            made.append(name)
        except (ValueError, FileNotFoundError):
            pass
        assert not no_weights, name
    assert {"clip", "brightness", "jpeg"} <= {*made}


def test_the_same_text_of_a_users_is_looked_for(no_weights):
    for text in ("hpsv2", "classifier", "aesthetic"):
        with pytest.raises(ValueError, match="cannot be"):
            rewards.load(text)
        assert no_weights, text
        no_weights.clear()


def test_weights_that_are_here_are_taken(no_weights, tmp_path):
    """A reward that a file names, of weights in the folder for those downloaded by hand."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path / "home" / "timm" / "resnet18.a1_in1k"
    folder.mkdir(parents=True)
    save_file(timm.create_model("resnet18").state_dict(), folder / "model.safetensors")
    scores = load_plain("classifier:target=3")(torch.rand(1, 3, 32, 32))
    assert scores.shape == (1,)
    assert not no_weights


def test_a_config_says_what_it_brings_in(here, capsys):
    (here / "own.yaml").write_text(
        "reward: strange_mod.Popen:args=1\njudge: brightness\nmodel: nowhere.py:Flow\n"
        "prompts: [see http://x.y/z, a.b.c]\nheld_out: ['remote:url=http://127.0.0.1:9,token=tiger']\n"
    )
    assert main(["finetune", "--config", "own.yaml"]) == 2
    err = capsys.readouterr().err
    assert "config: own.yaml loads reward: 'strange_mod.Popen:args=1'" in err
    assert "loads model: 'nowhere.py:Flow'" in err
    assert f"loads held_out: 'remote:url=http://127.0.0.1:9,token={HIDDEN}'" in err
    assert err.count(".yaml loads ") == 3
    assert "tiger" not in err
    assert not (here / "canary").exists()
    (here / "more.yaml").write_text("methods: [none, 'own.py:Method:steps=2']\nmodel: emoji\n")
    assert main(["compare", "--config", "more.yaml"]) == 2
    assert "loads methods: 'own.py:Method:steps=2'" in capsys.readouterr().err
    (here / "ours.yaml").write_text("reward: 0.7*brightness + capped(colour:name=red, at=0.5)\n")
    main(["sample", "--config", "ours.yaml", "--steps", "0"])
    assert ".yaml loads " not in capsys.readouterr().err


# ------------------------------------------------------------------ secrets


@pytest.mark.parametrize(
    "text",
    [
        "remote:url=http://h:1,token=tiger",
        "0.5*remote:url=http://h:1,token=ti+tiger==,batch=2 + clip",
        "min(remote:url=http://h:1,token=tiger), clip)",
        "remote:token='a tiger, b',url=http://h:1",
        "remote:url=http://me:tiger@h:1/path",
        "http://me:ti/tiger@h:1",
        "https://h:1/?api_key=tiger",
        "cannot take {'url': 'http://h', 'token': 'tiger'}",
        'made of {"password": "tiger"}',
        "Authorization: Bearer tiger",
        "remote:PASSWORD = tiger",
        "remote:url=http://h,token=ti(tiger)x",
    ],
)
def test_secrets_are_hidden(text):
    shown = redacted(text)
    assert "tiger" not in shown
    assert HIDDEN in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "0.7*clip + capped(colour:name=red, at=0.5)",
        "the token is missing or wrong",
        "set the environment variable FLOWSTEER_REWARD_TOKEN to it",
        "monkey=3, key=3, a secret garden",
        "http://127.0.0.1:8000/score, me@example.com",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_messages_of_load_have_no_secrets():
    for text in (
        "remote:url=http://h:1,token=tiger,batch=0",
        "remote:url=http://h:1,token=tiger,nothing=1",
        "remote:url=http://me:tiger@h:1",
        "remote:url=h,token=tiger",
        "0.5*remotee:url=http://h:1,token=ti+tiger",
        "nomodule.f:token=tiger",
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            rewards.load(text)
        seen, error = [], caught.value
        while error is not None:
            seen.append(str(error))
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        assert "tiger" not in "".join(seen), seen


def test_adapters_that_name_code_or_servers_bring_in_nothing(here, capsys):
    """`steer eval --lora DIR` without --reward: the text is shown, and nothing else is done."""
    import steer
    from steer.adapters.inject import adapt
    from steer.adapters.store import save_adapters

    tuned = adapt(steer.load("emoji"), rank=1)
    for i, text in enumerate(
        ["subprocess.Popen:args=[touch,canary]", "lora0/evil.py:f", "http://127.0.0.1:9", 3,
         {"a": ["b"]}, "clip" * 1000, "(" * 400 + "clip" + ")" * 400, "clip\x1b[2J:model=x"]
    ):  # fmt: skip
        save_adapters(tuned, here / f"lora{i}", {"reward": text})
        (here / f"lora{i}" / "evil.py").write_text("open('canary', 'w')\ndef f(x): return x")
        before = sorted(os.listdir(here))
        assert main(["eval", "--lora", f"lora{i}", "--best", "false"]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in err
        assert "\x1b" not in err
        assert len(err) < 1000
        assert f"tuned for {repr(text)[:20]}" in err
        assert "not imported, run or downloaded; if you want it, give --reward" in err
        assert sorted(os.listdir(here)) == before


def test_adapters_that_name_a_download_ask_for_the_reward(here, capsys, no_weights):
    import steer
    from steer.adapters.inject import adapt
    from steer.adapters.store import save_adapters

    save_adapters(adapt(steer.load("emoji"), rank=1), here / "lora", {"reward": "2*hpsv2"})
    assert main(["eval", "--lora", "lora", "--best", "false"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "tuned for '2*hpsv2', and the weights of 'hpsv2', xswu/HPSv2, are not on this" in err
    assert (
        "names in a file are not imported, run or downloaded; if you want it, give --reward" in err
    )
    assert not no_weights


def test_a_token_in_a_rewards_text_is_in_no_file_of_a_sample(tmp_path, monkeypatch, capsys):
    from rewards.pixels.colour import Colour
    from rewards.serving.application import app
    from tests.test_serving import running

    monkeypatch.chdir(tmp_path)
    with running(app(Colour("red"), token="ti+ger==")) as url:
        text = f"0.5*remote:url={url},token=ti+ger==,wait=9 + brightness"
        few = ["--particles", "2", "--steps", "1", "--prompt", "fox", "--method", "best-of-n"]
        assert main(["sample", "--reward", text, *few, "--out", "s"]) == 0
        assert main(["sample", "--reward", f"{text}x", *few, "--out", "w"]) == 2
    said = capsys.readouterr()
    assert "ger==" not in said.out + said.err
    assert f"token={HIDDEN}" in (tmp_path / "s/config.yaml").read_text()
    assert not any(b"ger==" in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


@pytest.mark.slow
def test_a_token_in_a_rewards_text_is_in_nothing_that_a_run_writes_or_says(tmp_path, monkeypatch):
    """All commands that take a reward, against a server that asks for the token."""
    from rewards.pixels.colour import Colour
    from rewards.serving.application import app
    from tests.test_serving import running

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTEER_REWARD_TOKEN", raising=False)
    said = []

    def run(code, *words):
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            assert main(list(words)) == code, err.getvalue()
        said.append(f"{out.getvalue()}\n{err.getvalue()}")

    with running(app(Colour("red"), token="ti+ger==")) as url:
        text = f"0.5*remote:url={url},token=ti+ger==,wait=9 + brightness"
        reward, held = ["--reward", text], ["--held-out", json.dumps([text])]
        draw = ["--particles", "2", "--steps", "1"]
        few = ["--prompts", "[fox, bird]"]
        run(0, "check-reward", text, "--size", "8", "--json")
        run(0, "sample", *reward, *draw, "--prompt", "fox", "--method", "best-of-n", "--out", "s")
        methods = ["--methods", '["best-of-n:steps=1,particles=2"]', "--judge", text]
        run(0, "compare", *reward, *few, *methods, "--seeds", "2", "--out", "c")
        run(
            0, "finetune", *reward, *held, *few, "--steps", "1", "--batch_size", "8", "--rank",
            "1", "--sweep=[]", "--check_samples", "1", "--out", "t", "--objective", "grpo",
        )  # fmt: skip
        scored = ["--guidance", "[]", "--steps", "[1]", "--particles", "1", "--best", "false"]
        run(0, "eval", "--lora", "t", *reward, *held, *few, *scored, "--out", "e")
        run(2, "eval", "--lora", "t", *few, "--out", "e2")  # the metadata's text asks a server
        run(0, "export", "--lora", "t", "--out", "x")
        run(0, "export", "--lora", "t", "--out", "m", "--format", "merged", "--model", "emoji")
        run(2, "sample", "--reward", text.replace("==", "==x"), "--out", "w")  # another token
        run(2, "sample", "--reward", text.replace("wait=9", "wait=x"), "--out", "w")
        run(2, "sample", "--config", "s/config.yaml", "--out", "w")  # hidden, so it is asked for
        assert "needs a token" in said[-1]
        monkeypatch.setenv("FLOWSTEER_REWARD_TOKEN", "ti+ger==")
        run(0, "sample", "--config", "s/config.yaml", "--out", "again")
    run(2, "sample", *[w.replace("wait=9", "wait=0.2") for w in reward], "--out", "w")  # away
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.yaml", "run.json", "README.md", "readings.jsonl", "adapter_model.safetensors",
            "metrics.json"} <= {file.name for file in files}  # fmt: skip
    for file in files:
        assert b"ger==" not in file.read_bytes(), file
    for text in said:
        assert "ger==" not in text, text
    hidden = f"token={HIDDEN}"
    for name in ("s/config.yaml", "c/config.yaml", "t/run.json", "t/README.md", "x/README.md"):
        assert hidden in (tmp_path / name).read_text(), name
