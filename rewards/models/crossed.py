"""A CLIP with cross-attention layers on top: the picture's tokens attend to the text's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.backbone import Backbone
from rewards.models.preprocess import Preprocess

__all__ = ["ClipWithCrossAttention", "Crossed"]


class Crossed(Backbone):
    """A CLIP that projects all its tokens, with cross-attention layers on top.

    Args:
        model: a module with `model` and `cross_model`.
        tokenizer: texts -> ids (n, length).
        preprocess: from pictures in [0, 1] to `pixel_values`.
        **execution: see `Backbone`.
    """

    texts = 256

    def __init__(
        self,
        model: "ClipWithCrossAttention",
        tokenizer: Any,
        preprocess: Preprocess,
        **execution: Any,
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
        ids = self.tokenizer(list(texts)).to(self.device, non_blocking=True)
        clip: Any = self.model.model
        out = clip.text_model(input_ids=ids)
        states = torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1)
        return clip.text_projection(states)

    def crossed(self, patches: Tensor, tokens: Tensor, read: Tensor) -> Tensor:
        """Let patches (n, p, d) attend to the tokens (n, l, d) that `read` (n, l) marks.

        Returns:
            the class token's state (n, d), in the dtype of the patches.
        """
        with torch.autocast(self.device.type, enabled=False):
            x, context = patches.to(self.dtype), tokens.to(self.dtype)
            x = self.model.cross_model(x, context, read)  # type: ignore[operator]
        return x[:, 0].to(patches.dtype)


class ClipWithCrossAttention(nn.Module):
    """The checkpoint's module: a CLIP of transformers, and the layers on top."""

    def __init__(self, clip: nn.Module, width: int, layers: int, heads: int, head: int) -> None:
        super().__init__()
        self.model = clip
        self.cross_model = _CrossModel(width, layers, heads, head)


class _CrossModel(nn.Module):
    """Alternating layers of cross-attention and self-attention."""

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
    """Return a module that holds a layer under the checkpoint's name for it."""
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
    """Attention to another sequence, one key head for all query heads, in parallel with an MLP.

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
        """Let x (n, p, d) attend to the rows of the context (n, l, d) that `read` (n, l) marks."""
        x = self.norm(x)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t[:, None] for t in self.to_kv(context).chunk(2, -1))
        out = _attention(q, k, v, read[:, None, None])
        return self.to_out(out) + self.ff(x)


class _SelfLayer(nn.Module):
    """Self-attention with rotary positions, one key head for all queries, parallel to an MLP."""

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
    """Rotate the halves of x (..., p, e) by the angles of its positions (arXiv 2104.09864)."""
    places, width = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    step = torch.arange(0, width, 2, device=x.device, dtype=wide)
    angle = torch.outer(
        torch.arange(places, device=x.device, dtype=wide), 10000 ** (-step / width)
    )
    a, b = x.to(wide).chunk(2, -1)
    sin, cos = angle.sin(), angle.cos()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
