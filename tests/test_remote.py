"""A reward behind a URL: the same scores, bounded waiting, limits, a token."""

import copy
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

import rewards
import steer
from recipes.cli import main
from rewards.pixels.colour import Colour
from rewards.serving.application import app
from rewards.serving.protocol import TOKEN, pack, unpack
from rewards.serving.remote import Remote
from rewards.serving.serve import serve
from rewards.testing import RewardContract
from steer.reward import Reward, wrap


def pictures(n=3, side=8, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(application, port=None):
    """Run an ASGI application in a thread, and give its URL."""
    import uvicorn

    port = port or free_port()
    server = uvicorn.Server(
        uvicorn.Config(application, host="127.0.0.1", port=port, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(5)


@pytest.fixture(scope="module")
def url():
    with running(app(Colour("red"), max_rows=4, max_bytes=64_000)) as found:
        yield found


class TestContract(RewardContract):
    @pytest.fixture(autouse=True)
    def _url(self):
        with running(app(Colour("red"))) as self.url:
            yield

    def create_reward(self):
        return Remote(self.url)


def test_scores_and_gradients_are_the_local_ones(url):
    remote, local = Remote(url, batch=2), Colour("red")
    assert remote.differentiable
    x, y = (pictures(5).requires_grad_() for _ in range(2))
    upstream = torch.arange(5.0)
    a, b = remote(x), local(y)
    assert torch.equal(a, b)
    a.backward(upstream)
    b.backward(upstream)
    assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-9)  # 4 (a b) against (4 a) b
    with torch.no_grad():
        assert torch.equal(remote(pictures(5)), b)


def test_a_url_is_a_reward_in_texts(url):
    x = pictures()
    expected = 0.5 * Colour("red")(x) + rewards.load("brightness")(x)
    assert torch.allclose(rewards.load(f"0.5*{url} + brightness")(x), expected)
    assert torch.equal(rewards.load(f"min({url}, brightness)")(x), Colour("red")(x))
    made = rewards.load(f"remote:url={url},batch=2,wait=5")
    assert made.batch == 2
    assert torch.equal(made(x), Colour("red")(x))


def test_it_guides(url):
    class Picture(steer.GaussianMixture):
        def decode(self, x):
            return (x[:, :, None, None].expand(-1, 3, 4, 4) * 0.2 + 0.5).float()

    flow = Picture(torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, -0.5]]), 0.5)
    there, here = (
        steer.sample(flow, reward, particles=4, steps=3, temperature=0.1, method="fmtt")
        for reward in (Remote(url), Colour("red"))
    )
    assert torch.allclose(there.x, here.x, atol=1e-6)


def test_prompts_and_metadata_travel(url):
    seen = []

    class Seen(Reward):
        differentiable = False

        def forward(self, images, prompts=None, metadata=None):
            seen.append((prompts, metadata))
            return images.mean((1, 2, 3))

    with running(app(Seen())) as place:
        remote = Remote(place, batch=2)
        assert not remote.differentiable
        remote(pictures(), ["a", "ü", ""], [{"k": 1}, None, [2]])
        assert seen == [(["a", "ü"], [{"k": 1}, None]), ([""], [[2]])]
        assert not remote(pictures().requires_grad_()).requires_grad
        with pytest.raises(ValueError, match="one for each of 3 images"):
            remote(pictures(), ["a"])
        with pytest.raises(ValueError, match="must be JSON"):
            remote(pictures(), metadata=[{1, 2}] * 3)


def test_copies_and_threads_share_a_server(url):
    remote = Remote(url)
    assert torch.equal(copy.deepcopy(remote)(pictures()), Colour("red")(pictures()))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: remote(pictures(1, seed=i)), range(40)))
    assert all(torch.equal(f, Colour("red")(pictures(1, seed=i))) for i, f in enumerate(found))


