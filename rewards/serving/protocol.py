"""The protocol between a reward server and its clients, version 1, and the files they exchange.

`steer serve-reward NAME` serves any reward of this package. Your own server needs safetensors and
a web framework, but not this package.

`GET /` returns JSON: `{"protocol": 1, "name": "clip", "differentiable": true, "max_bytes":
134217728, "max_rows": 256}`. The limits may be left out.

`POST /score` has a safetensors file as its body: a tensor `images` (n, 3, h, w), float32 or
float64, in [0, 1], and a JSON text `request` in the file's metadata:

- `id`: a text, which the answer repeats;
- `prompts`: n texts, or null;
- `metadata`: n values of JSON, or null;
- `gradient`: whether the client wants the gradient.

The answer (status 200) is a safetensors file too: `scores` (n,), floating and finite; where
`gradient` was true also `gradient` (n, 3, h, w) with row i `d scores_i / d images_i`; and the
metadata `id`. Any other status has a JSON body `{"error": "what is wrong, and how to fix it"}`.
429, 502, 503 and 504 mean "retry", after the seconds in the header `Retry-After` if there is one.
If the server needs a token, the client sends it as `Authorization: Bearer TOKEN`.

Scores depend only on the request, so a retry is safe: no answer is counted twice, and the id
identifies a late answer to another request.
"""

import json

from torch import Tensor

from rewards.serving.tokens import TOKEN

__all__ = ["HEADER", "PROTOCOL", "TENSORS", "TOKEN", "pack", "unpack"]

PROTOCOL = 1
"""The version of the protocol."""

HEADER = 4 * 2**20
"""Maximum size of a file's header in bytes, which holds prompts and metadata."""

TENSORS = 8
"""Maximum number of tensors in a file; two are needed."""


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file."""
    from safetensors.torch import save

    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    >>> import torch
    >>> unpack(pack({"scores": torch.ones(2)}, {"id": "a"}))
    ({'scores': tensor([1., 1.])}, {'id': 'a'})

    Raises:
        ValueError: the body is not such a file, or has a larger header or more tensors than any
            request needs.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    size = int.from_bytes(body[:8], "little")
    if size > HEADER:
        raise ValueError(
            f"not a safetensors file with a header of at most {HEADER} bytes, but {size}: send "
            "fewer rows, or shorter prompts and metadata"
        )
    try:
        header = json.loads(body[8 : 8 + size])
        metadata = header.pop("__metadata__", None) or {}
        if len(header) > TENSORS:
            raise ValueError(f"it has {len(header)} tensors, more than the limit of {TENSORS}")
        tensors = load(body)
    except (SafetensorError, AttributeError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"not a safetensors file ({error})") from None
    return tensors, metadata
