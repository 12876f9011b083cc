"""Memory that the recipes in recipes/configs/real need: computed, without any download.

    python -m benchmarks.cards [NAME ...]

Each model is built at its real size as fake tensors (shapes without memory), and one row's guided
step and tuning step are run through denoiser, decoder and reward. What autograd keeps for the
backward pass is counted, storage by storage. With `checkpointing` only the activations of one call
exist at a time, so the peak of a step is

    weights + max(kept by the denoiser, kept by the decoder, kept by the reward),

and a card should have 10 % more than that, plus 1 GiB for CUDA itself and its libraries. Text
encoders are counted as weights, because the command line keeps them. Attention uses the kernel of
a card (flash, if nothing is masked), not the quadratic one that fake tensors would use.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["CARDS", "RECIPES", "Recipe", "Use", "card_for", "measured", "table"]

CARDS = (12, 24, 48, 80)
"""Nominal sizes of cards in GB, which are in fact that many GiB."""

GIB = 2**30
RANK = 16
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Recipe:
    """One recipe's model, size and reward.

    Attributes:
        denoiser: makes the network.
        call: state (with or without a gradient) -> the network's arguments.
        state: the shape of one state.
        decoder: makes the autoencoder.
        latent: shape of the latent that it decodes.
        reward: makes the image tower of the reward, and returns its input size in pixels.
        texts: parameters of the pipeline's text encoders, in billions, as their cards give them.
        asked: parameters of the reward's text encoder, in billions.
    """

    denoiser: Callable[[], Any]
    call: Callable[[Tensor], dict[str, Any]]
    state: tuple[int, ...]
    decoder: Callable[[], Any]
    latent: tuple[int, ...]
    reward: Callable[[], tuple[nn.Module, int]]
    texts: float
    asked: float = 0.0


@dataclass(frozen=True)
class Use:
    """The memory that a recipe needs, in GiB.

    Attributes:
        weights: those of denoiser, autoencoder and text encoders in bfloat16, of the reward in
            float32.
        kept: activations that the calls of denoiser, decoder and reward keep, for an input
            gradient.
        tuned: activations that the denoiser's call keeps if adapters of rank 16 are trained.
        adapters: those adapters, their gradients, AdamW's two moments and the running average.
    """

    weights: float
    kept: tuple[float, float, float]
    tuned: float
    adapters: float

    @property
    def guided(self) -> float:
        """The peak of a guided step of one row, with checkpointing."""
        return self.weights + max(self.kept)

    @property
    def tuning(self) -> float:
        """The peak of a tuning step of one row, with checkpointing."""
        return self.weights + self.adapters + max(self.tuned, *self.kept[1:])


def card_for(peak: float) -> int | None:
    """Return the smallest card with room for a peak, 10 % more, and 1 GiB; None if there is none.

    >>> card_for(9.9), card_for(10.1), card_for(100)
    (12, 24, None)
    """
    return next((card for card in CARDS if 1.1 * peak + 1 <= card), None)


# ---------------------------------------------------------------------- the parts


def vit(width: int, layers: int, heads: int, patch: int, side: int = 224) -> Any:
    """Return CLIP's image tower of a given size, and its input size."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, patch_size=patch, image_size=side,
    )  # fmt: skip
    return transformers.CLIPVisionModel(config), side


def vit_large() -> Any:
    """Return ViT-L/14 (aesthetic, clip)."""
    return vit(1024, 24, 16, 14)


def vit_huge() -> Any:
    """Return ViT-H/14 (pickscore, hpsv2)."""
    return vit(1280, 32, 16, 14)


def blip() -> Any:
    """Return ImageReward's image tower, ViT-L/16."""
    return vit(1024, 24, 16, 16)


def kl(channels: int, **more: Any) -> Callable[[], Any]:
    """Return a function that makes an autoencoder of Stable Diffusion's shape."""
    return lambda: diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=channels,
        **more,
    )  # fmt: skip


def sdxl() -> Any:
    """Return SDXL's UNet."""
    return diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def sprint() -> Any:
    """Return SANA-Sprint's transformer of .6 billion parameters."""
    return diffusers.SanaTransformer2DModel(
        num_layers=28, num_attention_heads=36, attention_head_dim=32,
        num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152,
        guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip


def anyflow() -> Any:
    """Return AnyFlow's transformer of 1.3 billion parameters: Wan 2.1's with a second time."""
    return diffusers.AnyFlowTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
    )


