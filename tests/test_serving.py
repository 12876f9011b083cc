"""A server of a reward under attack, and a client of a hostile one: each is bounded as a whole.

All traffic stays on this machine, and each test has a bound on its time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx2
import pytest
import torch

from rewards.pixels.colour import Colour
from rewards.serving import application, doorway
from rewards.serving.application import app
from rewards.serving.doorway import Doorway
from rewards.serving.protocol import HEADER, TENSORS, TOKEN, pack, unpack
from rewards.serving.remote import Remote
from rewards.serving.serve import serve
from rewards.serving.tokens import token_for
from steer.reward import wrap
from steer.secrets import HIDDEN


def pictures(n=2, side=8, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(application, port=None):
    """Run an ASGI application behind our door in a thread, and give its URL."""
    import uvicorn

    port = port or free_port()
    config = uvicorn.Config(
        application, host="127.0.0.1", port=port, log_level="error", http=Doorway, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(5)


@contextmanager
def answering(respond):
    """Run a server of plain sockets: `respond(connection)` in a thread for each."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection):
        with connection:
            connection.settimeout(10)
            try:
                respond(connection, ended)
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        listener.close()


def address(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def ended(connection, within):
    """Return the seconds until the other side ends a connection."""
    connection.settimeout(within)
    begun = time.monotonic()
    try:
        while connection.recv(1000):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - begun


# ------------------------------------------------------------------ who may stand in the door


def test_idle_connections_shut_nobody_out(monkeypatch):
    monkeypatch.setattr(doorway, "CONNECTIONS", 20)
    with running(app(Colour("red"))) as url:
        idle = [socket.create_connection(address(url)) for _ in range(60)]
        begun = time.monotonic()
        assert torch.equal(Remote(url, wait=5)(pictures()), Colour("red")(pictures()))
        assert time.monotonic() - begun < 2
        assert ended(idle[0], 2) < 2  # the oldest went first
        idle[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            idle[-1].recv(1)
        for one in idle:
            one.close()


def test_one_client_has_no_more_than_its_share(monkeypatch):
    monkeypatch.setattr(doorway, "PER_CLIENT", 4)
    with running(app(Colour("red"))) as url:
        idle = [socket.create_connection(address(url)) for _ in range(8)]
        assert max(ended(one, 2) for one in idle[:3]) < 2
        assert Remote(url, wait=5)(pictures()).shape == (2,)
        for one in idle:
            one.close()


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_a_trickled_head_is_cut_off(first, monkeypatch):
    """On a new connection, and on one that has had an answer."""
    monkeypatch.setattr(doorway, "HEAD", 0.5)
    with running(app(Colour("red"))) as url, socket.create_connection(address(url)) as one:
        if first:
            one.sendall(first)
            assert one.recv(10_000).startswith(b"HTTP/1.1 200")
            time.sleep(0.2)
        begun = time.monotonic()
        with suppress(OSError):
            for letter in b"GET / HTTP/1.1\r\nX-Filler: " + b"x" * 1000:
                one.sendall(bytes([letter]))
                time.sleep(0.05)
        assert time.monotonic() - begun < 2


def test_a_head_without_end_is_refused():
    with running(app(Colour("red"))) as url, socket.create_connection(address(url)) as one:
        one.sendall(b"GET / HTTP/1.1\r\n" + b"X-Filler: x\r\n" * 10_000)
        one.settimeout(5)
        assert one.recv(100).startswith(b"HTTP/1.1 400")


def test_an_answer_that_is_not_read_is_dropped(monkeypatch):
    monkeypatch.setattr(doorway, "TAKE", 0.5)
    with running(app(Colour("red"), max_rows=256)) as url:
        body = pack({"images": pictures(64, 256)}, {"request": '{"id": "a", "gradient": true}'})
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(address(url))
            head = (
                f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            one.sendall(head.encode() + body)
            time.sleep(3)
            one.settimeout(5)
            got = 0
            try:
                while piece := one.recv(1 << 20):
                    got += len(piece)
            except ConnectionError:
                pass
            assert got < len(body)  # what was under way, not the rest


# ------------------------------------------------------------------ what a request may be


def test_a_body_that_trickles_is_given_up(monkeypatch):
    monkeypatch.setattr(application, "GRACE", 0.5)

    def trickle():
        for _ in range(16):
            yield b"x"
            time.sleep(0.05)

    with running(app(Colour("red"))) as url:
        begun = time.monotonic()
        try:
            answer = httpx2.post(f"{url}/score", content=trickle(), timeout=10)
            assert answer.status_code == 408
            assert "had not arrived after" in answer.json()["error"]
        except httpx2.TransportError:
            pass  # it was still sending
        assert time.monotonic() - begun < 7


@pytest.mark.parametrize("count", [TENSORS + 1, 20_000, 400_000])
def test_a_body_has_few_tensors(count):
    empty = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(map(empty.__mod__, range(count))) + "}").encode()
    header += b" " * (-len(header) % 8)
    body = len(header).to_bytes(8, "little") + header
    words = f"{count} tensors" if len(header) <= HEADER else f"at most {HEADER} bytes"
    begun = time.monotonic()
    with pytest.raises(ValueError, match=words):
        unpack(body)
    assert time.monotonic() - begun < 1
    if count == 400_000:
        with running(app(Colour("red"))) as url:
            begun = time.monotonic()
            answer = httpx2.post(f"{url}/score", content=body)
            assert (answer.status_code, words in answer.text) == (400, True)
            assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"Host": "evil.com"}, 421, "'evil.com' is not this server"),
        ({"Host": "127.0.0.1.evil.com:80"}, 421, "is not this server"),
        ({"Host": "[::1"}, 421, "is not this server"),
        ({"Origin": "http://evil.com"}, 403, "web pages are not served"),
        ({"Origin": "null"}, 403, "web pages are not served"),
        ({"Host": "localhost:1"}, 200, ""),
        ({"Host": "[::1]:8000"}, 200, ""),
    ],
)
def test_other_hosts_and_web_pages_are_not_served(headers, status, words):
    with running(app(Colour("red"))) as url:
        body = pack({"images": pictures()}, {"request": '{"id": "a"}'})
        for answer in (
            httpx2.get(url, headers=headers),
            httpx2.post(f"{url}/score", content=body, headers=headers),
        ):
            assert answer.status_code == status
            assert words in answer.text


