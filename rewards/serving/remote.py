"""A reward behind a URL: pictures go to a server, scores and gradients come back.

`steer serve-reward NAME` serves any of ours. A server of one's own needs safetensors and a web
framework, not this package. The protocol, version 1:

`GET /` answers JSON: `{"protocol": 1, "name": "clip", "differentiable": true, "max_bytes":
134217728, "max_rows": 256}`. The limits may be left out.

`POST /score` has a safetensors file as its body: a tensor `images` (n, 3, h, w), float32 or
float64, in [0, 1], and in the file's metadata a text `request`, which is JSON:

- `id`: a text, which the answer repeats;
- `prompts`: n texts, or null;
- `metadata`: n values of JSON, or null;
- `gradient`: whether the client wants the gradient.

The answer (status 200) is a safetensors file too: `scores` (n,), floating and finite; where
`gradient` was true also `gradient` (n, 3, h, w) with row i `d scores_i / d images_i`; and the
metadata `id`. Any other status has a JSON body `{"error": "what is wrong, and the mend"}`. 429,
502, 503 and 504 mean "ask again", after the seconds in the header `Retry-After` if there is one.
Where the server wants a token, the client shows it as `Authorization: Bearer TOKEN`.

Scores are a function of the request alone, so to ask again is safe: no answer is counted twice,
and the id tells a late answer to another request from the one asked for.
"""

import copy
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rewards.gradient import with_gradient
from steer.reward import Reward

__all__ = ["PROTOCOL", "TOKEN", "Remote", "pack", "unpack"]

PROTOCOL = 1
"""The version of the protocol that client and server speak."""

TOKEN = "FLOWSTEER_REWARD_TOKEN"
"""The environment variable that holds the token, for clients and servers."""

BUSY = {429, 502, 503, 504}
"""Statuses after which the client asks again."""

