"""MPS: how people prefer a picture for a prompt under a condition, by a CLIP that asks for it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.backbone import Backbone, fill, once, stamp
from rewards.models.hub import Source, home, state
from rewards.models.preprocess import Preprocess
from rewards.models.prompts import one_each
from steer.reward import Reward

__all__ = ["CONDITION", "MPS", "NEEDS", "Crossed"]

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of overall preference."""

PAGE = "https://github.com/Kwai-Kolors/MPS"
FILE = "Kwai-Kolors/MPS/mps.safetensors"
ENDED = 49407
"""The token that ends a text, and fills it up."""


NEEDS = (Source("Kwai-Kolors/MPS", ("mps.safetensors",), size="about 4 GB", page=PAGE),)
"""What the default options need that does not come along."""


class MPS(Reward):
    """`e^a cos(image's state, text features)`, in [-e^a, e^a] with `e^a` about 100.

    Zhang et al. 2024, arXiv 2405.14705. Layers of cross-attention let the picture's tokens read
    those of the prompt's tokens that the condition is about (similarity above a share of the
    largest); the state of the class token is compared with the prompt. Scores compare pictures of
    one prompt; a point is a nat of preference between two.

    Known hack: as for other tuned CLIPs, glossy detail whatever the prompt; the condition names
    what is judged, and what it does not name is free.

    Args:
        model: the checkpoint's weights, .safetensors or a .pth of tensors alone, or the folder
            that holds mps.safetensors: `model.*` in the layout of transformers' CLIPModel, and
            `cross_model.layers.*`. Sizes are read from it; heads from config.json beside it
            (transformers' CLIPConfig), 16 where there is none, as ViT-H/14 has. The authors
            publish a pickled module, which is not opened here; the error says how to convert it.
        condition: what is judged. Default: everything.
        threshold: the share of the largest similarity above which a token is read: 0.3 in the
            authors' evaluation.
        dtype: of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file; says where to get it and how to convert it.
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
                f"no weights of 'mps' at {str(file)!r}. {_how()} and put them there, or say where "
                "they are: mps:model=FILE"
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


class Crossed(Backbone):
    """A CLIP whose tokens are all projected, with layers of cross-attention on them.

    Args:
        model: a module with `model` and `cross_model`.
        tokenizer: texts -> ids (n, length).
        preprocess: from pictures in [0, 1] to `pixel_values`.
        **execution: see `Backbone`.
    """

    texts = 256

    def __init__(
        self, model: "_Model", tokenizer: Any, preprocess: Preprocess, **execution: Any
    ) -> None:
        scale = float(model.model.logit_scale.detach().double().exp())
        super().__init__(model, preprocess, **execution)
        self.tokenizer, self.scale = tokenizer, scale

    @property
    def tower(self) -> nn.Module:
        """The part of the model that sees pictures."""
        return self.model.model.vision_model  # type: ignore[union-attr, return-value]

    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures -> projected tokens, the class token first (n, p, d)."""
        clip: Any = self.model.model
        return clip.visual_projection(clip.vision_model(pixel_values=x).last_hidden_state)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> projected tokens, and the text's own feature last (n, length + 1, d)."""
        ids = self.tokenizer(list(texts)).to(self.device)
        clip: Any = self.model.model
        out = clip.text_model(input_ids=ids)
        states = torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1)
        return clip.text_projection(states)

    def crossed(self, patches: Tensor, tokens: Tensor, read: Tensor) -> Tensor:
        """Let patches (n, p, d) read the tokens (n, l, d) that `read` (n, l) marks.

        Returns:
            the class token's state (n, d), in the dtype of the patches.
        """
        with torch.autocast(self.device.type, enabled=False):
            x, context = patches.to(self.dtype), tokens.to(self.dtype)
            x = self.model.cross_model(x, context, read)  # type: ignore[operator]
        return x[:, 0].to(patches.dtype)


class _Model(nn.Module):
    """The checkpoint's module: a CLIP of transformers, and the layers on it."""

    def __init__(self, clip: nn.Module, width: int, layers: int, heads: int, head: int) -> None:
        super().__init__()
        self.model = clip
        self.cross_model = _CrossModel(width, layers, heads, head)


class _CrossModel(nn.Module):
    """Layers of cross-attention and self-attention in turn."""

    def __init__(self, width: int, layers: int, heads: int, head: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _residual(_CrossLayer(width, heads, head)),
                    _residual(_SelfLayer(width, heads, head)),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor, context: Tensor, read: Tensor) -> Tensor:
        for cross, own in self.layers:  # type: ignore[misc]
            x = x + cross.fn(x, context, read)
            x = x + own.fn(x)
        return x


def _residual(layer: nn.Module) -> nn.Module:
    """Return a module that holds a layer by the name that the checkpoint has for it."""
    holder = nn.Module()
    holder.fn = layer
    return holder


class _Norm(nn.Module):
    """A layer norm whose bias is a constant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)  # type: ignore[arg-type]


class _Gated(nn.Module):
    """`a * silu(g)` of the halves (a, g) (Shazeer 2020, arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        a, g = x.chunk(2, -1)
        return a * F.silu(g)


class _CrossLayer(nn.Module):
    """Attention to another sequence, one head of keys for all of the queries, beside an MLP.

    The heads' keys and values are shared (Shazeer 2019, arXiv 1911.02150).
    """

    def __init__(self, width: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _Norm(width)
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 8 * width, bias=False),
            _Gated(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor, context: Tensor, read: Tensor) -> Tensor:
        """Let x (n, p, d) read what `read` (n, l) marks of the context (n, l, d)."""
        x = self.norm(x)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t[:, None] for t in self.to_kv(context).chunk(2, -1))
        out = _attention(q, k, v, read[:, None, None])
        return self.to_out(out) + self.ff(x)


class _SelfLayer(nn.Module):
    """Attention to itself with rotary positions, one head of keys for all, beside an MLP."""

    def __init__(self, width: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * head, head, head, 8 * width)
        self.norm = _Norm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head, width, bias=False)
        self.ff_out = nn.Sequential(_Gated(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, -1)
        q = _rotated(q.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        out = _attention(q, _rotated(k[:, None]), v[:, None])
        return self.attn_out(out) + self.ff_out(ff)


def _attention(q: Tensor, k: Tensor, v: Tensor, read: Tensor | None = None) -> Tensor:
    """Attend by each head of q (n, h, p, e) to k, v (n, 1, l, e) -> (n, p, h e)."""
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=read)
    return out.transpose(1, 2).flatten(2)


def _rotated(x: Tensor) -> Tensor:
    """Turn the halves of x (..., p, e) by the angles of its places (arXiv 2104.09864)."""
    places, width = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    step = torch.arange(0, width, 2, device=x.device, dtype=wide)
    angle = torch.outer(
        torch.arange(places, device=x.device, dtype=wide), 10000 ** (-step / width)
    )
    a, b = x.to(wide).chunk(2, -1)
    sin, cos = angle.sin(), angle.cos()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


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
    layers = _count(weights, "cross_model.layers.")
    try:
        clip = _clip(weights, json.loads(config.read_text()) if config.is_file() else {})
    except KeyError as error:
        raise ValueError(
            f"{str(file)!r} lacks the weights {error} of MPS: convert the checkpoint again"
        ) from error
    model = _Model(clip, kv.shape[1], layers, len(q) // head, head)
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
    """Return a CLIP of transformers of the sizes that the weights have."""
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
            "num_hidden_layers": _count(weights, f"{start}encoder.layers."),
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


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.split(".")[prefix.count(".")] for key in weights if key.startswith(prefix)})