def test_limits_of_a_request(url):
    import httpx2

    large = httpx2.post(f"{url}/score", content=b"x" * 100_000)
    assert large.status_code == 413
    assert "larger than 64000 bytes" in large.json()["error"]

    def trickle():  # no length is announced: the limit holds all the same
        for _ in range(100):
            yield b"x" * 1000

    assert httpx2.post(f"{url}/score", content=trickle()).status_code == 413
    many = pack({"images": pictures(5)}, {"request": '{"id": "a"}'})
    assert httpx2.post(f"{url}/score", content=many).status_code == 413
    remote = Remote(url, batch=100)
    assert torch.equal(remote(pictures(9)), Colour("red")(pictures(9)))  # it splits by itself


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"garbage", "cannot read the request"),
        (pack({"images": pictures()}, {}), "cannot read the request"),
        (pack({"images": pictures()[:, :1]}, {"request": '{"id": "a"}'}), "must be \\(n, 3, h, w"),
        (pack({"images": pictures()}, {"request": '{"id": 3}'}), "must be a text"),
        (
            pack({"images": pictures()}, {"request": '{"id": "a", "prompts": ["x"]}'}),
            "one for each",
        ),
    ],
)
def test_malformed_requests_are_refused(url, body, message):
    import re

    import httpx2

    answer = httpx2.post(f"{url}/score", content=body)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"])


def test_a_token_is_asked_for(monkeypatch, capsys):
    monkeypatch.delenv(TOKEN, raising=False)
    with running(app(Colour("red"), token="secret")) as place:
        with pytest.raises(PermissionError, match=TOKEN):
            Remote(place)
        with pytest.raises(PermissionError, match="missing or wrong"):
            Remote(place, token="other")
        remote = Remote(place, token="secret")
        assert remote(pictures()).shape == (3,)
        assert "secret" not in repr(remote)
        monkeypatch.setenv(TOKEN, "secret")
        assert Remote(place)(pictures()).shape == (3,)
    monkeypatch.delenv(TOKEN)
    assert main(["serve-reward", "brightness", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "set a token first" in capsys.readouterr().err
    with pytest.raises(ValueError, match="set a token first"):
        serve("brightness", "::", 0)


def test_a_rewards_own_errors_come_back(url):
    def picky(images, prompts):
        raise ValueError(f"no prompts but {prompts}")

    refused = pytest.raises(ValueError, match=r"refused \(status 422\): no prompts but None")
    with running(app(wrap(picky))) as place, refused:
        Remote(place)(pictures())
    broken = wrap(lambda x: x.mean((1, 2, 3)) / torch.arange(len(x)) * 0)
    with (
        running(app(broken)) as place,
        pytest.raises(ValueError, match="row 0 of 3 is not finite"),
    ):
        Remote(place)(pictures())


def test_a_server_that_stays_down_is_waited_for_within_bounds(url):
    port = free_port()
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"did not answer for 0\.6 s.*--port {port}"):
        Remote(f"http://127.0.0.1:{port}", wait=0.6)
    assert 0.3 < time.monotonic() - start < 2
    with running(app(Colour("red"))) as place:
        remote = Remote(place, wait=0.6)
    with pytest.raises(ConnectionError, match="steer serve-reward NAME"):
        remote(pictures())


def test_a_server_that_comes_back_is_found():
    port = free_port()
    with running(app(Colour("red")), port) as place:
        remote = Remote(place, wait=20)
        remote(pictures())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(remote, pictures(seed=1))
        time.sleep(0.5)
        with running(app(Colour("red")), port):
            assert torch.equal(waiting.result(20), Colour("red")(pictures(seed=1)))


def test_a_server_that_hangs_is_not_waited_for_forever():
    held = threading.Event()

    def hang(images):
        held.wait(10)
        return images.mean((1, 2, 3))

    import httpx2

    with running(app(wrap(hang))) as place:
        remote = Remote(place, timeout=0.3, wait=1.0)
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"did not answer for 1 s.*ReadTimeout"):
            remote(pictures())
        assert time.monotonic() - begun < 2
        assert httpx2.get(f"{place}/health", timeout=1).json() == {"ok": True}  # while it scores
        held.set()


