"""A reward server for `rewards.serving.remote.Remote`: its processes and its address.

By default it listens on this machine only; other addresses need a token. Worker processes score,
and one more process supervises them: a worker that ends, or in which a reward hangs, is replaced.
`rewards.serving.application` defines the answers, `rewards.serving.doorway` the deadlines.
"""

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from rewards.serving.application import MISSING, app
from rewards.serving.protocol import TOKEN
from rewards.serving.tokens import is_loopback
from steer.reward import Reward, reason
from steer.secrets import redacted

__all__ = ["serve", "worker"]

SETTINGS = "FLOWSTEER_SERVE_REWARD"
"""The environment variable with which `serve` passes the settings to its workers."""

STARTUP_FAILURE = 3
"""The exit code of a worker that need not be restarted, because that would not help."""

HUNG = 70
"""The exit code of a worker in which a reward hangs: another worker is started."""

FINISH = 30
"""Seconds for requests that are being processed when the server has to stop."""


def serve(
    spec: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token: str | None = None,
    workers: int = 1,
    device: str | None = None,
    **limits: float,
) -> None:
    """Serve the reward of a text until the process gets SIGTERM or SIGINT.

    Requests that are being processed are finished first. A worker that dies, or whose reward takes
    longer than `max_seconds`, is replaced.

    Args:
        spec: the reward, as for `rewards.load`.
        host: the address to listen on; a token is needed if other machines can reach it.
        port: the port; 0 chooses a free one.
        token: token that clients must send. Default: the environment variable
            FLOWSTEER_REWARD_TOKEN.
        workers: number of processes, each with its own copy of the reward.
        device: device to compute on. Default: where the reward is loaded.
        limits: limits of a request, see `rewards.serving.application.LIMITS`.

    Raises:
        ValueError: no such reward, device or limit; an open address without a token.
        OSError: the address is not available.
        ImportError: uvicorn or starlette is not installed.
    """
    try:
        import uvicorn

        from rewards.serving.doorway import Doorway
    except ImportError as error:
        raise ImportError(f"{MISSING} ({error})") from error

    _refuse_place()
    for name, value in {"workers": workers, **limits}.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if not 0 <= port < 65536:
        raise ValueError(f"port must be from 0 to 65535, got {port}")
    token = token or os.environ.get(TOKEN) or None
    if token is None and not is_loopback(host):
        raise ValueError(
            f"at {host} everybody in the network could use the server: set a token first, export "
            f"{TOKEN}=$(openssl rand -hex 16), for the server and its clients; or leave --host "
            "out to serve only this machine"
        )
    with _bound(host, port) as listener:
        there = device is not None and torch.cuda.is_available()  # leave the memory to the workers
        app(_load(spec, None if there else device), token=token, **limits)  # for its errors
        told = {"spec": spec, "device": device, "limits": limits, "parent": os.getpid()}
        os.environ[SETTINGS] = json.dumps(told)
        if token is not None:
            os.environ[TOKEN] = token
        threading.Thread(target=_announce, args=(spec, listener), daemon=True).start()
        config = uvicorn.Config(
            "rewards.serving.serve:worker", factory=True, workers=workers, host=host,
            http=Doorway, ws="none", lifespan="off", log_level="warning", access_log=False,
            server_header=False, timeout_graceful_shutdown=FINISH, timeout_worker_healthcheck=10,
        )  # fmt: skip
        try:
            failed = _failed(config, listener)
        finally:
            del os.environ[SETTINGS]
        if failed:
            raise ValueError(
                f"the workers could not load the reward {redacted(spec)!r}: see above"
            )


def _failed(config: Any, listener: socket.socket) -> bool:
    """Supervise the workers until a signal to stop; return whether they could not start."""
    from uvicorn.supervisors import Multiprocess

    class Supervisor(Multiprocess):
        def join_all(self) -> None:
            """Wait for requests that are being processed, and end workers that hang."""
            until = time.monotonic() + FINISH + 5
            for process in self.processes:
                process.process.join(max(0.0, until - time.monotonic()))
                if process.process.is_alive():
                    process.process.kill()
                process.process.join()

    supervisor = Supervisor(config, [listener])
    supervisor.run()
    return any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes)


def _refuse_place() -> None:
    """Raise a ValueError where processes cannot be supervised."""
    if multiprocessing.parent_process() is not None and SETTINGS in os.environ:
        print(
            "error: serve() is called where the workers start too: put it under "
            "`if __name__ == '__main__':`",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(STARTUP_FAILURE)
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            "serve() manages processes, which only the main thread can do: in another thread, run "
            "rewards.serving.application.app(reward) with uvicorn"
        )


def worker() -> Any:
    """Return the application of a worker process of `serve`."""
    settings = json.loads(os.environ[SETTINGS])
    _leave_with(settings["parent"])
    try:
        reward = _load(settings["spec"], settings["device"])
    except Exception as error:
        text = redacted(str(error))
        print(f"error: a worker cannot load the reward: {text}", file=sys.stderr, flush=True)
        raise SystemExit(STARTUP_FAILURE) from error
    token = os.environ.get(TOKEN) or None
    return app(reward, token=token, hung=_replace_me(settings["spec"]), **settings["limits"])


def _replace_me(spec: str) -> Callable[[], None]:
    """Return a function that ends this worker after its last answers; threads cannot be ended."""

    def end() -> None:
        print(
            f"the reward {redacted(spec)} does not respond: its worker is replaced",
            file=sys.stderr,
            flush=True,
        )
        asyncio.get_running_loop().call_later(1.0, os._exit, HUNG)

    return end


def _leave_with(parent: int) -> None:
    """End this worker when its parent ends, so that the port becomes free.

    On Linux the kernel does it, even if the reward blocks the interpreter; elsewhere a thread
    polls.
    """
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load(spec: str, device: str | None) -> Reward:
    """Load the reward on its device."""
    from rewards.loading import load

    reward = load(spec)
    if device is None:
        return reward
    try:
        torch.empty(0, device=device)
        return reward.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here ({reason(error)}): give --device "
            "cpu, or cuda where torch sees one"
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to the address and does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol is named because asyncio turns off Nagle's delay, 40 ms an answer, only then
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        why = getattr(error, "strerror", None) or error
        raise OSError(
            f"cannot listen at {host}, port {port} ({why}): give another --port, or 0 for a "
            "free one"
        ) from error
    return made


def _announce(spec: str, listener: socket.socket) -> None:
    """Print the server's address when it listens."""
    host, port = listener.getsockname()[:2]
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while True:
        try:
            socket.create_connection((near, port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)
    print(f"{redacted(spec)} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