def test_a_token_stands_for_the_host_name():
    """A page that is led here by a name does not know it; a proxy may have any name."""
    shown = {"Authorization": "Bearer secret", "Host": "rewards.example"}
    with running(app(Colour("red"), token="secret")) as url:
        assert httpx2.get(url, headers=shown).status_code == 200
        assert httpx2.get(url, headers={"Host": "rewards.example"}).status_code == 401
    with running(app(Colour("red"), hosts=["rewards.example"])) as url:
        assert httpx2.get(url, headers={"Host": "rewards.example:80"}).status_code == 200


def test_a_scoring_that_hangs_is_given_up_and_blocks_no_one_for_long():
    held, hung = threading.Event(), []

    def hang(images):
        if len(images) == 1:
            held.wait(20)
        return images.mean((1, 2, 3))

    application = app(wrap(hang), max_seconds=0.5, hung=lambda: hung.append(1))
    with running(application) as url, ThreadPoolExecutor(2) as pool:
        begun = time.monotonic()
        first = pool.submit(Remote(url, wait=10), pictures(1))
        time.sleep(0.2)
        second = pool.submit(Remote(url, wait=10), pictures(2))
        with pytest.raises(ValueError, match=r"status 500.*longer than 0\.5 s.*--max-seconds"):
            first.result()
        assert time.monotonic() - begun < 2
        assert hung == [1]
        with pytest.raises(ConnectionError, match=r"status 503 .*at work for over 0\.5 s"):
            Remote(url, wait=0.5)(pictures(2))
        held.set()  # its thread comes back: so does the server
        assert torch.equal(second.result(), pictures(2).mean((1, 2, 3)))


# ------------------------------------------------------------------ a hostile server


def head_of(connection):
    got = b""
    while b"\r\n\r\n" not in got:
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionError
        got += piece
    return got


def trickled_head(connection, ended):
    head_of(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not ended.wait(0.05):
        connection.sendall(b"X: y\r\n")


def endless_continue(connection, ended):
    head_of(connection)
    while not ended.is_set():
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)
        time.sleep(0.01)


