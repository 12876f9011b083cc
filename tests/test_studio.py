"""The studio without a browser: runs that are watched, places, and who may come in."""

import asyncio
import shlex
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import rewards
import steer
from recipes.arguments import parse
from recipes.studio import session
from recipes.studio.ask import Ask, options_text
from recipes.studio.command import TOKEN
from recipes.studio.command import studio as open_studio
from recipes.studio.fronts import adapters_of, scales_of
from recipes.studio.guard import COOKIE, Guard
from recipes.studio.jobs import start_of
from recipes.studio.loading import Loading
from recipes.studio.looking import looked_at, report_of
from recipes.studio.places import inside, plain_method, plain_reward, runs_in
from recipes.studio.restoring import restored, shown_of
from recipes.studio.session import Studio
from steer.adapters.inject import adapt
from steer.adapters.store import save_adapters

REWARD = "0.7*colour:name=red + 0.3*brightness"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    made = Studio("fashion", tmp_path_factory.mktemp("studio"))
    made.loading.get()
    return made


def ask(**changed):
    told = {
        "prompts": "bag\nboot", "reward": REWARD, "method": "fmrg-j", "particles": 2, "steps": 3,
        "seed": 4, "options": "{scale: 0.2}",
    }  # fmt: skip
    return Ask.of(**(told | changed))


def pictures(folder):
    return [pil_to_tensor(Image.open(f)) for f in sorted((folder / "images").iterdir())]