def tokens(height: int, width: int) -> int:
    """Return the number of packed tokens of FLUX for a size."""
    return (height // 16) * (width // 16)


def ones(n: int = 1) -> Tensor:
    """Return a batch of times."""
    return torch.ones(n)


FLUX = tokens(512, 512)
FRAMES, SIDES = 9, (480, 832)

RECIPES: dict[str, Recipe] = {
    "imagereward_sd15_lcm": Recipe(
        lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768, time_cond_proj_dim=256),
        lambda x: {
            "sample": x, "timestep": ones(), "encoder_hidden_states": torch.randn(1, 77, 768),
            "timestep_cond": torch.randn(1, 256),
        },
        (4, 64, 64), kl(4), (4, 64, 64), blip, 0.12, 0.2,
    ),
    "aesthetic_sdxl_turbo": Recipe(
        sdxl,
        lambda x: {
            "sample": x, "timestep": ones(), "encoder_hidden_states": torch.randn(1, 77, 2048),
            "added_cond_kwargs": {
                "text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6),
            },
        },
        (4, 64, 64), kl(4), (4, 64, 64), vit_large, 0.82,
    ),
    "pickscore_sana_sprint": Recipe(
        sprint,
        lambda x: {
            "hidden_states": x, "timestep": ones(), "guidance": ones(),
            "encoder_hidden_states": torch.randn(1, 300, 2304),
        },
        (32, 32, 32), diffusers.AutoencoderDC, (32, 32, 32), vit_huge, 2.6, 0.35,
    ),
    "hpsv2_flux3_klein": Recipe(
        lambda: diffusers.Flux3Transformer2DModel(flow_map=True),
        lambda x: {
            "hidden_states": x, "timestep": ones(), "target_timestep": ones(),
            "encoder_hidden_states": torch.randn(1, 480, 20480),
            "img_ids": torch.zeros(FLUX, 4), "txt_ids": torch.zeros(480, 4),
        },
        (FLUX, 128), diffusers.AutoencoderKLFlux2, (32, 64, 64), vit_huge, 4.4, 0.35,
    ),
    "clip_flux_schnell": Recipe(
        diffusers.FluxTransformer2DModel,
        lambda x: {
            "hidden_states": x, "timestep": ones(), "pooled_projections": torch.randn(1, 768),
            "encoder_hidden_states": torch.randn(1, 256, 4096),
            "img_ids": torch.zeros(FLUX, 3), "txt_ids": torch.zeros(256, 3),
        },
        (FLUX, 64), kl(16), (16, 64, 64), vit_large, 4.9, 0.12,
    ),
    "video_anyflow": Recipe(
        anyflow,
        lambda x: {
            "hidden_states": x, "timestep": torch.ones(1, x.shape[1]),
            "r_timestep": torch.ones(1, x.shape[1]),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
        },
        (1 + FRAMES // 4, 16, SIDES[0] // 8, SIDES[1] // 8), diffusers.AutoencoderKLWan,
        (16, 1 + FRAMES // 4, SIDES[0] // 8, SIDES[1] // 8), vit_huge, 5.7, 0.35,
    ),
}  # fmt: skip
"""Recipe -> its model, at the size and with the reward of its YAML."""


# ---------------------------------------------------------------------- counting


@contextmanager
def _as_on_a_card() -> Any:
    """Use the attention kernels of a card."""
    plain, aten = nn.functional.scaled_dot_product_attention, torch.ops.aten

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        if query.dtype != torch.bfloat16:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if attn_mask is None:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        mask = query.new_zeros(attn_mask.shape).expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout_p, is_causal, scale=scale
        )[0]

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _kept(module: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps of a call, without its parameters and buffers."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    seen: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storage.nbytes() for storage in seen.values())


def measured(recipe: Recipe) -> Use:
    """Return the memory that a recipe needs, computed with fake tensors."""
    before = torch.get_default_dtype()
    diffusers.logging.set_verbosity_error()
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        torch.set_default_dtype(torch.bfloat16)
        with fakes, torch.device("cuda"), _as_on_a_card():
            denoiser = recipe.denoiser().eval().requires_grad_(False)
            decoder = recipe.decoder().eval().requires_grad_(False)
            torch.set_default_dtype(torch.float32)
            tower, side = recipe.reward()
            tower.eval().requires_grad_(False)
            torch.set_default_dtype(torch.bfloat16)

            def state(shape: tuple[int, ...], gradient: bool = True, **more: Any) -> Tensor:
                return torch.randn(1, *shape, **more).requires_grad_(gradient)

            kept = (
                _kept(denoiser, lambda: denoiser(**recipe.call(state(recipe.state)))),
                _kept(decoder, lambda: decoder.decode(state(recipe.latent))),
                _kept(tower, lambda: tower(state((3, side, side), dtype=torch.float32))),
            )
            weights = sum(map(_bytes, (denoiser, decoder, tower)))
            weights += 2e9 * recipe.texts + 4e9 * recipe.asked
            tuned, adapters = _tuned(denoiser, lambda: recipe.call(state(recipe.state, False)))
        return Use(
            weights / GIB,
            tuple(k / GIB for k in kept),  # type: ignore[arg-type]
            tuned / GIB,
            adapters / GIB,
        )
    finally:
        torch.set_default_dtype(before)


def _tuned(denoiser: Any, arguments: Callable[[], dict[str, Any]]) -> tuple[int, int]:
    """Return the bytes that a call keeps with trained adapters, and the bytes of the adapters."""
    found = [(n, m) for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
    chosen = [(n, m) for n, m in found if n.endswith(ADAPTED)]
    for name, layer in chosen:
        denoiser.set_submodule(name, _Adapted(layer))
    kept = _kept(denoiser, lambda: denoiser(**arguments()))
    numbers = sum(RANK * (m.in_features + m.out_features) for _, m in chosen)
    return kept, 20 * numbers  # float32, five copies


class _Adapted(nn.Module):
    """A layer with a LoRA, as autocast runs it; peft cannot move fake tensors."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output and the update's."""
        return self.layer(x) + self.up(self.down(x))


def table(names: list[str]) -> str:
    """Return the rows of some recipes as Markdown."""
    lines = [
        "| recipe | weights | kept: denoiser, decoder, reward | tuned denoiser | adapters | "
        "guided step | card | tuning step | card |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        use = measured(RECIPES[name])
        kept = ", ".join(f"{k:.1f}" for k in use.kept)
        lines.append(
            f"| {name} | {use.weights:.1f} | {kept} | {use.tuned:.1f} | {use.adapters:.2f} | "
            f"{use.guided:.1f} | {card_for(use.guided)} GB | {use.tuning:.1f} | "
            f"{card_for(use.tuning)} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:] or list(RECIPES)))