def trickled_body(connection, ended):
    head_of(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while not ended.wait(0.05):
        connection.sendall(b" ")


def silent(connection, ended):
    ended.wait(10)


@pytest.mark.parametrize("respond", [trickled_head, endless_continue, trickled_body, silent])
def test_a_client_waits_for_no_hostile_server(respond):
    with answering(respond) as url:
        begun = time.monotonic()
        with pytest.raises(
            ConnectionError, match=r"did not answer for 0\.8 s: it has the request"
        ):
            Remote(url, wait=0.8)
        assert time.monotonic() - begun < 1.8


def test_an_answer_without_end_is_refused():
    def flood(connection, ended):
        head_of(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not ended.is_set():
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")

    with answering(flood) as url, pytest.raises(ValueError, match="more than 1048576 bytes"):
        Remote(url, wait=5)


def test_a_compressed_answer_is_refused():
    import gzip

    bomb = gzip.compress(b" " * 50_000_000)

    def respond(connection, ended):
        head_of(connection)
        length = f"Content-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + length.encode() + bomb)

    with answering(respond) as url, pytest.raises(ValueError, match="compressed"):
        Remote(url, wait=5)


def test_a_slow_reward_is_asked_once_and_delivers():
    calls = []

    def slow(images):
        calls.append(len(images))
        time.sleep(1.0)
        return images.mean((1, 2, 3))

    with running(app(wrap(slow))) as url:
        remote = Remote(url, timeout=0.25, wait=10)
        assert torch.equal(remote(pictures()), pictures().mean((1, 2, 3)))
        assert calls == [2]
        remote.wait = 0.5
        with pytest.raises(
            ConnectionError, match=r"slow, or does not respond: .*batch=ROWS.*wait=SECONDS"
        ):
            remote(pictures())
        time.sleep(0.7)
        assert calls == [2, 2]


def test_what_is_wrong_is_said_by_its_cause():
    def closes(connection, ended):
        head_of(connection)

    with (
        answering(closes) as url,
        pytest.raises(ConnectionError, match=r"ended without an answer \(.*its own messages"),
    ):
        Remote(url, wait=0.5)

    def busy(connection, ended):
        head_of(connection)
        connection.sendall(
            b"HTTP/1.1 503 no\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfull"
        )

    with (
        answering(busy) as url,
        pytest.raises(ConnectionError, match=r"status 503 \(.*full\).*more --workers"),
    ):
        Remote(url, wait=0.5)
    with running(app(Colour("red"))) as url:
        begun = time.monotonic()
        with pytest.raises(ValueError, match=r"cannot be reached by https.*give http://"):
            Remote(url.replace("http", "https"), wait=5)
        assert time.monotonic() - begun < 2  # asking again would not help
    with pytest.raises(
        ConnectionError, match=r"no server can be reached \(.*steer serve-reward NAME"
    ):
        Remote(f"http://127.0.0.1:{free_port()}", wait=0.3)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:99999", "http://127.0.0.1:x", "http://[::1", "http://127.0.0.1/a b",
     "http://127.0.0.1/#a", "http://", "ftp://127.0.0.1", "http://127.0.0.1:80?token=tiger"],
)  # fmt: skip
def test_what_is_no_url_is_said(url):
    with pytest.raises(ValueError, match=r"not the URL of a server.*write it as http") as caught:
        Remote(url, wait=0.1)
    assert "tiger" not in str(caught.value)


def test_a_servers_name_is_taken_without_what_a_terminal_acts_on():
    about = {"protocol": 1, "name": "\x1b[2J" + "n" * 1000, "max_rows": 1e400}
    bodies = [json.dumps(about), json.dumps({**about, "max_rows": 2})]

    def respond(connection, ended):
        head_of(connection)
        body = bodies.pop(0).encode()
        length = f"Content-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + length + body)

    with answering(respond) as url:
        with pytest.raises(ValueError, match="not as a reward server"):
            Remote(url, wait=2)  # an infinite number of rows
        found = Remote(url, wait=2).__name__
    assert found.isprintable()
    assert len(found) == 200


# ------------------------------------------------------------------ tokens


