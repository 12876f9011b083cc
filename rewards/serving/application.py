"""The web application that serves a reward, as `rewards.serving.protocol` specifies.

It never unpickles, and reads no more of a request than its limits allow. It scores one request at
a time in a thread, so that it can answer other requests meanwhile; a scoring that takes too long
is abandoned. Requests from web pages are refused: those with a foreign `Origin`, and those with a
foreign host name that resolves to this machine.
"""

import hmac
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rewards.serving.protocol import PROTOCOL, pack, unpack
from rewards.serving.tokens import is_loopback
from steer.devices import differentiating
from steer.reward import Reward, name_of, score

__all__ = ["LIMITS", "MISSING", "app"]

LIMITS = {"max_bytes": 128 * 2**20, "max_rows": 256, "max_side": 4096, "max_seconds": 300}
"""Limits of a request: bytes of the body, pictures, pixels of a side, seconds of scoring."""

WAITING = 16
"""Maximum number of requests in a process, one of them being processed; others must retry."""

UPLOAD, GRACE, RATE = 60.0, 10.0, 2**18
"""Maximum seconds for receiving a request's body; the seconds after which a minimum rate is
required; and that rate in bytes per second."""

MISSING = "serving a reward needs starlette and uvicorn: pip install 'flowsteer[serve]'"


class _Refused(Exception):
    """A refused request: a status and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def app(
    reward: Reward,
    *,
    token: str | None = None,
    max_bytes: int = LIMITS["max_bytes"],
    max_rows: int = LIMITS["max_rows"],
    max_side: int = LIMITS["max_side"],
    max_seconds: float = LIMITS["max_seconds"],
    hosts: Sequence[str] = (),
    hung: Callable[[], None] | None = None,
) -> Any:
    """Return an ASGI application that scores pictures by a reward.

    It answers `GET /` and `POST /score` as `rewards.serving.protocol` specifies. It answers
    `GET /health` with `{"ok": true}`, without a token and also during a scoring.

    Args:
        reward: the reward, on its device; it is put into evaluation mode, and its parameters are
            frozen.
        token: the token that clients must send; None: none is needed.
        max_bytes: maximum size of a request's body.
        max_rows: maximum number of pictures in a request.
        max_side: the longest side of a picture, in pixels.
        max_seconds: time limit of a scoring. One that takes longer is abandoned; until its thread
            returns, clients are asked to retry.
        hosts: host names that are accepted besides this machine's own, if no token is needed; "*"
            for any.
        hung: called when a scoring is abandoned, for instance to end the process.

    Raises:
        ImportError: starlette is not installed.
    """
    try:
        import anyio
        import anyio.to_thread
        from starlette.applications import Starlette
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError(f"{MISSING} ({error})") from error

    reward = reward.eval().requires_grad_(False)
    info = {
        "protocol": PROTOCOL,
        "name": name_of(reward),
        "differentiable": reward.differentiable,
        "max_bytes": max_bytes,
        "max_rows": max_rows,
        "max_side": max_side,
    }
    turn, waiting = anyio.Lock(), anyio.Semaphore(WAITING)
    at_work: set[object] = set()  # the scorings whose threads have not returned

    def admit(request: Request) -> None:
        if "origin" in request.headers:
            raise _Refused(403, "web pages are not served: a request with an Origin is from one")
        name = _host(request.headers.get("host", ""))
        if token is None and not (is_loopback(name) or {name, "*"} & set(hosts)):
            raise _Refused(
                421,
                f"the Host {name[:100]!r} is not this server: use localhost or 127.0.0.1",
            )
        shown = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(
            shown.encode("latin-1"), f"Bearer {token}".encode()
        ):
            raise _Refused(401, "the token is missing or wrong")

    async def read(request: Request) -> bytes:
        """Read the body, up to the limit."""
        too_large = _Refused(
            413, f"the request is larger than {max_bytes} bytes: send fewer or smaller pictures"
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
            raise too_large
        got, begun = bytearray(), anyio.current_time()
        with anyio.CancelScope(deadline=begun + GRACE) as scope:
            async for piece in request.stream():
                got += piece
                if len(got) > max_bytes:
                    raise too_large
                scope.deadline = begun + min(UPLOAD, GRACE + len(got) / RATE)
        if scope.cancelled_caught:
            took = anyio.current_time() - begun
            raise _Refused(408, f"the request had not arrived after {took:.0f} s")
        return bytes(got)

    async def work_on(images: Tensor, asked: dict[str, Any]) -> bytes:
        """Score in a thread, up to the time limit."""
        if at_work:
            raise _Refused(503, f"a scoring has been at work for over {max_seconds:g} s")
        key = object()

        def score_it() -> bytes:
            try:
                return _score(reward, images, asked)
            finally:
                at_work.discard(key)

        at_work.add(key)
        with anyio.move_on_after(max_seconds):
            return await anyio.to_thread.run_sync(score_it, abandon_on_cancel=True)
        if hung is not None:
            hung()
        raise _Refused(
            500,
            f"the reward took longer than {max_seconds:g} s and was stopped: send fewer rows at "
            "once (batch=), or start the server with more --max-seconds",
        )

    async def scored(request: Request) -> Response:
        admit(request)
        try:
            waiting.acquire_nowait()
        except anyio.WouldBlock:
            raise _Refused(503, f"{WAITING} requests are here already") from None
        try:
            body = await read(request)
            read_request = partial(_read, body, max_rows, max_side)
            images, asked = await anyio.to_thread.run_sync(read_request)
            async with turn:
                if await request.is_disconnected():
                    raise ClientDisconnect
                answer = await work_on(images, asked)
            return Response(answer, media_type="application/octet-stream")
        finally:
            waiting.release()

    async def about(request: Request) -> Response:
        admit(request)
        return JSONResponse(info)

    async def health(request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, _Refused)
        headers = {"Retry-After": "1"} if error.status == 503 else {}
        return JSONResponse({"error": str(error)}, error.status, headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    return Starlette(
        routes=[
            Route("/", about),
            Route("/health", health),
            Route("/score", scored, methods=["POST"]),
        ],
        exception_handlers={_Refused: refused, ClientDisconnect: gone},
    )


def _host(header: str) -> str:
    """Return the name in a Host header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return header


