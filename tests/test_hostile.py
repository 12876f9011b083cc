"""Mutated files and requests, seeded: no code of theirs runs, nothing hangs, no traceback, and
nothing is touched outside the folder they are in.

A few of each kind in the quick suite, hundreds more in the slow one. A failure names its seed.
"""

import io
import json
import random
import signal
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import pytest
import torch
import yaml
from PIL import Image

import recipes.cli
import rewards
from recipes.arguments import CONFIGS
from recipes.cli import main
from recipes.faults import explained
from recipes.inputs import read_picture, read_prompts
from rewards.loading import load_plain
from rewards.pixels.colour import Colour
from rewards.serving.application import app
from rewards.serving.protocol import pack, unpack
from rewards.serving.remote import Remote

BOUND = 5.0
"""The seconds that one case may take on a busy machine."""

QUICK, MANY = 4, 60
"""Seeds of each kind: in the quick suite, and in all."""

seeds = pytest.mark.parametrize(
    "seed",
    [*range(QUICK), *(pytest.param(i, marks=pytest.mark.slow) for i in range(QUICK, MANY))],
)

CANARY = "canary"
CODE = [
    "subprocess.Popen:args=[touch,canary]",
    "os.system",
    "evil.py:f",
    "./evil.py:f",
    "http://127.0.0.1:9/x",
    "remote:url=http://127.0.0.1:9,wait=0.1",
    "clip:model=evil",
    "classifier:model=evil.py:f,target=0",
    "min(clip, evil_mod.f)",
    "builtins.exec",
]
"""What a stranger would have us run, open or fetch."""

SCALARS = [
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", " ", "null", "a" * 20_000,
    "\x00", "\x1b[2J", "\u202e", "\ud800", "[" * 2000, "{" * 500, "!!python/name:os.system", "~",
    "../../etc/passwd", "/etc/passwd", "-", "--", "*", "%", "{}", "1:1:1", "2001-99-99", "0x",
]  # fmt: skip
"""Values that nothing expects."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in, beside one that nothing may touch, with code that would leave a mark."""
    (tmp_path / "work").mkdir()
    for name in ("evil.py", "evil_mod.py"):
        (tmp_path / "work" / name).write_text(
            "import pathlib\npathlib.Path('canary').touch()\ndef f(images): return images\n"
        )
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    before = everything(tmp_path)
    yield tmp_path / "work"
    assert not [path for path in everything(tmp_path) - before if "work" not in path.parts]
    assert not list(tmp_path.rglob(CANARY))
    sys.modules.pop("evil_mod", None)


