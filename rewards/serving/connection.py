"""A client's connection to a server of a reward: it asks until it is answered, or time is up."""

import copy
import json
import logging
import os
import time
from typing import Any
from urllib.parse import urlsplit

from rewards.serving.protocol import TOKEN

__all__ = ["BUSY", "Connection"]

BUSY = {429, 502, 503, 504}
"""Statuses after which the client asks again."""


class Connection:
    """A connection to a server: one pool of sockets a process, shared by its threads."""

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        parts = urlsplit(str(url))
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query:
            raise ValueError(f"{url!r} is no server's URL: write it as http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise ValueError(
                f"leave the user and password out of the URL of {parts.hostname}: set the "
                f"environment variable {TOKEN}"
            )
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("the token must be printable ASCII without line breaks")
        self.url, self.timeout, self._token = str(url).rstrip("/"), timeout, token
        self._here = parts.hostname in {"localhost", "127.0.0.1", "::1"}
        self._port = parts.port
        self._pool: tuple[int, Any] | None = None
        self._client()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Connection":
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}

    def _client(self) -> Any:
        """Return this process's pool: connections cannot be shared with a forked one."""
        pool = self._pool
        if pool is None or pool[0] != os.getpid():
            import httpx2

            headers = {"Accept-Encoding": "identity"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            pool = os.getpid(), httpx2.Client(headers=headers, trust_env=not self._here)
            self._pool = pool
        return pool[1]

    def ask(self, method: str, path: str, body: bytes | None, wait: float, size: int) -> bytes:
        """Return the body of the answer, of at most `size` bytes; try for `wait` seconds."""
        import httpx2

        passing = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)
        start, tries = time.monotonic(), 0
        while True:
            tries += 1
            until = min(time.monotonic() + self.timeout, start + wait)
            pause = min(0.1 * 1.6 ** (tries - 1), 2.0)
            try:
                status, headers, answer = self._try(method, path, body, until, size)
            except passing as error:
                why = _said(error)
            else:
                if status not in BUSY:
                    return self._checked(status, answer)
                why = f"status {status}, {_message(answer)}"
                pause = max(pause, _seconds(headers.get("retry-after")))
            left = start + wait - time.monotonic()
            if left <= min(pause, 0.05):
                raise ConnectionError(
                    f"the reward server {self.url} did not answer for {wait:g} s ({tries} tries; "
                    f"the last: {why}). {self._mend()}"
                )
            if tries == 1:
                logging.getLogger(__name__).warning(
                    "the reward server %s does not answer (%s): trying for %.0f s",
                    self.url,
                    why,
                    left,
                )
            time.sleep(min(pause, left))

    def _try(
        self, method: str, path: str, body: bytes | None, until: float, size: int
    ) -> tuple[int, Any, bytes]:
        """Ask once, until a point of time."""
        import httpx2

        timeout = httpx2.Timeout(max(0.01, until - time.monotonic()))
        headers = {} if body is None else {"Content-Type": "application/octet-stream"}
        client, got = self._client(), bytearray()
        with client.stream(
            method, self.url + path, content=body, headers=headers, timeout=timeout
        ) as answer:
            for piece in answer.iter_bytes():
                got += piece
                if time.monotonic() > until:
                    raise httpx2.ReadTimeout("the answer trickles")
                if len(got) > size:
                    raise ValueError(
                        f"the reward server {self.url} gave a bad answer: more than {size} bytes"
                    )
            return answer.status_code, answer.headers, bytes(got)

    def _checked(self, status: int, answer: bytes) -> bytes:
        """Return the answer if it is one, and else raise what the server says."""
        if status in {401, 403}:
            raise PermissionError(
                f"the reward server {self.url} wants a token ({_message(answer)}): set the "
                f"environment variable {TOKEN} to the one it was started with"
            )
        if status != 200:
            raise ValueError(
                f"the reward server {self.url} refused (status {status}): {_message(answer)}"
            )
        return answer

    def _mend(self) -> str:
        port = "" if self._port is None else f" --port {self._port}"
        return (
            f"Start it with `steer serve-reward NAME{port}`, or give more time with wait=SECONDS"
        )


def _said(error: Exception) -> str:
    """Say what went wrong on the way."""
    kind = type(error).__name__
    return f"{kind}: {error}" if str(error) else kind


def _message(answer: bytes) -> str:
    """Return the server's own words, in short."""
    try:
        text = str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = answer.decode("utf-8", "replace")
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text[:500] or "no message"


def _seconds(after: str | None) -> float:
    """Read `Retry-After` in seconds; a date, or nothing, is 0."""
    try:
        return max(0.0, float(after or 0))
    except ValueError:
        return 0.0
