"""Conditions with the right shapes, made without a text encoder: for plans, which load nothing."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from steer.backends.checks import default_of, dtype_of
from steer.backends.conditions import Condition
from steer.backends.flow_matching import (
    Ernie,
    Flux,
    Flux2Klein,
    Krea2,
    Prx,
    QwenImage,
    RectifiedUNet,
    Sana,
    SanaSprint,
    StableDiffusion3,
    Wan,
    ZImage,
)
from steer.backends.noise_prediction import StableDiffusion
from steer.backends.pipeline import PipelineFlow
from steer.backends.two_time import AnyFlow, Flux3, HunyuanImage

__all__ = ["stand_in", "text_length"]

Arguments = dict[str, Any]

LENGTHS: Mapping[type[PipelineFlow], int] = {
    Flux3: 480, HunyuanImage: 1000, QwenImage: 128, ZImage: 128, Krea2: 128, Ernie: 128,
    StableDiffusion: 77, RectifiedUNet: 77,
}  # fmt: skip
"""Number of tokens of a prompt, if the pipeline's call does not pad prompts to a fixed length."""


def text_length(flow: PipelineFlow) -> int:
    """Return the default number of text tokens of a family's denoiser."""
    said = flow.call_arguments.get("max_sequence_length")
    padded = default_of(flow.pipe, "max_sequence_length")
    if type(flow) is Flux and flow.kind == "one-jump":
        padded = 256  # schnell's maximum
    usual = int(said or LENGTHS.get(type(flow)) or padded or 77)
    return 77 + usual if isinstance(flow, StableDiffusion3) and said is None else usual


def stand_in(flow: PipelineFlow, tokens: int | None = None) -> Condition:
    """Return a condition with the shapes that its family's pipeline would give to a prompt.

    Args:
        flow: flow of the pipeline, at the planned resolution.
        tokens: number of text tokens. Default: `text_length`.

    Raises:
        ValueError: no shapes are known for this family.
    """
    known = _KNOWN.get(type(flow))
    if known is None:
        raise ValueError(
            f"no plan for a {type(flow.pipe).__name__}: the shapes of what its denoiser is given "
            f"are not known here; known are {', '.join(sorted(k.__name__ for k in _KNOWN))}"
        )
    shape = _state(flow)
    length = text_length(flow) if tokens is None else tokens
    with torch.no_grad():
        prompt = known(flow, shape, length)
        negative = None if flow.cfg is None else known(flow, shape, length)
    return Condition(prompt, negative, shape, dtype_of(flow.network))


