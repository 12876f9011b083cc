"""ImageReward: how people rate a picture for a prompt, by BLIP on picture and text together."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.models.backbone import Backbone
from rewards.models.hub import Source, folder_of, state
from rewards.models.instances import once, stamp
from rewards.models.preprocess import Preprocess
from rewards.models.prompts import one_each
from rewards.models.weights import collapsed, count, fill
from steer.reward import Reward

__all__ = ["MEAN", "NEEDS", "SOURCE", "STD", "TOKENS", "Blip", "ImageReward"]

SOURCE = Source(
    "zai-org/ImageReward", ("ImageReward.pt", "med_config.json"), "Apache-2.0", "1.8 GB"
)
"""The published weights."""

TOKENS = Source("google-bert/bert-base-uncased", ("vocab.txt",), "Apache-2.0", "0.2 MB")
"""The vocabulary of its text encoder."""

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""The authors' standardisation of the head's output."""

LENGTH = 35
"""Tokens of a prompt, with the first and the last; shorter ones are padded, longer ones cut."""

HEAD = 64
"""Width of an attention head, in BLIP's ViT-B and ViT-L and in BERT-base."""


NEEDS = (SOURCE, TOKENS)
"""What the default options need and the package does not contain."""


class ImageReward(Reward):
    """`(w . h + b - mean) / std` of the first token's state h, about -2.5 to 2.5.

    Xu et al. 2023, arXiv 2304.05977. A ViT-L/16 reads the picture, a BERT with cross-attention to
    all of its patches reads the prompt; the head is a chain of linear layers without a
    nonlinearity, collapsed to w, b. The score is standardised: about mean 0, standard deviation 1
    on the authors' data.

    Known hack: over-detailed, high-contrast pictures that repeat the prompt's objects, and finally
    corrupted ones. This is common if it is the only reward that is tuned for.

    Args:
        model: ImageReward.pt, or a folder that holds it and, where the text encoder's heads are
            not 64 wide, med_config.json. The checkpoint has the keys `blip.visual_encoder.*`,
            `blip.text_encoder.*` and `mlp.layers.*`; sizes are read from it.
        tokenizer: vocab.txt of BERT's uncased words, or the folder that holds it.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights of another layout, or files that cannot be loaded: the message says
            what to download and where to put it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        tokenizer: str | Path | None = None,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        place = folder_of(model, SOURCE, "imagereward")
        words = folder_of(tokenizer, TOKENS, "imagereward", "tokenizer")
        file, config = _in(place, "ImageReward.pt"), place / "med_config.json"
        if not place.is_dir():
            config = place.with_name("med_config.json")
        vocabulary = _in(words, "vocab.txt", "tokenizer")
        execution = {"dtype": dtype, "compile": compile, "checkpoint": checkpoint}
        stamps = [stamp(path) for path in (file, config, vocabulary) if path.is_file()]
        key = ("imagereward", *stamps, *execution.values())
        self.backbone = once(key, lambda: _backbone(file, config, vocabulary, execution))

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] with one prompt each -> (n,)."""
        prompts = one_each(images, prompts, "the reward 'imagereward'")
        patches = self.backbone.image_features(images)
        return ((self.backbone.judge(patches, prompts) - MEAN) / STD).to(images.device)


class Blip(Backbone):
    """BLIP's encoders with the head: image patches, and a text encoder that attends to them.

    Args:
        model: holds `vision`, `text` and `head`.
        tokenizer: texts -> (ids, mask), both (n, length).
        preprocess: from pictures in [0, 1] to the encoder's input.
        **execution: see `Backbone`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], tuple[Tensor, Tensor]],
        preprocess: Preprocess,
        **execution: Any,
    ) -> None:
        super().__init__(model, preprocess, **execution)
        self.tokenizer = tokenizer

    @property
    def tower(self) -> nn.Module:
        """The part of the model that sees pictures."""
        return self.model.vision  # type: ignore[return-value]

    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures -> states of the class token and the patches (n, p, d)."""
        return self.model.vision(pixel_values=x).last_hidden_state  # type: ignore[operator]

    def judge(self, patches: Tensor, texts: Sequence[str]) -> Tensor:
        """Encode each text with its picture's patches (n, p, d); return the head's output, (n,).

        The head works in the dtype of the patches.
        """
        self.tell_cut(texts)
        found = self.tokenizer(list(texts))
        ids, mask = (t.to(self.device, non_blocking=True) for t in found)
        with torch.autocast(self.device.type, enabled=False):
            states = self.model.text(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=patches.to(self.dtype),
            ).last_hidden_state
            first = states[:, 0].to(patches.dtype)
            head: Any = self.model.head
            return first @ head.weight[0].to(first) + head.bias[0].to(first)