def test_a_run_is_shown_step_by_step_and_its_command_makes_the_same_pictures(studio, tmp_path):
    seen = list(studio.run("a", ask()))
    assert [kind for kind, _ in seen] == ["unguided", *["step"] * 3, "judged", "done"]
    steps = [value for kind, value in seen if kind == "step"]
    assert [s.step for s in steps] == [1, 2, 3]
    assert all(len(s.images) == len(s.captions) == 4 for s in steps)
    assert steps[0].calls < steps[-1].calls
    judged = next(value for kind, value in seen if kind == "judged")
    assert [calls for calls, *_ in judged] == [s.calls for s in steps]
    place = studio.save("a", "watched")
    command = (place / "command.txt").read_text()
    from recipes.cli import main

    words = shlex.split(command)[1:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert main(words) in (0, None)
    ours, theirs = pictures(place), pictures(tmp_path / "again")
    assert len(ours) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    code = ask().python("fashion")
    told = {}
    exec(code, told)
    assert torch.equal(told["result"].images, seen[-1][1].images)
    assert "watched" in runs_in(studio.root)
    given, read = (
        parse("sample", words[1:]),
        parse("sample", ["--config", str(place / "config.yaml")]),
    )
    assert read.settings["out"] == studio.root / "watched-again"
    assert {**given.settings, "out": read.settings["out"]} == read.settings
    with pytest.raises(FileExistsError):
        studio.save("a", "watched")


def test_a_run_is_stopped_half_way(studio):
    kinds = []
    for kind, value in studio.run("b", ask(steps=32)):
        kinds.append(kind)
        if kind == "step" and value.step == 2:
            studio.job("b").stop()
    assert kinds[-1] == "done"
    assert 3 <= kinds.count("step") < 32
    with pytest.raises(ValueError, match="press Steer to start another"):
        studio.job("b").stop()
    place = studio.save("b", "stopped")
    assert "no command makes these" in (place / "command.txt").read_text()
    assert restored(studio.root, place, "fashion").touched


def test_particles_are_kept_and_the_others_gone(studio):
    last = None
    for kind, value in studio.run("c", ask(steps=12)):
        if kind == "unguided":
            studio.job("c").pause()  # after the first step
        if kind == "paused":
            studio.job("c").go_on([1, 2])  # the second bag, and the first boot
        last = value
    images = last.images
    assert torch.equal(images[0, 0], images[0, 1])
    assert torch.equal(images[1, 0], images[1, 1])
    assert not torch.equal(images[0, 0], images[1, 0])


def test_a_paused_run_waits_and_a_closed_tab_ends_it(studio):
    found, kinds = studio.run("d", ask(steps=32)), []
    for kind, _ in found:
        kinds.append(kind)
        if kind == "unguided":
            studio.job("d").pause()
        if kind == "paused":
            job, made = studio.job("d"), len(studio.job("d").seconds)
            threading.Event().wait(0.3)
            assert len(job.seconds) == made < 32
            studio.end("d")
    assert kinds[-1] == "paused"
    assert job.result is None
    assert list(studio.run("next", ask(steps=1)))[-1][0] == "done"  # the turn was given back
    with pytest.raises(ValueError, match="press Steer first"):
        studio.job("d")


def test_one_picture_is_steered_at_a_time(studio):
    first, second = studio.run("e", ask()), studio.run("f", ask())
    next(first)
    studio.job("e").pause()
    assert next(second)[0] == "waiting"
    studio.end("e")
    list(first)
    assert [kind for kind, _ in second][-1] == "done"


def test_a_page_that_is_closed_while_it_shows_a_value_holds_no_turn(studio):
    shown = studio.in_turn(iter([1, 2]))
    assert next(shown) == 1  # and nobody asks for the next
    assert list(studio.run("after", ask(steps=1)))[-1][0] == "done"
    assert list(shown) == [2]
    ended = studio.begun("g", "compare")
    studio.end("g")
    assert ended.is_set()


def test_the_bill_is_said_before(studio):
    assert "4 pictures x" in studio.cost(ask())
    for changed, words in (
        ({"reward": "blarg"}, "blarg"),
        ({"options": "{scle: 0.2}"}, "scale"),
        ({"options": "scale"}, "write them as"),
        ({"options": "{seed: 3}"}, "seed has a field of its own"),
        ({"prompts": " \n"}, "write a prompt"),
        ({"reward": " "}, "say which reward"),
    ):
        with pytest.raises(ValueError, match=words):
            studio.cost(ask(**changed))


@pytest.mark.parametrize(
    "text",
    ["reward.py:R", "os.path.join", "similarity:image=/etc/passwd", "lpips:image=a.png",
     "remote:url=http://x", "http://x", "~/r.py:R", "clip + ../r.py:R", "good1.py:Good",
     "gü.py:Good", "min(clip, r1.x:R)", "clip:pretrained=w1.pt", "clip:tokenizer=a1.b2",
     "remote", "colour:name=/../x/r2.py:R", "0.5*colour:name=/../x/r2.py:R + clip",
     "min(clip, colour:name=a.py:R)"],
)  # fmt: skip
def test_files_modules_and_servers_are_refused_where_they_were_not_allowed(text):
    with pytest.raises(ValueError, match="--allow-files"):
        plain_reward(text, allow_files=False)
    assert plain_reward(text, allow_files=True) == text


def test_methods_from_files_are_refused_before_their_code_is_run(tmp_path, monkeypatch):
    (tmp_path / "m1.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fmtt:a=").mkdir()  # a folder that the page can make
    for text in (
        "m1.py:Own", f"{tmp_path}/m1.py:Own:steps=2", "m1.Own", "", "fmtt:a=/../m1.py:Own"
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--allow-files"):
            plain_method(text, allow_files=False)
        assert plain_method(text, allow_files=True) == text
    assert plain_method("fmtt:steps=4,strength=3.5", allow_files=False).startswith("fmtt")
    assert not (tmp_path / "ran").exists()


def test_plain_rewards_are_read():
    for text in ("clip", "0.7*clip + 0.3*colour:name=red", "min(clip, 0.5*brightness, smooth=.1)"):
        assert plain_reward(text, allow_files=False) == text
        rewards.load(text)


def test_no_place_is_outside(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("x: 1")
    (root / "link").symlink_to(tmp_path / "out")
    (root / "in" / "config.yaml").write_text("x: 1")
    assert inside(root, "in") == root / "in"
    for name in ("../out", str(tmp_path / "out"), "link", "link/deeper", "", ".", "in/../.."):
        with pytest.raises(ValueError, match=r"not inside|give the folder"):
            inside(root, name)
    assert runs_in(root) == ["in"]


def test_pictures_are_scored_with_a_map_of_the_gradient(tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(file)
    (name, value, _, heat) = looked_at(rewards.load("colour:name=red"), [str(file)], "")[0]
    assert name == "red.png"
    assert value == pytest.approx(0.0, abs=0.1)
    assert heat.size == (32, 32)
    assert looked_at(rewards.load("jpeg"), [str(file)], "")[0][3] is None
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"bad\.png is no picture"):
        looked_at(rewards.load("brightness"), [str(tmp_path / "bad.png")], "")
    assert "| ok |" in report_of(rewards.load("brightness"))


def answer(guard, **headers):
    """The status of a request, and the headers of its answer."""
    sent = []

    async def send(message):
        sent.append(message)

    query = headers.pop("query", "")
    scope = {
        "type": "http", "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    asyncio.run(guard(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


async def page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_who_may_come_in():
    ours = Guard(page, "127.0.0.1")
    status, headers = answer(ours, host="127.0.0.1:7860")
    assert status == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert answer(ours, host="localhost:7860")[0] == 200
    assert answer(ours, host="evil.com")[0] == 403
    assert answer(ours, host="127.0.0.1.evil.com")[0] == 403
    assert answer(ours, host="127.0.0.1:7860", origin="http://evil.com")[0] == 403
    assert answer(ours, host="127.0.0.1:7860", origin="http://127.0.0.1:7860")[0] == 200
    assert answer(ours, host="127.0.0.1:7860", sec_fetch_site="cross-site")[0] == 403
    theirs = Guard(page, "10.0.0.5", "secret")
    assert answer(theirs, host="10.0.0.5:7860")[0] == 401
    assert answer(theirs, host="10.0.0.5:7860", query="token=wrong")[0] == 401
    status, headers = answer(theirs, host="10.0.0.5:7860", query="token=secret")
    assert status == 200
    assert b"HttpOnly" in headers[b"set-cookie"]
    assert answer(theirs, host="10.0.0.5:7860", cookie=f"{COOKIE}=secret")[0] == 200
    mine = {"cookie": f"{COOKIE}=secret"}
    assert answer(theirs, host="evil.com")[0] == 401  # a name that resolves here has no cookie
    for address in ("0.0.0.0", "::", "10.0.0.5"):
        theirs = Guard(page, address, "secret")
        assert (
            answer(theirs, host="Studio.lan:7860", origin="http://Studio.lan:7860", **mine)[0]
            == 200
        )
        behind = {"host": "127.0.0.1:7860", "origin": "https://studio.org", **mine}
        assert answer(theirs, **behind)[0] == 403
        assert answer(theirs, x_forwarded_host="studio.org", **behind)[0] == 200
        assert answer(theirs, x_forwarded_host="evil.com", **behind)[0] == 403
    assert answer(ours, host="evil.com", x_forwarded_host="127.0.0.1:7860")[0] == 403


def test_a_request_that_cannot_be_read_is_refused():
    for guard in (Guard(page, "127.0.0.1"), Guard(page, "0.0.0.0", "secret")):
        assert answer(guard, host="[")[0] == 400
        assert (
            answer(guard, host="127.0.0.1", origin="http://[", cookie=f"{COOKIE}=secret")[0] == 403
        )
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "query_string": b"token=\xff", "headers": [(b"host", b"a")]}
    asyncio.run(Guard(page, "0.0.0.0", "secret")(scope, None, send))
    assert sent[0]["status"] == 401


def test_a_token_of_the_environment_is_needed_on_this_machine_too(tmp_path, monkeypatch):
    import uvicorn

    seen = []
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")  # gradio sets them

    class Server:
        started = True

        def __init__(self, config):
            self.app = config.app

        def run(self):
            seen.append(self.app.token)

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setenv(TOKEN, "secret")
    open_studio("fashion", tmp_path)
    monkeypatch.delenv(TOKEN)
    open_studio("fashion", tmp_path)
    assert seen == ["secret", None]


def test_every_method_but_none_can_be_chosen(studio):
    for name in steer.METHODS:
        if name != "none":
            more = "{temperature: 0.1}" if name in ("renoise", "split") else ""
            assert "network calls" in studio.cost(ask(method=name, options=more))


def test_what_the_studio_saved_is_read_back_as_it_was_asked(studio):
    asked = ask(options="{scale: 0.2, target: 5.0, window: [0.0, 0.5]}", steps=2)
    list(studio.run("r", asked))
    place = studio.save("r", "read-back")
    found = restored(studio.root, place, "fashion")
    assert found.ask == asked
    assert not found.lost
    assert "Steer makes these pictures again" in found.note
    shown = options_text(found.ask.options)
    assert shown == "{scale: 0.2, target: 5.0, window: [0.0, 0.5]}"
    assert ask(options=shown, steps=2) == asked
    assert len(shown_of(studio.root, place)) == 4
    with pytest.raises(ValueError, match="start `steer studio --model fashion`"):
        restored(studio.root, place, "emoji")


CONFIG = """model: fashion
reward: brightness
prompt: [bag, boot]
method: fmrg-j
steps: 3
scale: 0.2
options: {brake: 0.9}
init_by: noise
on_bad_reward: stop
out: x
"""


def test_a_run_of_steer_sample_is_read_back(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    (place / "config.yaml").write_text(CONFIG)
    found = restored(tmp_path, place, "fashion")
    assert found.ask == Ask(
        ("bag", "boot"), "brightness", "fmrg-j", 4, 3, 0, {"scale": 0.2, "brake": 0.9}
    )
    (place / "config.yaml").write_text(CONFIG + "cfg: 3.0\n")
    assert restored(tmp_path, place, "fashion").lost == {"cfg": 3.0}
    assert "cfg: 3.0" in restored(tmp_path, place, "fashion").note
    lines = CONFIG.replace("prompt: [bag, boot]", "prompts_file: /etc/passwd")
    (place / "config.yaml").write_text(lines)
    with pytest.raises(ValueError, match=r"no scores\.jsonl"):
        restored(tmp_path, place, "fashion")  # the file itself is outside, and is not read
    (place / "scores.jsonl").write_text(
        '{"prompt": "bag", "reward_prompt": "bag", "particle": 0}\n'
        '{"prompt": "bag", "reward_prompt": "bag", "particle": 1}\n'
        '{"prompt": "boot", "reward_prompt": "boot", "particle": 0}\n'
    )
    assert restored(tmp_path, place, "fashion").ask.prompts == ("bag", "boot")
    for text in ("- a", "a: [", "model: fashion", CONFIG.replace("steps: 3", "steps: many")):
        (place / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match="config"):
            restored(tmp_path, place, "fashion")
    (place / "config.yaml").unlink()
    (tmp_path.parent / "outside.yaml").write_text(CONFIG)
    (place / "config.yaml").symlink_to(tmp_path.parent / "outside.yaml")
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        restored(tmp_path, place, "fashion")


def test_the_picture_beside_a_steered_one_is_that_of_its_own_noise():
    result = SimpleNamespace(rewards=torch.zeros(2, 2), ancestors=torch.tensor([[3, 1], [0, 2]]))
    assert [start_of(result, i, 4) for i in range(4)] == [3, 1, 4, 6]
    result.ancestors = None
    assert [start_of(result, i, 2) for i in range(4)] == [0, 1, 2, 3]


def test_a_model_is_loaded_once_and_its_error_reaches_who_waits():
    made = []
    loading = Loading(lambda: made.append(1) or 3)
    assert not loading.ready
    loading.start()
    assert (loading.get(), loading.get(), made) == (3, 3, [1])
    told = threading.Event()
    loading.when_done(told.set)
    assert told.is_set()

    def fails():
        raise ValueError("no such model")

    broken = Loading(fails)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such model"):
            broken.get()
    assert isinstance(broken.error, ValueError)


def test_a_run_that_is_started_before_the_model_is_there_waits_and_says_so(studio, tmp_path):
    early = Studio("fashion", tmp_path)
    early.loading = Loading(lambda: (studio.flow, studio.judge))
    seen = list(early.run("early", ask(steps=1)))
    assert seen[0] == ("waiting", session.LOADING)
    assert seen[-1][0] == "done"


@pytest.mark.slow
def test_the_page_does_not_wait_for_torch():
    code = (
        "import sys; from pathlib import Path\n"
        "import recipes.cli, recipes.studio.command\n"
        "from recipes.studio.pages import pages\n"
        "from recipes.studio.session import Studio\n"
        "pages(Studio('emoji', Path('.')))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_model_that_is_not_there_ends_the_command(tmp_path):
    words = ["studio", "--model", "emoij", "--root", str(tmp_path), "--port", "0"]
    ended = subprocess.run(
        [sys.executable, "-m", "recipes.cli", *words], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert "no model named 'emoij'" in ended.stderr


@pytest.mark.slow
def test_the_front_shows_the_same_seeds_at_every_scale(studio):
    place = studio.root / "tuned"
    tuned = adapt(studio.flow, rank=2)
    for weights in tuned.adapters().values():
        torch.nn.init.normal_(weights, std=0.05)
    save_adapters(tuned, place)
    (place / "run.json").write_text('{"prompts": ["bag", "boot"], "settings": {}}')
    reward = studio.reward("brightness")

    def front(**changed):
        given = {"flow": studio.flow, "judge": studio.judge, "reward": reward,
                 "root": studio.root, "folder": place, "prompt": "bag"}  # fmt: skip
        return list(scales_of(**(given | changed)))

    found = front()
    assert [one.scale for one in found] == [0.0, 0.25, 0.5, 0.75, 1.0]
    base = steer.sample(studio.flow, reward, ["bag"], 4, 4, "none", seed=0)
    assert found[0].rewards == base.rewards.flatten().tolist()
    assert found[0].entry["kid"] <= found[-1].entry["kid"]
    assert found[0].rewards != found[-1].rewards
    assert {"reward", "judge", "alarms"} <= found[0].entry.keys()
    (place / "front.json").write_text(
        '[{"scale": 0.0, "steps": 1, "alarms": [], "reward": 7.0, "kid": 0.0},'
        ' {"scale": 0.5, "steps": 1, "alarms": ["x"], "reward": 8.0, "kid": 1.0},'
        ' {"scale": 0.5, "steps": 2, "alarms": [], "reward": 9.0, "kid": 1.0}]'
    )
    own = [one.entry for one in front()]
    assert [entry["reward"] for entry in own] == [7.0, 8.0]  # the run's own, at its fewest jumps
    from recipes.studio.figures import compared, curves, front_of

    axes = front_of(own, 0.5).axes[0]
    assert list(axes.lines[0].get_xdata()) == [0.0, 1.0]
    assert len(curves([{"step": 1, "reward": 1, "diversity": 2}]).axes) == 2
    assert len(compared([["a", 1, 2.0], ["b", 2, 3.0]]).axes[0].lines) == 2
    (place / "best").mkdir()
    for file in place.glob("adapter_*"):
        file.rename(place / "best" / file.name)
    assert adapters_of(studio.root, place) == place / "best"  # of a run that was stopped early
    with pytest.raises(ValueError, match="no adapters yet"):
        front(folder=studio.root / "nothing")
