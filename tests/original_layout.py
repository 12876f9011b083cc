"""Stable Diffusion 1.5 in the layout of its authors' single file, made of a diffusers pipeline."""

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ["single_file"]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def swapped(name: str, table: Mapping[str, str]) -> str:
    """Replace the one part of a name that the table has, where it has one."""
    for ours, theirs in table.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def unet_name(name: str, layers: int, crossed: list[bool]) -> str:
    """Return the authors' name of a UNet's parameter.

    Args:
        name: diffusers'.
        layers: per block.
        crossed: whether each up block has attention.
    """
    place = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if place:
        way, block, kind, index, rest = place.groups()
        number = int(block) * (layers + 1) + int(index) + (way == "down")
        rest = swapped(rest, RESNET) if kind == "resnets" else rest
        side = "input" if way == "down" else "output"
        return f"{side}_blocks.{number}.{0 if kind == 'resnets' else 1}.{rest}"
    place = re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name)
    if place:
        return f"input_blocks.{(int(place[1]) + 1) * (layers + 1)}.0.op.{place[2]}"
    place = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name)
    if place:
        block = int(place[1])
        last = 2 if crossed[block] else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{last}.conv.{place[2]}"
    place = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    if place:
        if place[1] == "attentions":
            return f"middle_block.1.{place[3]}"
        return f"middle_block.{2 * int(place[2])}.{swapped(place[3], RESNET)}"
    return swapped(name, UNET)


def vae_entry(name: str, p: Tensor, levels: int) -> tuple[str, Tensor]:
    """Return the authors' name and shape of an autoencoder's parameter."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("mid_block.resnets.0", "mid.block_1")
    name = name.replace("mid_block.resnets.1", "mid.block_2")
    for way, blocks, sample in (("down", "down", "downsample"), ("up", "up", "upsample")):
        place = re.match(
            rf"(\w+)\.{blocks}_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.*)", name
        )
        if place:
            half, block, kind, index, rest = place.groups()
            level = int(block) if way == "down" else levels - 1 - int(block)
            part = f"block.{index}" if kind == "resnets" else sample
            name = f"{half}.{way}.{level}.{part}.{rest}"
    if "mid_block.attentions.0." in name:
        half, _, rest = name.partition(".mid_block.attentions.0.")
        name = f"{half}.mid.attn_1.{swapped(rest, ATTENTION)}"
        p = p[:, :, None, None] if p.ndim == 2 else p
    return name, p


def single_file(pipe: object) -> dict[str, Tensor]:
    """Return all weights of a StableDiffusionPipeline as its authors' file has them."""
    unet, vae = pipe.unet, pipe.vae
    crossed = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    state = {
        f"model.diffusion_model.{unet_name(n, unet.config.layers_per_block, crossed)}": p
        for n, p in unet.state_dict().items()
    }
    for n, p in vae.state_dict().items():
        name, value = vae_entry(n, p, len(vae.config.block_out_channels))
        state[f"first_stage_model.{name}"] = value
    for n, p in pipe.text_encoder.state_dict().items():
        lead = "" if n.startswith("text_model.") else "text_model."
        state[f"cond_stage_model.transformer.{lead}{n}"] = p
    return {n: p.clone().contiguous() for n, p in state.items()}