def test_one_request_at_a_time_and_none_that_nobody_waits_for():
    inside, most, calls = [0], [0], []

    def slow(images):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        calls.append(len(images))
        time.sleep(0.1)
        inside[0] -= 1
        return images.mean((1, 2, 3))

    with running(app(wrap(slow))) as place:
        patient, hasty = Remote(place), Remote(place, timeout=0.15, wait=0.15)
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(patient, pictures(1)) for _ in range(6)]
            time.sleep(0.05)
            gone = pool.submit(hasty, pictures(2))
            assert all(torch.equal(f.result(), pictures(1).mean((1, 2, 3))) for f in found)
            assert isinstance(gone.exception(), ConnectionError)
    assert most == [1]
    assert calls == [1] * 6  # what nobody waited for was not scored


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_connections_of_its_own(url):
    remote, x = Remote(url), pictures(1)
    expected = remote(x)
    child = os.fork()
    if not child:
        os._exit(0 if all(torch.equal(remote(x), expected) for _ in range(20)) else 1)
    assert all(torch.equal(remote(x), expected) for _ in range(20))
    assert os.waitpid(child, 0)[1] == 0


def answering(respond):
    """An ASGI application that answers /score by a function of the request's body."""
    import json

    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def about(request):
        return JSONResponse({"protocol": 1, "name": "mock", "differentiable": True})

    async def scored(request):
        tensors, metadata = unpack(await request.body())
        made = respond(tensors["images"], json.loads(metadata["request"]))
        return Response(made) if isinstance(made, bytes) else JSONResponse(*made)

    return Starlette(routes=[Route("/", about), Route("/score", scored, methods=["POST"])])


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (lambda x, r: b"nonsense", "not a safetensors file"),
        (lambda x, r: pack({"scores": x[:, 0, 0, 0]}, {"id": "another"}), "not for"),
        (
            lambda x, r: pack({"scores": x.new_zeros(1)}, {"id": r["id"]}),
            r"expected floating scores",
        ),
        (lambda x, r: pack({"scores": x[:, 0, 0, 0] / 0}, {"id": r["id"]}), "not all finite"),
        (lambda x, r: ({"error": "no such prompt"}, 422), "no such prompt"),
    ],
)
def test_bad_answers_are_found_out(respond, message):
    with running(answering(respond)) as place, pytest.raises(ValueError, match=message):
        Remote(place)(1 - 0.5 * pictures())