def _backbone(file: Path, config: Path, vocabulary: Path, execution: dict[str, Any]) -> Blip:
    from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    weights = state(file, "imagereward", "model")
    if "mlp.layers.0.weight" not in weights or "blip.visual_encoder.pos_embed" not in weights:
        raise ValueError(
            f"{str(file)!r} is not ImageReward's checkpoint (its first keys are "
            f"{', '.join(list(weights)[:3]) or 'none'}): it must hold blip.visual_encoder.*, "
            f"blip.text_encoder.* and mlp.layers.*; download {SOURCE.files[0]} from {SOURCE.page}"
        )
    seen = {
        _renamed(key): value
        for key, value in _under(weights, "blip.visual_encoder.").items()
        if not key.endswith("position_ids")
    }
    read = {
        key: value
        for key, value in _under(weights, "blip.text_encoder.").items()
        if not key.endswith("position_ids")
    }
    settings = json.loads(config.read_text()) if config.is_file() else {}
    model = nn.Module()
    try:
        model.vision = _vision(seen)
        model.text = _text(read, settings)
    except KeyError as error:
        raise ValueError(
            f"{str(file)!r} lacks the weights {error} of ImageReward's checkpoint: download "
            f"{SOURCE.files[0]} from {SOURCE.page} again"
        ) from error
    fill(model.vision, seen, file, "imagereward")
    fill(model.text, read, file, "imagereward")
    weight, bias = collapsed(weights, "mlp.layers.")
    model.head = nn.Linear(weight.shape[1], len(weight))
    fill(model.head, {"weight": weight.float(), "bias": bias.float()}, file, "imagereward")
    size = model.vision.config.image_size
    preprocess = Preprocess(size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return Blip(model, _tokenizer(vocabulary), preprocess, **execution)


def _vision(weights: Mapping[str, Tensor]) -> nn.Module:
    """Return an image encoder of the sizes that the weights have."""
    from transformers import BlipVisionConfig, BlipVisionModel

    _, places, width = weights["embeddings.position_embedding"].shape
    patch = weights["embeddings.patch_embedding.weight"].shape[-1]
    return BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=count(weights, "encoder.layers."),
            num_attention_heads=max(1, width // HEAD),
            image_size=round((places - 1) ** 0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )


def _text(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
    """Return a text encoder with cross-attention, of the sizes that the weights have."""
    from transformers import BlipTextConfig, BlipTextModel

    words, width = weights["embeddings.word_embeddings.weight"].shape
    seen = weights["encoder.layer.0.crossattention.self.key.weight"].shape[1]
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=seen,
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=count(weights, "encoder.layer."),
        num_attention_heads=settings.get("num_attention_heads", max(1, width // HEAD)),
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        hidden_act=settings.get("hidden_act", "gelu"),
        layer_norm_eps=settings.get("layer_norm_eps", 1e-12),
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    return BlipTextModel(config, add_pooling_layer=False)


def _renamed(key: str) -> str:
    """Return transformers' name for a weight of BLIP's image encoder."""
    for old, new in (
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj.", "embeddings.patch_embedding."),
        ("norm.", "post_layernorm."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    key = key.replace("blocks.", "encoder.layers.", 1)
    for old, new in (
        (".norm", ".layer_norm"),
        (".attn.proj.", ".self_attn.projection."),
        (".attn.qkv.", ".self_attn.qkv."),
    ):
        key = key.replace(old, new, 1)
    return key


def _under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _tokenizer(vocabulary: Path) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
    tokenizer.enable_truncation(LENGTH)
    pad = tokenizer.token_to_id("[PAD]")
    tokenizer.enable_padding(length=LENGTH, pad_id=pad)

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer.encode_batch(texts)
        ids, masks = [e.ids for e in found], [e.attention_mask for e in found]
        return torch.tensor(ids), torch.tensor(masks)

    return tokens


def _in(place: Path, name: str, option: str = "model") -> Path:
    """Return a file that was given by its path or by its folder."""
    file = place / name if place.is_dir() else place
    if not file.is_file():
        raise FileNotFoundError(
            f"no {name} in {str(place)!r}: imagereward:{option}= takes that file or the folder "
            "that holds it"
        )
    return file