@contextmanager
def listening(status=200, headers=""):
    """Run a server that keeps what it is shown."""
    heads = []

    def respond(connection, ended):
        heads.append(head_of(connection).decode())
        body = json.dumps({"protocol": 1, "name": "n", "differentiable": False})
        connection.sendall(
            f"HTTP/1.1 {status} x\r\n{headers}Connection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )

    with answering(respond) as url:
        yield url, heads


def test_a_token_is_shown_to_its_own_host_alone(monkeypatch, tmp_path):
    monkeypatch.setenv(TOKEN, "tiger")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert token_for("127.0.0.1", 1) == token_for("localhost", 1) == token_for("::1", 1) == "tiger"
    for host in ("example.com", "10.0.0.1", "127.0.0.1.evil.com", "localhost.evil.com", "0.0.0.0"):
        assert token_for(host, 80) is None
    (tmp_path / "netrc").write_text(
        "machine gpu:8000 login flowsteer password one\n"
        "machine gpu login flowsteer password two\n"
        "machine ftp login me password lion\n"
    )
    (tmp_path / "netrc").chmod(0o600)
    assert token_for("gpu", 8000) == "one"
    assert token_for("gpu", 9000) == "two"
    assert token_for("ftp", 80) is None  # another login's
    assert token_for("127.0.0.1", 8000) == "tiger"
    (tmp_path / "netrc").write_text("machine\n")
    with pytest.raises(ValueError, match=r"cannot read .*netrc, where a token for gpu may be"):
        token_for("gpu", 1)


def test_a_token_does_not_follow_a_redirection(monkeypatch):
    monkeypatch.setenv(TOKEN, "tiger")
    with listening() as (there, seen):
        for status in (301, 302, 307, 308):
            with (
                listening(status, f"Location: {there}/\r\n") as (url, shown),
                pytest.raises(
                    ValueError, match=r"redirects to 'http.*redirections are not followed"
                ),
            ):
                Remote(url, wait=2)
            assert "Authorization: Bearer tiger" in shown[0].replace(
                "authorization", "Authorization"
            )
        assert seen == []


def test_a_hidden_token_is_none(monkeypatch):
    """What config.yaml holds of a token is not shown to a server: the real one is looked up."""
    monkeypatch.setenv(TOKEN, "tiger")
    with listening() as (url, shown):
        Remote(url, token=HIDDEN, wait=2)
        assert "Bearer tiger" in shown[0]
    monkeypatch.delenv(TOKEN)
    refused = pytest.raises(PermissionError, match=f"set the environment variable {TOKEN}")
    with running(app(Colour("red"), token="tiger")) as url, refused:
        Remote(url, token=HIDDEN, wait=2)


# ------------------------------------------------------------------ the processes


def start(spec, *words, folder):
    command = [sys.executable, "-m", "recipes.cli", "serve-reward", spec, "--port", "0", *words]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=(folder / "log").open("w"), text=True,
        start_new_session=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    return server, server.stdout.readline().split()[-1]


def end(server):
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def below(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def closed_within(url, seconds):
    """Return whether nothing listens any more after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            socket.create_connection(address(url), 1).close()
        except OSError:
            return True
        time.sleep(0.05)
    return False


SLEEPY = """
import ctypes, time

def mean(images):
    if len(images) == 3:
        time.sleep(600)
    if len(images) == 4:  # holds the interpreter: no thread of this process runs
        ctypes.PyDLL(None).sleep(600)
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
def test_a_worker_whose_reward_hangs_is_replaced(tmp_path):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    server, url = start("sleepy.py:mean", "--max-seconds", "2", folder=tmp_path)
    try:
        remote, (first, *_) = Remote(url, wait=60), below(server.pid)[-1:]
        with pytest.raises(ValueError, match=r"status 500.*longer than 2 s and was stopped"):
            remote(pictures(3))
        begun = time.monotonic()
        assert torch.equal(remote(pictures(2)), pictures(2).mean((1, 2, 3)))
        assert time.monotonic() - begun < 40
        assert first not in below(server.pid)
        assert (
            "sleepy.py:mean does not respond: its worker is replaced"
            in (tmp_path / "log").read_text()
        )
    finally:
        end(server)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_workers_end_with_their_parent(tmp_path, rows):
    """Also while a reward sleeps, and while it holds the interpreter."""
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    server, url = start("sleepy.py:mean", folder=tmp_path)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(Remote(url, wait=5), pictures(rows))
            time.sleep(1)
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
            assert closed_within(url, 3)
            asked.exception()
    finally:
        end(server)


@pytest.mark.slow
def test_workers_end_with_their_parent_while_they_begin(tmp_path):
    """It was gone before they looked who it was, so they stayed for good."""
    (tmp_path / "slow_start.py").write_text(
        "import os, time\nif os.environ.get('FLOWSTEER_SERVE_REWARD'):\n    time.sleep(2)\n"
        "def mean(images):\n    return images.mean((1, 2, 3))\n"
    )
    server, url = start("slow_start.py:mean", "--workers", "2", folder=tmp_path)
    end_of = below(server.pid)
    try:
        os.kill(end_of[-1], signal.SIGKILL)  # another begins
        time.sleep(1.5)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        assert closed_within(url, 10)
    finally:
        end(server)


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_stops_though_a_reward_hangs(tmp_path, monkeypatch):
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    server, url = start("sleepy.py:mean", folder=tmp_path)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(Remote(url, wait=3), pictures(3))
            time.sleep(1)
            os.kill(server.pid, signal.SIGTERM)
            server.wait(50)
            asked.exception()
        assert closed_within(url, 1)
    finally:
        end(server)


def test_serve_says_where_it_cannot_run():
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(serve, "brightness", "127.0.0.1", 0)
        with pytest.raises(ValueError, match="only the main thread can"):
            asked.result()