def _state(flow: PipelineFlow) -> tuple[int, ...]:
    """Return the shape of one state."""
    scale = flow.multiple // 2 if flow.layout in ("tokens", "patches") else _scale(flow)
    height, width = flow.height, flow.width
    if height is None or width is None:
        raise ValueError("a plan needs height and width: give both")
    h, w = height // scale, width // scale
    channels = int(flow.network.config.in_channels)
    if flow.layout == "tokens":
        return (h // 2) * (w // 2), channels
    if flow.layout == "patches":
        return channels, h // 2, w // 2
    if isinstance(flow, Wan | AnyFlow):
        frames = int(flow.call_arguments.get("num_frames") or default_of(flow.pipe, "num_frames")
                     or 1)  # fmt: skip
        f = (frames - 1) // int(getattr(flow.pipe, "vae_scale_factor_temporal", 4)) + 1
        return (f, channels, h, w) if flow.layout == "frames" else (channels, f, h, w)
    return channels, h, w


def _scale(flow: PipelineFlow) -> int:
    pipe = flow.pipe
    spatial = getattr(pipe, "vae_scale_factor_spatial", None)
    return int(spatial or getattr(pipe, "vae_scale_factor", None) or 8)


def _text(flow: PipelineFlow, *shape: int) -> Tensor:
    return torch.zeros(1, *shape, dtype=dtype_of(flow.network))


def _ones(length: int, kind: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(1, length, dtype=kind)


def _unet(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    config = flow.network.config
    time = config.get("time_cond_proj_dim")
    found: Arguments = {
        "encoder_hidden_states": _text(flow, length, config.cross_attention_dim),
        "timestep_cond": None if time is None else _text(flow, time),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {
            "text_embeds": _text(flow, pooled), "time_ids": _text(flow, 6)
        }  # fmt: skip
    return found


def _flux(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    config, kind = flow.network.config, dtype_of(flow.network)
    return {
        "encoder_hidden_states": _text(flow, length, config.joint_attention_dim),
        "pooled_projections": _text(flow, config.pooled_projection_dim),
        "img_ids": torch.zeros(shape[0], 3, dtype=kind),
        "txt_ids": torch.zeros(length, 3, dtype=kind),
        "guidance": torch.ones(1, dtype=torch.float32) if config.guidance_embeds else None,
    }


def _flux2(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    ids = {"img_ids": torch.zeros(1, shape[0], 4), "txt_ids": torch.zeros(1, length, 4)}
    text = _text(flow, length, flow.network.config.joint_attention_dim)
    return {"encoder_hidden_states": text, "guidance": None, **ids}


def _flux3(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    ids = {"img_ids": torch.zeros(shape[0], 4), "txt_ids": torch.zeros(length, 4)}
    text = _text(flow, length, flow.network.config.joint_attention_dim)
    return {"encoder_hidden_states": text, **ids}


def _sd3(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    config = flow.network.config
    return {
        "encoder_hidden_states": _text(flow, length, config.joint_attention_dim),
        "pooled_projections": _text(flow, config.pooled_projection_dim),
    }


def _sana(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    config = flow.network.config
    found: Arguments = {
        "encoder_hidden_states": _text(flow, length, config.caption_channels),
        "encoder_attention_mask": _ones(length),
    }
    if config.guidance_embeds:
        found["guidance"] = torch.ones(1, dtype=dtype_of(flow.network))
    return found


def _hunyuan(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    """Return the arguments of a prompt without quotes: letters to draw would add 128 tokens."""
    config = flow.network.config
    return {
        "encoder_hidden_states": _text(flow, length, config.text_embed_dim),
        "encoder_attention_mask": _ones(length),
        "encoder_hidden_states_2": None,
        "encoder_attention_mask_2": None,
        "guidance": torch.ones(1, dtype=dtype_of(flow.network))
        if config.guidance_embeds
        else None,
    }


def _qwen(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    assert flow.height is not None
    assert flow.width is not None
    rows, columns = flow.height // flow.multiple, flow.width // flow.multiple
    return {
        "encoder_hidden_states": _text(flow, length, flow.network.config.joint_attention_dim),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, rows, columns)]],
        "guidance": None,
    }


def _z_image(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    return {"cap_feats": [_text(flow, length, flow.network.config.cap_feat_dim)[0]]}


def _wan(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    return {"encoder_hidden_states": _text(flow, length, flow.network.config.text_dim)}


def _prx(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    text = _text(flow, length, flow.network.config.context_in_dim)
    return {"encoder_hidden_states": text, "attention_mask": _ones(length, torch.bool)}


def _ernie(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    text = _text(flow, length, flow.network.config.text_in_dim)
    return {"text_bth": text, "text_lens": torch.tensor([length])}


def _krea2(flow: PipelineFlow, shape: tuple[int, ...], length: int) -> Arguments:
    config = flow.network.config
    return {
        "encoder_hidden_states": _text(
            flow, length, config.num_text_layers, config.text_hidden_dim
        ),
        "position_ids": torch.zeros(length + shape[0], 3),
        "encoder_attention_mask": _ones(length, torch.bool),
    }


_KNOWN: Mapping[type[PipelineFlow], Callable[[Any, tuple[int, ...], int], Arguments]] = {
    StableDiffusion: _unet, RectifiedUNet: _unet, Flux: _flux, Flux2Klein: _flux2, Flux3: _flux3,
    StableDiffusion3: _sd3, Sana: _sana, SanaSprint: _sana, HunyuanImage: _hunyuan,
    QwenImage: _qwen, ZImage: _z_image, Wan: _wan, AnyFlow: _wan, Prx: _prx, Ernie: _ernie,
    Krea2: _krea2,
}  # fmt: skip
