"""A reward behind a URL: pictures are sent to a server, which returns scores and gradients."""

import json
import math
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.gradient import with_gradient
from rewards.serving.connection import Connection, printable
from rewards.serving.protocol import PROTOCOL, pack, unpack
from steer.reward import Reward
from steer.secrets import redacted

__all__ = ["Remote"]

SLACK = 2**20
"""Maximum size of an answer in addition to its numbers, in bytes."""


class Remote(Reward):
    """A reward that a server computes, as `steer serve-reward NAME` does.

    The server says whether the reward is differentiable; if it is, score and gradient come in
    one request, so that a reward in another environment can guide. Images out of range are scored
    as if clamped, the gradient passed straight through. After a connection error or a status 429,
    502, 503 or 504 the request is sent again, at growing intervals, for at most `wait` seconds in
    all. A request that the server is working on is not sent again, so `wait` must be longer than
    the scoring of a batch. Redirections are not followed. The reward may be used by several
    threads, copied, and taken into a forked process.

    Args:
        url: the server, such as http://127.0.0.1:8000.
        token: the server's token, if it needs one. Default: for a server on this machine the
            environment variable FLOWSTEER_REWARD_TOKEN, for any other the entry of ~/.netrc for
            its host under the login flowsteer. Over http it is sent unencrypted.
        batch: maximum number of rows in a request; fewer if the server's limits are lower.
        timeout: time limit in seconds for the server to accept a request.
        wait: time limit in seconds for each request as a whole: connecting, retries with the
            pauses between them, scoring and the answer. It also covers the first request, which
            asks what the server offers. A call that needs several requests allows each of them
            this time.

    Raises:
        ValueError: the URL or an option is invalid; there is no reward server at the URL, or one
            of another version; or it refuses the request or gives a bad answer. The message says
            which.
        PermissionError: the token is missing or wrong.
        ConnectionError: no answer within `wait` seconds; the message says whether the server was
            away, busy, broken or at work.
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
        self._connection = Connection(url, token, float(timeout))
        self.url = self._connection.url
        self._ask_what_it_is()

    def _ask_what_it_is(self) -> None:
        """Ask the server for its name, its limits, and whether it gives gradients."""
        body = self._connection.ask("GET", "/", None, self.wait, SLACK)
        try:
            info = json.loads(body)
            version = info["protocol"]
            self.__name__ = printable(redacted(str(info.get("name") or "remote")), 200)
            self.differentiable = bool(info.get("differentiable"))
            self.max_rows = max(1, int(info.get("max_rows") or self.batch))
            self.max_bytes = int(info.get("max_bytes") or 0) or None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ValueError(
                f"{self.url} answers, but not as a reward server: give the URL that `steer "
                "serve-reward` prints"
            ) from None
        if version != PROTOCOL:
            raise ValueError(
                f"the reward server {self.url} speaks version {version!r} of the protocol, and "
                f"this package uses version {PROTOCOL}: install the same flowsteer on both sides"
            )

    def extra_repr(self) -> str:
        """Return the module's description, without the token."""
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
        """Request the scores of a chunk of the rows, and d scores_i / d images_i."""
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
        answer = self._connection.ask("POST", "/score", body, self.wait, size)
        try:
            return self._read(answer, key, pixels, gradient)
        except ValueError as error:
            raise ValueError(
                f"the reward server {self.url} gave a bad answer for {rows}: {error}"
            ) from None

    def _read(
        self, answer: bytes, key: str, pixels: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Check an answer, and return its scores and gradient."""
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
    """Return images as they are sent: clamped to [0, 1], in float32 or float64."""
    wide = images.detach().clamp(0, 1)
    return wide if wide.dtype == torch.float64 else wide.float()
