"""A client's connection to a reward server: it retries until it gets an answer or time is up."""

import copy
import json
import logging
import os
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from rewards.serving.exchange import Exchange, LateError, Stage, run
from rewards.serving.tokens import is_loopback, line_for, token_for
from steer.secrets import HIDDEN, redacted

__all__ = ["BUSY", "Connection", "printable"]

BUSY = {429, 502, 503, 504}
"""Statuses after which the client retries."""

DOWN, BROKEN = "no server can be reached", "the connection ended without an answer"
STUCK, HELD = "it does not take the request", "it has the request and is still working"
LATE = {
    Stage.AWAY: (DOWN, "ConnectTimeout"),
    Stage.REACHED: (STUCK, "WriteTimeout"),
    Stage.TAKEN: (HELD, "ReadTimeout"),
}
"""Stage of an exchange at its deadline -> what the server did, and the usual name of the error."""


class Connection:
    """A connection to a server: one pool of sockets per process, shared by its threads.

    Args:
        url: the server's URL.
        token: the token that is sent. Default: the one that belongs to its host.
        timeout: time limit in seconds for a server to accept a request.

    Raises:
        ValueError: an invalid URL, or a token that cannot be sent.
    """

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        self.host, self.port = _place(str(url))
        token = token_for(self.host, self.port) if token in (None, "", HIDDEN) else token
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("the token must be printable ASCII without line breaks")
        self.url, self.timeout, self._token = str(url).rstrip("/"), timeout, token
        self._pool: tuple[int, Any] | None = None
        self._client()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Connection":
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}

    def _client(self) -> Any:
        """Return this process's pool: a forked process cannot share connections."""
        pool = self._pool
        if pool is None or pool[0] != os.getpid():
            import httpx2

            headers = {"Accept-Encoding": "identity"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            client = httpx2.AsyncClient(
                headers=headers, trust_env=not is_loopback(self.host), follow_redirects=False
            )
            pool = self._pool = os.getpid(), client
        return pool[1]

    def ask(self, method: str, path: str, body: bytes | None, wait: float, size: int) -> bytes:
        """Return the body of the answer, of at most `size` bytes, within `wait` seconds in all.

        A request is not sent again while the server is working on it.

        Raises:
            ConnectionError: time is up; the message says what the server did.
            PermissionError: the server needs a token.
            ValueError: the server refuses the request, gives a bad answer, or uses another
                protocol.
        """
        import httpx2

        start, tries, what, why = time.monotonic(), 0, "", ""
        while True:
            tries += 1
            now = time.monotonic()
            one = Exchange(method, self.url + path, body, now + self.timeout, start + wait, size)
            pause = min(0.1 * 1.6 ** (tries - 1), 2.0)
            try:
                status, headers, answer = run(one.answer(self._client()))
            except LateError as error:
                if not what or start + wait - now > wait / 2:  # else keep the earlier reason
                    what, why = LATE[error.stage]
            except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                self._refuse_tls(error)
                what, why = (
                    (DOWN if isinstance(error, httpx2.ConnectError) else BROKEN),
                    _said(error),
                )
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise ValueError(f"cannot reach the server {self.url}: {_said(error)}") from error
            except ValueError as error:
                raise ValueError(
                    f"the reward server {self.url} gave a bad answer: {error}"
                ) from None
            else:
                if status not in BUSY:
                    return self._checked(status, headers, answer)
                what, why = f"it answers with status {status}", _message(answer)
                pause = max(pause, _seconds(headers.get("retry-after")))
            left = start + wait - time.monotonic()
            if left <= min(pause, 0.05) or what == HELD:
                raise ConnectionError(self._too_late(wait, tries, what, why))
            if tries == 1:
                logging.getLogger(__name__).warning(
                    "the reward server %s does not answer (%s): retrying for %.0f s",
                    self.url,
                    f"{what}: {why}",
                    left,
                )
            time.sleep(min(pause, left))

    def _checked(self, status: int, headers: Any, answer: bytes) -> bytes:
        """Return the answer of a successful request; else raise the server's message."""
        if status in {401, 403}:
            raise PermissionError(
                f"the reward server {self.url} needs a token, or another one "
                f"({_message(answer)}): {line_for(self.host, self.port)}"
            )
        if 300 <= status < 400:
            place = printable(redacted(str(headers.get("location"))), 200)
            raise ValueError(
                f"{self.url} redirects to {place!r} (status {status}), and redirections are not "
                "followed: give that URL itself if you trust it"
            )
        if status != 200:
            raise ValueError(
                f"the reward server {self.url} refused (status {status}): {_message(answer)}"
            )
        return answer

    def _refuse_tls(self, error: BaseException) -> None:
        """Raise a ValueError if encryption failed, because a retry would not help."""
        for one in _chain(error):
            if isinstance(one, ssl.SSLError):
                raise ValueError(
                    f"{self.url} cannot be reached by https ({one.reason or one}): give http:// "
                    "for a server without it, or trust its certificate (SSL_CERT_FILE)"
                ) from error

    def _too_late(self, wait: float, tries: int, what: str, why: str) -> str:
        """Return a message on what the server was doing when time ran out, and how to fix it."""
        mend = f"Start it with `steer serve-reward NAME --port {self.port}`"
        if what == HELD:
            mend = (
                "Its reward is slow, or does not respond: send fewer rows at once with batch=ROWS"
            )
        elif what == STUCK:
            mend = "It does not respond, or the network is slow"
        elif what == BROKEN:
            mend = "Read its own messages: it may lack memory, or not be an HTTP server"
        elif what != DOWN:
            mend = "It is busy: start it with more --workers"
        count = "1 try" if tries == 1 else f"{tries} tries"
        return (
            f"the reward server {self.url} did not answer for {wait:g} s: {what} ({count}; the "
            f"last: {why}). {mend}, or give more time with wait=SECONDS"
        )


def _place(url: str) -> tuple[str, int]:
    """Return the host and the port of a server's URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(
            f"{redacted(url)!r} is not the URL of a server ({error}): write it as "
            "http://127.0.0.1:8000"
        ) from None
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"leave the user and password out of the URL of {parts.hostname}: "
            f"{line_for(str(parts.hostname), port or 80)}"
        )
    if (
        parts.scheme not in {"http", "https"}
        or not parts.hostname
        or parts.query
        or parts.fragment
        or not plain
    ):
        raise ValueError(
            f"{redacted(url)!r} is not the URL of a server: write it as http://127.0.0.1:8000"
        )
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    for _ in range(20):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _said(error: Exception) -> str:
    """Return the kind and the message of a connection error."""
    kind = type(error).__name__
    return f"{kind}: {printable(str(error), 300)}" if str(error) else kind


def printable(text: str, length: int) -> str:
    """Return an untrusted text on one line, shortened and without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:length]


def _message(answer: bytes) -> str:
    """Return the server's error message, shortened."""
    try:
        text = str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = answer[:2000].decode("utf-8", "replace")
    return printable(redacted(text[:2000]), 500) or "no message"


def _seconds(after: str | None) -> float:
    """Parse `Retry-After` in seconds; a date or a missing header gives 0."""
    try:
        return max(0.0, float(after or 0))
    except ValueError:
        return 0.0
