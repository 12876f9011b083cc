"""The studio without a browser: runs that are watched, places, and who may come in."""

import asyncio
import shlex
import threading

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import rewards
import steer
from recipes.studio.ask import Ask
from recipes.studio.guard import COOKIE, Guard
from recipes.studio.looking import looked_at, report_of
from recipes.studio.places import inside, plain_reward, runs_in
from recipes.studio.session import Studio

REWARD = "0.7*colour:name=red + 0.3*brightness"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio("fashion", tmp_path_factory.mktemp("studio"))


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
    assert [calls for calls, _ in judged] == [s.calls for s in steps]
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
    assert runs_in(studio.root) == []  # no config.yaml: not a run of `steer sample`
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
    assert "no command makes these" in (studio.save("b", "stopped") / "command.txt").read_text()


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


def test_the_bill_is_said_before(studio):
    assert "4 pictures x" in studio.cost(ask())
    for changed, words in (
        ({"reward": "blarg"}, "blarg"),
        ({"options": "{scle: 0.2}"}, "scale"),
        ({"options": "scale"}, "write them as"),
        ({"prompts": " \n"}, "write a prompt"),
        ({"reward": " "}, "say which reward"),
    ):
        with pytest.raises(ValueError, match=words):
            studio.cost(ask(**changed))


@pytest.mark.parametrize(
    "text",
    ["reward.py:R", "os.path.join", "similarity:image=/etc/passwd", "lpips:image=a.png",
     "remote:url=http://x", "http://x", "~/r.py:R", "clip + ../r.py:R"],
)  # fmt: skip
def test_files_modules_and_servers_are_refused_where_they_were_not_allowed(text):
    with pytest.raises(ValueError, match="--allow-files"):
        plain_reward(text, allow_files=False)
    assert plain_reward(text, allow_files=True) == text


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
    assert answer(theirs, host="other.com", cookie=f"{COOKIE}=secret")[0] == 403


def test_every_method_but_none_can_be_chosen(studio):
    for name in steer.METHODS:
        if name != "none":
            more = "{temperature: 0.1}" if name in ("renoise", "split") else ""
            assert "network calls" in studio.cost(ask(method=name, options=more))
