"""MPS: human preference for a picture, given a prompt and a criterion, by a CLIP."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rewards.models.crossed import ClipWithCrossAttention, Crossed
from rewards.models.hub import Source, home, state
from rewards.models.instances import once, stamp
from rewards.models.preprocess import Preprocess
from rewards.models.prompts import one_each
from rewards.models.weights import count, fill
from steer.reward import Reward

__all__ = ["CONDITION", "FILE", "MPS", "NEEDS"]

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of overall preference."""

PAGE = "https://github.com/Kwai-Kolors/MPS"
FILE = "Kwai-Kolors/MPS/mps.safetensors"
ENDED = 49407
"""The token that ends a text, and pads it."""


NEEDS = (Source("Kwai-Kolors/MPS", ("mps.safetensors",), size="about 4 GB", page=PAGE),)
"""What the default options need and the package does not contain."""


class MPS(Reward):
    """`e^a cos(image's state, text features)`, in [-e^a, e^a] with `e^a` about 100.

    Zhang et al. 2024, arXiv 2405.14705. Layers of cross-attention let the picture's tokens read
    those of the prompt's tokens that the condition is about (similarity above a share of the
    largest); the state of the class token is compared with the prompt. Scores compare pictures of
    one prompt; a point is a nat of preference between two.

    Known hack: as for other tuned CLIPs, glossy detail for any prompt. Only what the condition
    names is judged; everything else is unconstrained.

    Args:
        model: the checkpoint's weights, .safetensors or a .pth of tensors alone, or the folder
            that holds mps.safetensors: `model.*` in the layout of transformers' CLIPModel, and
            `cross_model.layers.*`. Sizes are read from it; heads from config.json beside it
            (transformers' CLIPConfig), 16 where there is none, as ViT-H/14 has. The authors
            publish a pickled module, which is not opened here; the error says how to convert it.
        condition: what is judged. Default: everything.
        threshold: the share of the largest similarity above which a token is read: 0.3 in the
            authors' evaluation.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file; the message says where to get it and how to convert it.
        ValueError: weights of another layout.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        condition: str = CONDITION,
        threshold: float = 0.3,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        place = home() / FILE if model is None else Path(model)
        file = place / "mps.safetensors" if place.is_dir() else place
        if not file.is_file():
            raise FileNotFoundError(
                f"no weights of 'mps' at {str(file)!r}. {_how()} and put them there, or give "
                "their location: mps:model=FILE"
            )
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}")
        config = file.with_name("config.json")
        execution = {"dtype": dtype, "compile": compile, "checkpoint": checkpoint}
        stamps = [stamp(path) for path in (file, config) if path.is_file()]
        key = ("mps", *stamps, *execution.values())
        self.backbone = once(key, lambda: _backbone(file, config, execution))
        self.condition, self.threshold = condition, float(threshold)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] with one prompt each -> (n,)."""
        prompts = one_each(images, prompts, "the reward 'mps'")
        patches = self.backbone.image_features(images)
        texts = self.backbone.text_features([self.condition, *prompts])
        condition, tokens, ends = texts[0, :-1], texts[1:, :-1], texts[1:, -1]
        similarity = (tokens @ condition.T).amax(-1)
        read = similarity / similarity.amax(-1, keepdim=True) > self.threshold
        state = self.backbone.crossed(patches, tokens, read)
        scores = self.backbone.scale * F.cosine_similarity(state, ends, dim=-1)
        return scores.to(images.device)


def _how() -> str:
    return (
        f"Download MPS_overall_checkpoint.pth as {PAGE} says, and convert it in an environment "
        "where its code runs: python -c 'import torch; "
        'm = torch.load("MPS_overall_checkpoint.pth", map_location="cpu", weights_only=False); '
        "from safetensors.torch import save_file; "
        "save_file({k: v.float().contiguous() for k, v in m.state_dict().items()}, "
        '"mps.safetensors")\' (this runs what the file says: only for a file that you trust)'
    )


def _backbone(file: Path, config: Path, execution: dict[str, Any]) -> Crossed:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    try:
        found = state(file, "mps", "model")
    except ValueError as error:
        raise ValueError(f"{error}. {_how()}") from error
    constants = (".position_ids", ".inv_freq")
    weights = {k: v for k, v in found.items() if not k.endswith(constants)}
    if "cross_model.layers.0.0.fn.to_kv.weight" not in weights:
        raise ValueError(
            f"{str(file)!r} is not the checkpoint of MPS (its first keys are "
            f"{', '.join(list(weights)[:3]) or 'none'}): it must hold model.* and "
            f"cross_model.layers.*. {_how()}"
        )
    kv, q = (weights[f"cross_model.layers.0.0.fn.to_{x}.weight"] for x in ("kv", "q"))
    head = len(kv) // 2
    layers = count(weights, "cross_model.layers.")
    try:
        clip = _clip(weights, json.loads(config.read_text()) if config.is_file() else {})
    except KeyError as error:
        raise ValueError(
            f"{str(file)!r} lacks the weights {error} of MPS: convert the checkpoint again"
        ) from error
    model = ClipWithCrossAttention(clip, kv.shape[1], layers, len(q) // head, head)
    fill(model, weights, file, "mps")
    encode = SimpleTokenizer(context_length=clip.config.text_config.max_position_embeddings)

    def tokens(texts: list[str]) -> Tensor:
        ids = encode(texts)
        over = (ids == ENDED).cumsum(1) > 0
        return ids.masked_fill(over, ENDED)

    size = clip.config.vision_config.image_size
    preprocess = Preprocess(size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return Crossed(model, tokens, preprocess, **execution)


def _clip(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
    """Return a CLIP of transformers with the sizes of the weights."""
    from transformers import CLIPConfig, CLIPModel

    given = {side: settings.get(f"{side}_config") or {} for side in ("vision", "text")}
    seen, read = (f"model.{side}_model." for side in ("vision", "text"))
    patch = weights[f"{seen}embeddings.patch_embedding.weight"]
    places = len(weights[f"{seen}embeddings.position_embedding.weight"])
    words, _ = weights[f"{read}embeddings.token_embedding.weight"].shape
    sides = {
        side: {
            "hidden_size": weights[f"{start}embeddings.position_embedding.weight"].shape[1],
            "intermediate_size": len(weights[f"{start}encoder.layers.0.mlp.fc1.weight"]),
            "num_hidden_layers": count(weights, f"{start}encoder.layers."),
            "num_attention_heads": given[side].get("num_attention_heads", 16),
            "hidden_act": given[side].get("hidden_act", "gelu"),
        }
        for side, start in (("vision", seen), ("text", read))
    }
    sides["vision"] |= {
        "patch_size": patch.shape[-1],
        "image_size": round((places - 1) ** 0.5) * patch.shape[-1],
    }
    sides["text"] |= {
        "vocab_size": words,
        "max_position_embeddings": len(weights[f"{read}embeddings.position_embedding.weight"]),
        "bos_token_id": ENDED - 1,
        "eos_token_id": ENDED,
        "pad_token_id": ENDED,
    }
    width = len(weights["model.visual_projection.weight"])
    config = CLIPConfig(
        text_config=sides["text"], vision_config=sides["vision"], projection_dim=width
    )
    return CLIPModel(config)