def test_busy_servers_are_asked_again():
    calls = []

    def respond(x, r):
        calls.append(r["id"])
        if len(calls) < 3:
            return {"error": "busy"}, (503, 429)[len(calls) - 1], {"Retry-After": "0.05"}
        return pack({"scores": x[:, 0, 0, 0]}, {"id": r["id"]})

    with running(answering(respond)) as place:
        assert torch.equal(Remote(place)(pictures()), pictures()[:, 0, 0, 0])
    assert len(calls) == 3
    assert len(set(calls)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:80"}, "write it as http"),
        ({"url": "http://me:pw@127.0.0.1"}, "user and password out"),
        ({"url": "http://127.0.0.1", "batch": 0}, "batch must be"),
        ({"url": "http://127.0.0.1", "wait": -1}, "wait must be"),
        ({"url": "http://127.0.0.1", "token": "a\nb"}, "printable"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Remote(**options)


def test_what_is_no_reward_server_is_said():
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def hello(request):
        return PlainTextResponse("hello")

    refused = pytest.raises(ValueError, match="not as a reward server")
    with running(Starlette(routes=[Route("/", hello)])) as place, refused:
        Remote(place)


# ---- the real thing: two workers, eight clients, a kill and a restart


CLIENTS, EACH = 8, 500


def start(port, log, spec="colour:name=red", count=2, **environment):
    command = [sys.executable, "-m", "recipes.cli", "serve-reward", spec]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workers", str(count)], stdout=subprocess.PIPE,
        stderr=log, start_new_session=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert server.stdout.readline() == f"{spec} at http://127.0.0.1:{port}\n"
    return server


def end(server):
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def workers(pid):
    """The processes below a process."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_when_a_server_dies(tmp_path):
    port, bound, total = free_port(), 60.0, CLIENTS * EACH
    answers, waits, stop = {}, {}, threading.Event()
    with (tmp_path / "log").open("w") as log:
        server = start(port, log, **{TOKEN: "a-secret"})
        try:
            remote = Remote(f"http://127.0.0.1:{port}", "a-secret", wait=bound, timeout=20)

            def client(k):
                for i in range(k, total, CLIENTS):
                    if stop.is_set():
                        return
                    begun = time.monotonic()
                    scores = remote(pictures(1, 16, seed=i))
                    waits[i] = time.monotonic() - begun
                    answers.setdefault(i, []).append(scores)

            def reached(count):
                while len(answers) < count:
                    assert not any(c.done() and c.exception() for c in clients)
                    time.sleep(0.005)

            with ThreadPoolExecutor(CLIENTS) as pool:
                begun = time.monotonic()
                clients = [pool.submit(client, k) for k in range(CLIENTS)]
                try:
                    reached(total // 4)
                    os.kill(workers(server.pid)[-1], signal.SIGKILL)  # one worker of two
                    reached(total // 2)
                    os.killpg(server.pid, signal.SIGKILL)  # all of it
                    server.wait()
                    before = len(answers)
                    assert before < total
                    time.sleep(1)
                    server = start(port, log, **{TOKEN: "a-secret"})
                    for one in clients:
                        one.result()
                finally:
                    stop.set()
            took = time.monotonic() - begun
            assert sorted(answers) == list(range(total))  # none lost
            assert all(len(found) == 1 for found in answers.values())  # none twice
            local = Colour("red")
            for i, (scores,) in answers.items():
                assert torch.equal(scores, local(pictures(1, 16, seed=i)))  # each its own
            assert max(waits.values()) < bound
            middle = sorted(waits.values())[total // 2]
            print(
                f"\n{total} answers in {took:.1f} s, {before} before the end of the first server, "
                f"waits: median {1000 * middle:.1f} ms, longest {max(waits.values()):.1f} s"
            )

            os.killpg(server.pid, signal.SIGTERM)
            assert server.wait(40) == 0
            remote.wait = 2.0
            begun = time.monotonic()
            with pytest.raises(ConnectionError, match="did not answer for 2 s"):
                remote(pictures())
            assert time.monotonic() - begun < 3
        finally:
            end(server)
    assert "a-secret" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_request_in_work_is_finished_when_the_server_is_told_to_stop(tmp_path, count):
    file, port = tmp_path / "slowly.py", free_port()
    file.write_text(
        "import time\n\n\ndef mean(x):\n    time.sleep(2)\n    return x.mean((1, 2, 3))\n"
    )
    with (tmp_path / "log").open("w") as log, ThreadPoolExecutor(1) as pool:
        server = start(port, log, f"{file}:mean", count)
        try:
            remote = Remote(f"http://127.0.0.1:{port}", wait=5)
            asked = pool.submit(remote, pictures())
            time.sleep(1)
            os.kill(server.pid, signal.SIGTERM)
            assert torch.equal(asked.result(), pictures().mean((1, 2, 3)))
            server.wait(20)
        finally:
            end(server)


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_server(tmp_path):
    file, port = tmp_path / "once.py", free_port()
    file.write_text(
        "import os, pathlib\n\nmark = pathlib.Path(__file__).with_suffix('.mark')\n"
        "if mark.exists():\n    raise ValueError('a second time')\nmark.touch()\n\n\n"
        "def mean(x):\n    return x.mean((1, 2, 3))\n"
    )
    command = [sys.executable, "-m", "recipes.cli", "serve-reward", f"{file}:mean"]
    run = subprocess.run(
        [*command, "--port", str(port), "--workers", "2"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 2
    assert "a worker cannot load the reward: a second time" in run.stderr
    assert "the workers could not load the reward" in run.stderr
