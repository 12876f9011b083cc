"""One exchange with a server with a deadline for all of it, from name lookup to the last byte.

The timeouts of an HTTP client apply to single operations, so a server that sends a byte now and
then never exceeds them. Here requests run on an event loop, one per process in its own thread, and
a deadline cancels them at any stage.
"""

import asyncio
import os
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

__all__ = ["Exchange", "LateError", "Stage", "run"]

T = TypeVar("T")


class Stage(Enum):
    """How far an exchange got."""

    AWAY = "the server was not reached"
    REACHED = "the server did not take the request"
    TAKEN = "the server had the request"


class LateError(Exception):
    """A deadline passed.

    Attributes:
        stage: how far the exchange had got.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.value)
        self.stage = stage


@dataclass(frozen=True)
class Exchange:
    """A request with its limits.

    Attributes:
        method: GET or POST.
        url: the complete URL.
        body: body of the request, if it has one.
        hand_in: deadline for the server to receive the request, in `time.monotonic` seconds.
        until: deadline for the complete answer.
        size: maximum size of an answer, in bytes.
    """

    method: str
    url: str
    body: bytes | None
    hand_in: float
    until: float
    size: int

    async def answer(self, client: Any) -> tuple[int, Any, bytes]:
        """Return status, headers and body.

        Raises:
            LateError: a deadline passed.
            ValueError: the answer is larger than it may be, or compressed.
            httpx2.HTTPError: any other failure.
        """
        loop, stage = asyncio.get_running_loop(), Stage.AWAY
        offset = loop.time() - time.monotonic()
        headers = {} if self.body is None else {"Content-Type": "application/octet-stream"}

        async def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal stage
            if event.endswith("send_request_headers.started"):
                stage = Stage.REACHED
            elif event.endswith("send_request_body.complete"):
                stage = Stage.TAKEN
                clock.reschedule(self.until + offset)

        try:
            async with (
                asyncio.timeout_at(min(self.hand_in, self.until) + offset) as clock,
                client.stream(
                    self.method, self.url, content=self.body, headers=headers, timeout=None,
                    extensions={"trace": trace},
                ) as answer,
            ):  # fmt: skip
                if answer.headers.get("content-encoding", "identity") != "identity":
                    raise ValueError("it is compressed, which was not requested")
                got = bytearray()
                async for piece in answer.aiter_raw():
                    got += piece
                    if len(got) > self.size:
                        raise ValueError(f"more than {self.size} bytes")
                return answer.status_code, answer.headers, bytes(got)
        except TimeoutError:
            raise LateError(stage) from None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on this process's loop, and return its result."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # interrupted in this thread: also cancel it on the loop
        raise


_lock = threading.Lock()
_running: tuple[int, asyncio.AbstractEventLoop] | None = None


def _loop() -> asyncio.AbstractEventLoop:
    """Return this process's event loop, which runs in a daemon thread."""
    global _running
    with _lock:
        if _running is None or _running[0] != os.getpid():
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
            _running = os.getpid(), loop
        return _running[1]


def _forked() -> None:
    """Use a new lock in a forked process, where the old one would never be released."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
