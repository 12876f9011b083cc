"""SigLIP's score of picture and prompt, on the published models of transformers."""

import json
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rewards.models.cosine import Cosine
from rewards.models.hub import Source, folder_of
from rewards.models.instances import once, stamp
from rewards.models.preprocess import Preprocess
from rewards.models.towers import Transformers
from rewards.models.weights import pretrained
from steer.reward import unknown

__all__ = ["NEEDS", "OUTPUTS", "SOURCE", "Siglip"]

SOURCE = Source(
    "google/siglip2-base-patch16-224",
    (
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ),
    licence="Apache-2.0",
    size="1.5 GB",
)
"""The default model's weights."""

OUTPUTS = ("cosine", "logit", "probability")
"""Kinds of score."""


NEEDS = (SOURCE,)
"""What the default options need and the package does not contain."""


class Siglip(Cosine):
    """`c = cos(image features, text features)`, in [-1, 1], of SigLIP or SigLIP 2.

    Zhai et al. 2023, arXiv 2303.15343; Tschannen et al. 2025, arXiv 2502.14786. Or the logit
    `e^a c + b` with the a and b of training, in nats, or the probability `sigmoid(e^a c + b)` of
    a pair, in [0, 1]; most pictures have one near 0, where it has hardly a gradient.

    The texts are lower-cased, for SigLIP 1 without punctuation, and padded to the model's length
    (64 tokens), as in training.

    Known hack: as for CLIP, textures that only this network reads, and the prompt's words written
    into the picture; check with a judge of another kind.

    Args:
        model: a folder or hub id org/name of a SigLIP of fixed resolution: config.json,
            preprocessor_config.json, tokenizer.json, tokenizer_config.json, model.safetensors.
            Default: SigLIP 2, ViT-B/16 at 224 pixels.
        output: one of `OUTPUTS`.
        template: the text around a prompt, with "{}" as its placeholder.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an unknown output, a NaFlex model, weights of another layout, or weights that
            cannot be loaded; the message says what to download and where to put it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        output: str = "cosine",
        template: str = "{}",
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        if output not in OUTPUTS:
            raise unknown("output", str(output), OUTPUTS)
        folder = folder_of(model, SOURCE, "siglip")
        execution = {"dtype": dtype, "compile": compile, "checkpoint": checkpoint}
        key = ("siglip", stamp(folder), *execution.values())
        backbone = once(key, lambda: _backbone(folder, execution))
        super().__init__(backbone, template)
        self.output = output
        if output != "cosine":
            self.scale, self.bias = backbone.scale, backbone.bias

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] with one prompt each -> (n,)."""
        scores = super().forward(images, prompts, metadata)
        return scores.sigmoid() if self.output == "probability" else scores


def _backbone(folder: Path, execution: dict[str, Any]) -> Transformers:
    from transformers import SiglipModel

    kind = _read(folder, "config.json").get("model_type")
    if kind != "siglip":
        raise ValueError(
            f"{str(folder)!r} holds a model of type {kind!r}, and 'siglip' takes those of fixed "
            "resolution, of type 'siglip' (SigLIP 2 has them too, as "
            f"{SOURCE.repo}); NaFlex models, of type 'siglip2', are not supported"
        )
    settings = SimpleNamespace(**_read(folder, "preprocessor_config.json"))
    model = pretrained(SiglipModel, folder, "siglip")
    length = model.config.text_config.max_position_embeddings
    return Transformers(
        model, _tokenizer(folder, length), Preprocess.of_processor(settings), **execution
    )


def _tokenizer(folder: Path, length: int) -> Callable[[list[str]], dict[str, Tensor]]:
    """Return a function texts -> ids (n, length); padding is not masked, as in training."""
    from tokenizers import Tokenizer

    settings = _read(folder, "tokenizer_config.json")
    file = _file(folder, "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    pad = settings.get("pad_token", "<pad>")
    pad = pad["content"] if isinstance(pad, dict) else pad
    number = tokenizer.token_to_id(pad)
    if number is None:
        raise ValueError(
            f"{str(file)!r} has no token {pad!r}, and tokenizer_config.json names it for padding: "
            "give the files that the model's page publishes, unchanged"
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=number, pad_token=pad)
    kind = str(settings.get("tokenizer_class", ""))
    first = kind.startswith(("SiglipTokenizer", "T5Tokenizer"))

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        clean = [_canonical(text) if first else text.lower() for text in texts]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(clean)]
        return {"input_ids": torch.tensor(ids)}

    return tokens


def _canonical(text: str) -> str:
    """Lower-case a text, remove punctuation, and put one space between words."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", bare).strip()


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"no {name} in {str(folder)!r}: siglip:model= takes a folder with "
            f"{', '.join(SOURCE.files)}; download them from the model's page"
        )
    return folder / name


def _read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads(_file(folder, name).read_text())