SLACK = 2**20
"""What an answer may have beside its numbers, in bytes."""


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file."""
    from safetensors.torch import save

    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    >>> unpack(pack({"scores": torch.ones(2)}, {"id": "a"}))
    ({'scores': tensor([1., 1.])}, {'id': 'a'})

    Raises:
        ValueError: the body is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"no safetensors file ({error})") from None
    return tensors, header.get("__metadata__") or {}


class Remote(Reward):
    """A reward that a server computes, as `steer serve-reward NAME` does.

    The server says whether the reward is differentiable; if it is, score and gradient come in
    one request, so that a reward in another environment can guide. Images out of range are scored
    as if clamped, the gradient passed straight through. Connection errors, time-outs and the
    statuses 429, 502, 503 and 504 are met by asking again, ever more rarely, for `wait` seconds
    in all. May be used by many threads, copied, and taken into a forked process.

    Args:
        url: the server, as http://127.0.0.1:8000.
        token: what the server asks for, if anything. Default: the environment variable
            FLOWSTEER_REWARD_TOKEN. It travels unencrypted over http.
        batch: how many rows a request has at most; less where the server's limits say so.
        timeout: the seconds one try may take: longer than the scoring of a batch.
        wait: the seconds to keep trying, for each request and at the start.

    Raises:
        ValueError: the URL or an option is none; no reward server answers there, or one of
            another version; it refuses the request or answers wrongly. The message says which.
        PermissionError: the token is missing or wrong.
        ConnectionError: the server stayed down for `wait` seconds.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        batch: int = 16,
        timeout: float = 30.0,
        wait: float = 60.0,
    ) -> None:
        super().__init__()
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be a whole number from 1 on, got {batch!r}")
        for name, value in {"timeout": timeout, "wait": wait}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, got {value!r}")
        self.batch, self.wait = batch, float(wait)
        self._server = _Server(url, token or os.environ.get(TOKEN) or None, float(timeout))
        self.url = self._server.url
        self._ask_what_it_is()

    def _ask_what_it_is(self) -> None:
        """Take the name, the limits and the promise of a gradient from the server."""
        body = self._server.ask("GET", "/", None, self.wait, SLACK)
        try:
            info = json.loads(body)
            version = info["protocol"]
            self.__name__ = str(info.get("name") or "remote")
            self.differentiable = bool(info.get("differentiable"))
            self.max_rows = max(1, int(info.get("max_rows") or self.batch))
            self.max_bytes = int(info.get("max_bytes") or 0) or None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{self.url} answers, but not as a reward server: give the URL that `steer "
                "serve-reward` prints"
            ) from None
        if version != PROTOCOL:
            raise ValueError(
                f"the reward server {self.url} speaks version {version!r} of the protocol, and "
                f"this package {PROTOCOL}: install the same flowsteer on both sides"
            )

    def extra_repr(self) -> str:
        """Return what the module prints of itself: never the token."""
        return f"{self.__name__} at {self.url}, differentiable={self.differentiable}"

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] -> (n,), float32 or wider, on the images' device."""
        for name, rows in {"prompts": prompts, "metadata": metadata}.items():
            if rows is not None and (isinstance(rows, str) or len(rows) != len(images)):
                raise ValueError(f"{name} must be a list of one for each of {len(images)} images")

        if not len(images):
            return _pixels(images).new_zeros(0)

        def score(pixels: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
            size = self._rows(pixels)
            starts = range(0, len(pixels), size)
            answers = [
                self._score(pixels, slice(i, i + size), prompts, metadata, gradient)
                for i in starts
            ]
            scores, gradients = zip(*answers, strict=True)
            return torch.cat(scores), torch.cat(gradients) if gradient else None

        if self.differentiable and torch.is_grad_enabled() and images.requires_grad:
            scores, gradient = score(_pixels(images), True)
            assert gradient is not None
            return with_gradient(images, scores, gradient)
        return score(_pixels(images), False)[0]

    def _rows(self, pixels: Tensor) -> int:
        """Return how many rows fit into one request."""
        size = min(self.batch, self.max_rows)
        if self.max_bytes is not None:
            row = pixels[0].numel() * pixels.element_size()
            size = min(size, max(1, (self.max_bytes - min(SLACK, self.max_bytes // 16)) // row))
        return size

    def _score(
        self,
        pixels: Tensor,
        chunk: slice,
        prompts: Sequence[str] | None,
        metadata: Sequence[Any] | None,
        gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Ask for the scores of a chunk of the rows, and for d scores_i / d images_i."""
        rows, key = f"rows from {chunk.start} of {len(pixels)}", uuid.uuid4().hex
        pixels = pixels[chunk]
        asked = {
            "id": key,
            "prompts": None if prompts is None else list(prompts[chunk]),
            "metadata": None if metadata is None else list(metadata[chunk]),
            "gradient": gradient,
        }
        try:
            request = json.dumps(asked, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"prompts and metadata for the reward server {self.url} must be JSON: {error}"
            ) from None
        body = pack({"images": pixels}, {"request": request})
        size = (pixels.numel() * gradient + len(pixels)) * 8 + SLACK
        answer = self._server.ask("POST", "/score", body, self.wait, size)
        try:
            return self._read(answer, key, pixels, gradient)
        except ValueError as error:
            raise ValueError(
                f"the reward server {self.url} gave a bad answer for {rows}: {error}"
            ) from None

    def _read(
        self, answer: bytes, key: str, pixels: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Check an answer and take the scores and the gradient out of it."""
        tensors, said = unpack(answer)
        if said.get("id") != key:
            raise ValueError(f"it is for the request {said.get('id')!r}, not for {key!r}")
        shapes = {"scores": pixels.shape[:1]} | ({"gradient": pixels.shape} if gradient else {})
        for name, shape in shapes.items():
            found = tensors.get(name)
            if found is None or found.shape != shape or not found.is_floating_point():
                what = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise ValueError(f"expected floating {name} {tuple(shape)}, got {what}")
            if not torch.isfinite(found).all():
                raise ValueError(f"{name} are not all finite")
        wide = torch.promote_types(tensors["scores"].dtype, torch.float32)
        return (
            tensors["scores"].to(pixels.device, wide),
            tensors["gradient"].to(pixels) if gradient else None,
        )


def _pixels(images: Tensor) -> Tensor:
    """Return what is sent of images: clamped to [0, 1], float32 or float64."""
    wide = images.detach().clamp(0, 1)
    return wide if wide.dtype == torch.float64 else wide.float()


class _Server:
    """The connections to a server: one pool a process, shared by its threads."""

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

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Server":
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
                reason = _reason(error)
            else:
                if status not in BUSY:
                    return self._checked(status, answer)
                reason = f"status {status}, {_message(answer)}"
                pause = max(pause, _seconds(headers.get("retry-after")))
            left = start + wait - time.monotonic()
            if left <= min(pause, 0.05):
                raise ConnectionError(
                    f"the reward server {self.url} did not answer for {wait:g} s ({tries} tries; "
                    f"the last: {reason}). {self._mend()}"
                )
            if tries == 1:
                logging.getLogger(__name__).warning(
                    "the reward server %s does not answer (%s): trying for %.0f s",
                    self.url,
                    reason,
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


def _reason(error: Exception) -> str:
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
