"""A server of a reward, for `rewards.serving.remote.Remote`: its processes and its address.

It listens to this machine alone unless told otherwise, and wants a token elsewhere. What it
answers is in `rewards.serving.application`.
"""

import ipaddress
import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch

from rewards.serving.application import MISSING, app
from rewards.serving.protocol import TOKEN
from steer.reward import Reward, reason

__all__ = ["serve", "worker"]

SETTINGS = "FLOWSTEER_SERVE_REWARD"
"""The environment variable through which `serve` tells its workers what they serve."""

STARTUP_FAILURE = 3
"""The exit code by which a worker says that to start it again would not help."""


def serve(
    spec: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    token: str | None = None,
    workers: int = 1,
    device: str | None = None,
    **limits: int,
) -> None:
    """Serve the reward of a text until the process is told to stop (SIGTERM, SIGINT).

    Requests in work are finished first. A worker that dies is started again.

    Args:
        spec: the reward, as `rewards.load` takes it.
        host: the address to listen at; one that others can reach needs a token.
        port: the port; 0 takes a free one.
        token: what clients must show. Default: the environment variable FLOWSTEER_REWARD_TOKEN.
        workers: processes, each with a reward of its own.
        device: where to compute. Default: where the reward is loaded.
        limits: of a request, see `rewards.serving.application.LIMITS`.

    Raises:
        ValueError: no such reward, device or limit; an open address without a token.
        OSError: the address cannot be had.
        ImportError: uvicorn or starlette is not installed.
    """
    try:
        import uvicorn
        from uvicorn.supervisors import Multiprocess
    except ImportError as error:
        raise ImportError(f"{MISSING} ({error})") from error

    for name, value in {"workers": workers, **limits}.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    token = token or os.environ.get(TOKEN) or None
    if token is None and not _private(host):
        raise ValueError(
            f"at {host} everyone in the network could use the server: set a token first, "
            f"export {TOKEN}=$(openssl rand -hex 16), for the server and its clients; or leave "
            "--host out to serve this machine alone"
        )
    with _bound(host, port) as listener:
        reward = _load(spec, device if workers == 1 else None)  # its errors, before any worker
        options = {"host": host, "log_level": "warning", "access_log": False}
        options |= {"server_header": False, "limit_concurrency": 512}
        options |= {"timeout_graceful_shutdown": 30, "timeout_worker_healthcheck": 10}
        threading.Thread(target=_announce, args=(spec, listener), daemon=True).start()
        if workers == 1:
            made = app(reward, token=token, **limits)
            uvicorn.Server(uvicorn.Config(made, **options)).run(sockets=[listener])
            return
        app(reward, token=token, **limits)
        del reward
        os.environ[SETTINGS] = json.dumps({"spec": spec, "device": device, "limits": limits})
        if token is not None:
            os.environ[TOKEN] = token
        config = uvicorn.Config(
            "rewards.serving.serve:worker", factory=True, workers=workers, **options
        )
        supervisor = Multiprocess(config, [listener])
        supervisor.run()
        if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
            raise ValueError(f"the workers could not load the reward {spec!r}: see above")


def worker() -> Any:
    """Return the application of a worker process of `serve`."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    settings = json.loads(os.environ[SETTINGS])
    try:
        reward = _load(settings["spec"], settings["device"])
    except Exception as error:
        print(f"error: a worker cannot load the reward: {error}", file=sys.stderr, flush=True)
        raise SystemExit(STARTUP_FAILURE) from error
    return app(reward, token=os.environ.get(TOKEN) or None, **settings["limits"])


def _leave_with(parent: int) -> None:
    """End this worker once its parent is gone, so that it does not hold on to the port."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _load(spec: str, device: str | None) -> Reward:
    """Make the reward, on its device."""
    from rewards.loading import load

    reward = load(spec)
    try:
        torch.empty(0, device=device)
        return reward if device is None else reward.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here ({reason(error)}): give --device "
            "cpu, or cuda where torch sees one"
        ) from error


def _private(host: str) -> bool:
    """Tell whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that has the address; it does not listen yet."""
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
    """Say where the server is, once it listens."""
    host, port = listener.getsockname()[:2]
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while True:
        try:
            socket.create_connection((near, port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.05)
    print(f"{spec} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