def _read(body: bytes, max_rows: int, max_side: int) -> tuple[Tensor, dict[str, Any]]:
    """Check a request; return its images (n, 3, h, w) and its other fields."""
    try:
        tensors, metadata = unpack(body)
        asked = json.loads(metadata["request"])
        images, key = tensors["images"], asked["id"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Refused(
            400,
            f"cannot read the request: {type(error).__name__}: {error}; expected a safetensors "
            "file with a tensor 'images' and a JSON text 'request' in its metadata",
        ) from None
    shape = tuple(images.shape)
    if images.dtype not in {torch.float32, torch.float64} or len(shape) != 4 or shape[1] != 3:
        raise _Refused(
            400, f"images must be (n, 3, h, w), float32 or float64, got {images.dtype} {shape}"
        )
    if not 1 <= shape[0] <= max_rows:
        raise _Refused(
            413 if shape[0] else 400, f"a request has 1 to {max_rows} images, this one {shape[0]}"
        )
    if not 1 <= min(shape[2:]) <= max(shape[2:]) <= max_side:
        raise _Refused(413, f"the sides of images must be 1 to {max_side}, got {shape[2:]}")
    for name, kind in {"prompts": str, "metadata": object}.items():
        rows = asked.get(name)
        if rows is not None and not (
            isinstance(rows, list)
            and len(rows) == shape[0]
            and all(isinstance(row, kind) for row in rows)
        ):
            raise _Refused(400, f"{name} must be null or a list of one for each image")
    if not isinstance(key, str) or len(key) > 200 or not key.isprintable():
        raise _Refused(400, "the request's id must be a text of at most 200 letters")
    return images, asked


def _score(reward: Reward, images: Tensor, asked: dict[str, Any]) -> bytes:
    """Score a request's images and return the answer."""
    wanted = bool(asked.get("gradient"))
    if wanted and not reward.differentiable:
        raise _Refused(400, f"the reward {name_of(reward)!r} has no gradient")
    weights = [*reward.parameters()]
    if weights and all(w.dtype != torch.float64 for w in weights):
        images = images.float()
    for own in [*weights, *reward.buffers()][:1]:
        images = images.to(own.device)
    images.requires_grad_(wanted)
    found = {}
    try:
        with differentiating() if wanted else torch.no_grad():
            found["scores"] = score(reward, images, asked.get("prompts"), asked.get("metadata"))
            if wanted:
                (found["gradient"],) = torch.autograd.grad(found["scores"].sum(), images)
    except ValueError as error:
        raise _Refused(422, str(error)) from None
    except Exception as error:
        logging.getLogger(__name__).exception("the reward failed")
        raise _Refused(500, f"the reward failed: {type(error).__name__}: {error}") from None
    for name, rows in found.items():
        wrong = ~torch.isfinite(rows).reshape(len(rows), -1).all(1)
        if wrong.any():
            bad = int(wrong.nonzero()[0])
            raise _Refused(500, f"the reward's {name} of row {bad} of {len(rows)} is not finite")
    found["scores"] = found["scores"].to(torch.promote_types(found["scores"].dtype, torch.float32))
    return pack(found, {"id": asked["id"]})