def everything(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


@contextmanager
def bounded(case):
    """Fail where the block takes longer than the bound."""

    def late(*_):
        raise AssertionError(f"hangs: {case!r:.500}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 4 * BOUND)
    begun = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < BOUND, f"slow: {case!r:.500}"


def tried(function, *args):
    """Call it: True where it took the case, False where it refused it with a message."""
    failed = None
    with bounded(args):
        try:
            function(*args)
        except (Exception, SystemExit) as error:
            failed = error
    if failed is None:
        return True
    refused = isinstance(failed, ValueError | OSError | RecursionError)
    said = explained(failed) if refused else None
    assert said, f"{type(failed).__name__}: {failed!s:.500} for {args!r:.500}"
    assert len(said) < 3000
    return False


# ------------------------------------------------------------------ mutations


PIECES = [b"\x00", b"\xff" * 8, b"\r\n", b"{", b'"', b"\xef\xbb\xbf", b"&a [*a]", b"9" * 400]


def bytes_like(data, rng):
    """Flip, cut, double and insert some bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(max(1, len(out)))
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + rng.choice([1, 4, 100])]
        elif kind == 2:
            out[at:at] = out[at : at + rng.choice([1, 8, 200])]
        elif kind == 3:
            out[at:at] = rng.choice(
                [
                    b"\x00",
                    b"\xff" * 8,
                    b"\r\n",
                    b"{",
                    b'"',
                    b"\xef\xbb\xbf",
                    b"&a [*a]",
                    b"9" * 400,
                ]
            )
        else:
            del out[at:]
            out = out or bytearray(b"x")
    return bytes(out)


def value(rng, depth=0):
    """Draw a value of any kind."""
    if depth < 3 and rng.random() < 0.25:
        count = rng.choice([0, 1, 3, 40])
        if rng.random() < 0.5:
            return [value(rng, depth + 1) for _ in range(count)]
        names = ["class_path", "init_args", "reward", "__metadata__", "id", "x"]
        return {rng.choice(names): value(rng, depth + 1) for _ in range(count)}
    return rng.choice([*SCALARS, *CODE, {"class_path": "subprocess.Popen",
                       "init_args": {"args": ["touch", "canary"]}}])  # fmt: skip


def mapping(known, rng):
    """Change some values of a mapping, drop some, add some."""
    out = dict(known)
    for _ in range(rng.choice([1, 1, 2, 4])):
        name = rng.choice([*out, "strange", "config", "", "a.b", "reward"])
        if rng.random() < 0.15:
            out.pop(name, None)
        else:
            out[name] = value(rng)
    return out


BOMB = "[&a [x, x, x, x, x, x, x, x]" + "".join(
    f", &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]" for i in range(12)
) + "]"  # fmt: skip
TAGS = [
    "!!python/object/apply:os.system ['touch canary']",
    "!!python/object/new:subprocess.Popen [['touch', 'canary']]",
    "!!python/module:evil_mod",
    "&a [*a]",
    "&a {x: *a}",
    BOMB,
    "[&a {x: y}, {<<: *a}]",
    "[" * 3000,
    "9" * 5000,
    "2001-99-99",
    "!!float x",
    "!!binary '%'",
    "? {a: b} : c",
]


def config(rng):
    """Draw a text of settings: a command's own, mutated."""
    file = rng.choice(sorted(CONFIGS.glob("*.yaml")))
    known = yaml.safe_load(file.read_text())
    kind = rng.randrange(5)
    if kind == 0:
        text = bytes_like(file.read_bytes(), rng)
    elif kind == 1:
        text = f"{rng.choice(list(known))}: {rng.choice(TAGS)}\n".encode()
    elif kind == 2:
        text = rng.choice(["{" * 4000, "- " * 4000, "", "a", "\x00", "a: b: c"]).encode()
    else:
        changed = mapping(known, rng)
        text = yaml.safe_dump(json.loads(json.dumps(changed, default=str))).encode()
    command = file.name.split("_")[0].removesuffix(".yaml")
    return {"demo": "sample", "brute": "compare"}.get(command, command), text


# ------------------------------------------------------------------ the sweep


@seeds
def test_configs(seed, here, monkeypatch):
    """A command that is refused, or called with what its function's signature says."""
    rng = random.Random(f"config {seed}")
    called = []
    monkeypatch.setattr(
        recipes.cli, "function_of", lambda command: lambda **settings: called.append(settings)
    )
    for i in range(4):
        command, text = config(rng)
        (here / "c.yaml").write_bytes(text)
        out, err = io.StringIO(), io.StringIO()
        with bounded((seed, i, text)), redirect_stdout(out), redirect_stderr(err):
            code = main([command, "--config", "c.yaml"])
        assert code in {0, 2}, (seed, i, text)
        assert "Traceback" not in err.getvalue()
        assert (code == 2) == ("error: " in err.getvalue()), (err.getvalue(), text)
        assert len(called) == 0 or not any(isinstance(v, type) for v in called[-1].values())


@seeds
def test_texts_of_rewards(seed, here):
    """Of the user: refused where they are no rewards. From a file: nothing of a stranger's."""
    rng = random.Random(f"text {seed}")
    good = [
        "brightness",
        "0.5*colour:name=red - jpeg:quality=80",
        "min(brightness, 2*contrast)",
        "capped(brightness, at=0.3)",
        "product(brightness, jpeg, at=[0.1, 1], width=2)",
    ]
    for _ in range(6):
        text = rng.choice(good)
        if rng.random() < 0.7:
            text = bytes_like(text.encode(), rng).decode("utf-8", "surrogateescape")
        else:
            extra = value(rng)
            text = f"{text} + brightness:by={extra}" if rng.random() < 0.3 else f"{extra}"
        tried(load_plain, text)
        if not any(name in text for name in ("evil", "http", "clip", "classifier")):
            tried(rewards.load, text)


@seeds
def test_metadata_of_adapters(seed, here):
    """`eval --lora DIR`: refused, and nothing that the file names is imported, run or fetched."""
    import safetensors.torch

    rng = random.Random(f"metadata {seed}")
    folder = here / "lora"
    folder.mkdir()
    notes = {"reward": "brightness", "base": "emoji", "base_sha256": "0", "scale": "1"}
    changed = mapping(notes, rng) | {"reward": rng.choice([*CODE, value(rng), value(rng)])}
    texts = {
        str(k): v if isinstance(v, str) else json.dumps(v, default=str) for k, v in changed.items()
    }
    clean = {
        k.encode("utf-8", "replace").decode(): v.encode("utf-8", "replace").decode()
        for k, v in texts.items()
    }
    data = safetensors.torch.save({"a": torch.zeros(1)}, clean)
    if rng.random() < 0.3:
        data = bytes_like(data, rng)
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    before = everything(here)
    err = io.StringIO()
    with bounded((seed, data)), redirect_stderr(err), redirect_stdout(io.StringIO()):
        # the judge is none, so that the command ends before it draws
        code = main(["eval", "--lora", "lora", "--judge", "no.such", "--best", "false"])
    assert code == 2, (seed, clean)
    assert "Traceback" not in err.getvalue()
    assert "\x1b" not in err.getvalue()
    assert everything(here) == before


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Adapters as they are saved, for the model that comes along."""
    import steer
    from steer.adapters.inject import adapt
    from steer.adapters.store import save_adapters

    folder = tmp_path_factory.mktemp("adapted")
    save_adapters(adapt(steer.load("emoji"), rank=1), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@seeds
def test_folders_of_adapters(seed, here, adapted):
    """Another configuration, header or tensors: refused, or taken within bounds."""
    import steer
    from steer.adapters.store import load_adapters

    rng = random.Random(f"adapters {seed}")
    (here / "lora").mkdir()
    for name, data in adapted.items():
        if name == "adapter_config.json" and rng.random() < 0.7:
            data = json.dumps(mapping(json.loads(data), rng), default=str).encode()
        elif rng.random() < 0.4:
            data = bytes_like(data, rng)
        (here / "lora" / name).write_bytes(data)
    flow = steer.load("emoji")
    before = [p.clone() for p in flow.parameters()]

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_adapters(flow, here / "lora")

    tried(load)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model as it is saved."""
    from steer.models.loading import save
    from steer.models.two_time import NetworkFlow, TwoTimeUNet

    folder = tmp_path_factory.mktemp("saved")
    save(NetworkFlow(TwoTimeUNet(["a"], (8, 8), (1, 1), size=8, width=8, groups=4)), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


NUMBERS = [0, -1, 1, 2, 3, 7, 1000, 4096, 10**6, 10**9, 10**30, 0.5, 1e308, True, None]


def network(known, rng):
    """Change the numbers that a network is made of, in their own places."""
    out = json.loads(json.dumps(known))
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([name for name in out if name not in {"format", "vocabulary"}])
        if isinstance(out[name], list) and rng.random() < 0.7:
            out[name][rng.randrange(len(out[name]))] = rng.choice(NUMBERS)
        else:
            many = [rng.choice(NUMBERS)] * rng.choice([1, 2, 40, 100_000])
            out[name] = rng.choice([rng.choice(NUMBERS), many])
    return out


@seeds
def test_folders_of_models(seed, here, saved):
    """Another configuration, header or tensors: refused, or a model that draws."""
    import resource

    import steer

    rng = random.Random(f"models {seed}")
    (here / "model").mkdir()
    for _ in range(4):
        for name, data in saved.items():
            kind = rng.random()
            if name == "config.json" and kind < 0.9:
                known = json.loads(data)
                changed = network(known, rng) if kind < 0.6 else mapping(known, rng)
                data = json.dumps(changed, default=str).encode()
            elif kind < 0.4:
                data = bytes_like(data, rng)
            (here / "model" / name).write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if tried(steer.load, here / "model"):
            flow = steer.load(here / "model")
            assert all(not p.is_meta for p in flow.parameters())
            if max(flow.event_shape) <= 64:
                with torch.no_grad():
                    assert flow.jump(torch.zeros(1, *flow.event_shape), 0.0, 1.0).shape[0] == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@seeds
def test_files_of_prompts(seed, here):
    rng = random.Random(f"prompts {seed}")
    lines = [{"prompt": "a cat", "reward_prompt": "a"}, {"text": "ü", "tag": [1]}]
    for _ in range(6):
        if rng.random() < 0.5:
            data = "\n".join(json.dumps(line) for line in lines).encode()
            if rng.random() < 0.5:
                rows = [mapping(line, rng) for line in lines]
                data = "\n".join(json.dumps(row, default=str) for row in rows).encode()
            name = "p.jsonl"
        else:
            data, name = "a cat\na blue apple, ünder\n\n".encode(), "p.txt"
        data = bytes_like(data, rng) if rng.random() < 0.8 else data
        if rng.random() < 0.05:
            data = b"[" * 100_000
        (here / name).write_bytes(data)
        if tried(read_prompts, here / name):
            asked = read_prompts(here / name)
            for text in (*asked.prompts, *asked.questions):
                assert text.isprintable() or not any(c in text for c in "\n\r\x1b\x00\u202e")


@seeds
def test_pictures(seed, here):
    rng = random.Random(f"pictures {seed}")
    kind = rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    mode = rng.choice(["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"])
    if mode in {"CMYK", "I;16", "P", "1", "RGBA"} and kind in {"JPEG", "WEBP", "BMP", "GIF"}:
        mode = "RGB"
    if mode == "CMYK":
        kind = "TIFF"
    file = io.BytesIO()
    Image.new(mode, (40, 30)).save(file, kind)
    for _ in range(4):
        data = bytes_like(file.getvalue(), rng)
        if kind == "PNG" and rng.random() < 0.2:  # 10^9 pixels are promised
            data = data[:16] + (40_000).to_bytes(4, "big") * 2 + data[24:]
        (here / f"p.{kind.lower()}").write_bytes(data)
        if tried(read_picture, here / f"p.{kind.lower()}", (8, 8), "--init-image"):
            picture = read_picture(here / f"p.{kind.lower()}", (8, 8), "--init-image")
            assert picture.shape == (3, 8, 8)
            assert bool(((picture >= 0) & (picture <= 1)).all())


@pytest.fixture(scope="module")
def url():
    from tests.test_serving import running

    with running(app(Colour("red"), max_rows=4, max_side=64, max_bytes=100_000)) as found:
        yield found


@seeds
def test_bodies_of_requests(seed, url):
    """Whatever comes is answered, and the next one is scored."""
    import httpx2

    rng = random.Random(f"body {seed}")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    asked = {"id": "a", "prompts": ["a", "b"], "metadata": None, "gradient": True}
    for _ in range(8):
        request = json.dumps(mapping(asked, rng), default=str)
        if rng.random() < 0.2:
            request = rng.choice(["[" * 50_000, "9" * 10_000, "null", "", "{}", '{"id": []}'])
        wrong = [
            images.half(), images[0], images[:0], images / 0, images - 1e30, images.long(),
            torch.zeros(2, 3, 65, 8), torch.zeros(9, 3, 8, 8), torch.zeros(2, 3, 0, 8),
        ]  # fmt: skip
        sent = rng.choice([images, rng.choice(wrong)])
        body = pack({"images": sent}, {"request": request.encode("utf-8", "replace").decode()})
        body = bytes_like(body, rng) if rng.random() < 0.5 else body
        with bounded((seed, body)):
            answer = httpx2.post(f"{url}/score", content=body, timeout=BOUND)
        assert answer.status_code in {200, 400, 413, 422, 500}, answer.text
        if answer.status_code == 500:  # only what is not finite scores to what is not
            assert "is not finite" in answer.text, (answer.text, seed)
        if answer.status_code == 200:
            assert torch.isfinite(unpack(answer.content)[0]["scores"]).all()
        else:
            assert json.loads(answer.text)["error"]
    assert torch.equal(Remote(url, wait=BOUND)(images), Colour("red")(images))


@seeds
def test_requests_that_are_no_http(seed, url):
    import socket

    from tests.test_serving import address

    rng = random.Random(f"http {seed}")
    good = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"
    for _ in range(8):
        data = bytes_like(good, rng) + b"\r\n\r\n"
        with bounded((seed, data)), socket.create_connection(address(url), 2) as one:
            one.settimeout(0.2)
            with suppress(OSError):
                one.sendall(data)
                got = one.recv(1000)
                assert not got or got.startswith(b"HTTP/1.1 "), got
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(Remote(url, wait=BOUND)(images), Colour("red")(images))


@seeds
def test_answers_of_servers(seed):
    """A client of a hostile server: an error that says so, or finite scores of the right shape."""
    from tests.test_serving import answering, head_of

    rng = random.Random(f"answer {seed}")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    about = {"protocol": 1, "name": "n", "differentiable": True, "max_rows": 4, "max_bytes": 10**6}
    first = json.dumps(mapping(about, rng), default=str).encode("utf-8", "replace")
    first = first if rng.random() < 0.3 else json.dumps(about).encode()
    score = pack({"scores": torch.zeros(2), "gradient": images}, {"id": "a"})
    second = rng.choice([bytes_like(score, rng), b"", b"{}", score, b"\xff" * 100])
    status = rng.choice([200, 200, 200, 400, 401, 404, 500, 302, 204, 206])

    def respond(connection, ended):
        head = head_of(connection)
        body = first if head.startswith(b"GET") else second
        code = 200 if head.startswith(b"GET") else status
        reply = f"HTTP/1.1 {code} x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        reply = reply.encode() + body
        connection.sendall(reply if rng.random() < 0.8 else bytes_like(reply, rng))
        connection.shutdown(socket_write)

    import socket

    socket_write = socket.SHUT_WR

    def ask(place):
        scores = Remote(place, wait=0.5)(images)
        assert scores.shape == (2,)
        assert torch.isfinite(scores).all()

    with answering(respond) as place:
        tried(ask, place)
