"""Tiny pipelines of the real diffusers classes, with random weights, built offline from configs.

`build("flux")` gives a pipeline in eval mode, the same for the same seed. `run` calls it and gives
a tensor, whatever the pipeline returns. `CALLS[name]` are the keyword arguments a call needs and
`GUIDANCE[name]` how its classifier-free guidance is switched. The table of costs:

    python -m tests.tiny_pipelines [names]
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Pipe = Any  # a DiffusionPipeline or a ModularPipeline: they share no base class worth naming

# ---- tokenizers: one token a byte, no merges ----------------------------------------------------


def byte_letters() -> list[str]:
    """Return the letter that byte-level tokenizers write for each of the 256 bytes."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(moved))]


def clip_tokenizer(length: int = 16) -> Any:
    """Return CLIP's tokenizer with 514 tokens."""
    letters = byte_letters()
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def t5_tokenizer(length: int = 16) -> Any:
    """Return T5's tokenizer with the printable ASCII letters."""
    letters = [chr(code) for code in range(33, 127) if chr(code) not in "<>"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab = [*special, *((letter, -3.0) for letter in letters)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def gemma_tokenizer(length: int = 16) -> Any:
    """Return Gemma's tokenizer with its byte tokens only."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=length)


def qwen_tokenizer(length: int = 128) -> Any:
    """Return Qwen's tokenizer with its chat and picture tokens and a plain chat template."""
    vocab = {letter: i for i, letter in enumerate([*byte_letters(), "<|endoftext|>"])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=length)
    names = ("im_start", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")
    special = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    )
    return tokenizer


# ---- text encoders ------------------------------------------------------------------------------


def clip_text(width: int = 32, *, projected: bool = False) -> nn.Module:
    """Return CLIP's text encoder; `projected` has the text projection, to 32 channels."""
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=514,
        max_position_embeddings=16,
        projection_dim=32,
        hidden_act="gelu",
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return getattr(transformers, name)(config)


def t5_text(width: int = 32, vocab: int = 128, kind: str = "T5") -> nn.Module:
    """Return the encoder of T5, or of UMT5."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab,
        d_model=width,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def gemma2_text() -> nn.Module:
    """Return Gemma 2."""
    config = transformers.Gemma2Config(
        head_dim=8,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        vocab_size=262,
        max_position_embeddings=512,
        attn_implementation="eager",
    )
    return transformers.Gemma2Model(config)


def t5_gemma_config() -> Any:
    """Return the config of T5-Gemma, of which only the half `encoder` is built."""
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig

    half = {
        "vocab_size": 262,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "layer_types": ["full_attention"],
        "dropout_rate": 0.0,
    }
    return T5GemmaConfig(encoder=half, decoder=half, vocab_size=262)


def t5_gemma_text() -> nn.Module:
    """Return the encoder of T5-Gemma."""
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    return T5GemmaEncoder(t5_gemma_config().encoder)


def qwen3_text(kind: str = "Qwen3Model") -> nn.Module:
    """Return Qwen3."""
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=300,
        max_position_embeddings=512,
    )
    return getattr(transformers, kind)(config)


def qwen2_vl_text() -> nn.Module:
    """Return Qwen2.5-VL with a vision tower of one layer."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "rope_parameters": {
                "mrope_section": [1, 1, 2],
                "rope_type": "default",
                "rope_theta": 1e6,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        vision_end_token_id=290,
        vision_start_token_id=291,
        vision_token_id=292,
        image_token_id=293,
        video_token_id=294,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_text(layers: int = 2, kind: str = "Qwen3VLModel") -> nn.Module:
    """Return Qwen3-VL with a vision tower of one layer."""
    config = transformers.Qwen3VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 300,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "mrope_section": [2, 1, 1],
                "rope_type": "default",
                "rope_theta": 1e6,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=290,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
    )
    return getattr(transformers, kind)(config)


def qwen3_vl_processor() -> Any:
    """Return the processor of Qwen3-VL around the tiny tokenizer."""
    tokenizer = qwen_tokenizer()
    return transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


# ---- autoencoders -------------------------------------------------------------------------------


def kl_vae(
    scale: float = 0.18215, shift: float | None = None, *, quant: bool = False, levels: int = 2
) -> nn.Module:
    """Return AutoencoderKL with 4 channels, at half the size or, with four levels, an eighth."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        scaling_factor=scale,
        shift_factor=shift,
    )


def flux2_vae() -> nn.Module:
    """Return FLUX.2's autoencoder with statistics as if it had been trained.

    A fresh BatchNorm has mean 0 and variance 1, so that a decode without it would look right.
    """
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def dc_vae() -> nn.Module:
    """Return SANA's autoencoder.

    Heads of 32 channels, as in the real one: a narrower head of its linear attention is often all
    zero after the ReLU, and the gradient breaks there.
    """
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=32,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 32),
        decoder_block_out_channels=(8, 32),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def qwen_vae() -> nn.Module:
    """Return Qwen-Image's autoencoder."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )


def wan_vae() -> nn.Module:
    """Return Wan's autoencoder of videos."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )


# ---- schedulers ---------------------------------------------------------------------------------


def vp_scheduler(kind: str, **changes: Any) -> Any:
    """Return a scheduler with the betas of Stable Diffusion."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, kind)(**betas, steps_offset=1, **changes)


def flow_scheduler(**changes: Any) -> Any:
    """Return the Euler scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**changes)


# ---- Stable Diffusion ---------------------------------------------------------------------------


def unet(**changes: Any) -> nn.Module:
    """Return the UNet of Stable Diffusion, two levels."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **changes,
    )


def sd15(scheduler: Any = None) -> Pipe:
    """Return Stable Diffusion 1.5."""
    pndm = {"skip_prk_steps": True, "set_alpha_to_one": False}
    return diffusers.StableDiffusionPipeline(
        unet=unet(attention_head_dim=4, cross_attention_dim=32),
        scheduler=scheduler or vp_scheduler("PNDMScheduler", **pndm),
        vae=kl_vae(quant=True),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15_ddim() -> Pipe:
    """Return Stable Diffusion 1.5 with DDIM."""
    changes = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    return sd15(vp_scheduler("DDIMScheduler", **changes))


def sd15_flow() -> Pipe:
    """Return Stable Diffusion 1.5 with a UNet that predicts the velocity of a rectified flow."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return sd15(vp_scheduler("DPMSolverMultistepScheduler", **flow, solver_order=1))


def sd15_lcm() -> Pipe:
    """Return a latent consistency model of Stable Diffusion 1.5; it is told a guidance scale."""
    return diffusers.LatentConsistencyModelPipeline(
        unet=unet(attention_head_dim=4, cross_attention_dim=32, time_cond_proj_dim=16),
        scheduler=vp_scheduler("LCMScheduler", timestep_spacing="leading"),
        vae=kl_vae(quant=True),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scheduler: Any = None, time_cond: int | None = None) -> Pipe:
    """Return SDXL; its text encoders differ in width, by which loaders tell them apart."""
    network = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=32 + 48,  # of the two text encoders
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,  # pooled text and six sizes
        time_cond_proj_dim=time_cond,
    )
    euler = {"timestep_spacing": "leading"}
    return diffusers.StableDiffusionXLPipeline(
        unet=network,
        scheduler=scheduler or vp_scheduler("EulerDiscreteScheduler", **euler),
        vae=kl_vae(0.13025, quant=True),
        text_encoder=clip_text(32),
        text_encoder_2=clip_text(48, projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
    )


def sdxl_turbo() -> Pipe:
    """Return SDXL-Turbo."""
    trailing = {"timestep_spacing": "trailing"}
    return sdxl(vp_scheduler("EulerAncestralDiscreteScheduler", **trailing))


def sdxl_lcm() -> Pipe:
    """Return SDXL with the scheduler of LCM-LoRA."""
    return sdxl(vp_scheduler("LCMScheduler", timestep_spacing="leading"))


def sdxl_lcm_full() -> Pipe:
    """Return a full LCM: its UNet is told the guidance scale."""
    return sdxl(vp_scheduler("LCMScheduler", timestep_spacing="leading"), time_cond=16)


def sdxl_tcd() -> Pipe:
    """Return SDXL with the scheduler of TCD."""
    return sdxl(vp_scheduler("TCDScheduler", timestep_spacing="leading"))


def sd3() -> Pipe:
    """Return Stable Diffusion 3.5: three text encoders, one dual attention block."""
    network = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=3.0),
        vae=kl_vae(1.5305, 0.0609),
        text_encoder=clip_text(24, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(40, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(64),
        tokenizer_3=t5_tokenizer(),
    )


# ---- FLUX ---------------------------------------------------------------------------------------


def flux(*, dev: bool = True) -> Pipe:
    """Return FLUX.1, dev or schnell."""
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=dev,
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    return diffusers.FluxPipeline(
        transformer=network,
        scheduler=flow_scheduler(**shift, base_shift=0.5, max_shift=1.15),
        vae=kl_vae(0.3611, 0.1159),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),
    )


def flux_schnell() -> Pipe:
    """Return FLUX.1 schnell."""
    return flux(dev=False)


def flux3_blocks(*, flow_map: bool) -> Any:
    """Return the steps of FLUX.3 without the language model that rewrites the prompt."""
    from diffusers.modular_pipelines import flux3 as steps

    blocks = steps.Flux3DistilledAutoBlocks() if flow_map else steps.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    return blocks


def flux3(*, flow_map: bool) -> Pipe:
    """Return FLUX.3 Klein, the two-time flow map, or its base."""
    network = diffusers.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,  # three layers of the text encoder
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )
    kind = "Flux3DistilledModularPipeline" if flow_map else "Flux3ModularPipeline"
    pipe = getattr(diffusers, kind)(flux3_blocks(flow_map=flow_map))
    pipe.update_components(
        transformer=network,
        vae=flux2_vae(),
        text_encoder=qwen3_vl_text(3, "Qwen3VLForConditionalGeneration"),
        tokenizer=qwen3_vl_processor(),
    )
    return pipe


def flux3_klein() -> Pipe:
    """Return FLUX.3 Klein."""
    return flux3(flow_map=True)


def flux3_base() -> Pipe:
    """Return the base of FLUX.3 Klein."""
    return flux3(flow_map=False)


# ---- SANA ---------------------------------------------------------------------------------------


def sana_parts(*, guidance: bool) -> dict[str, Any]:
    """Return what SANA and SANA-Sprint share."""
    network = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=8,
        sample_size=32,
        qk_norm="rms_norm_across_heads" if guidance else None,
        guidance_embeds=guidance,
    )
    return {
        "transformer": network,
        "vae": dc_vae(),
        "text_encoder": gemma2_text(),
        "tokenizer": gemma_tokenizer(),
    }


def sana() -> Pipe:
    """Return SANA."""
    scheduler = flow_scheduler(shift=3.0)
    return diffusers.SanaPipeline(**sana_parts(guidance=False), scheduler=scheduler)


def sana_sprint() -> Pipe:
    """Return SANA-Sprint."""
    scheduler = diffusers.SCMScheduler()
    return diffusers.SanaSprintPipeline(**sana_parts(guidance=True), scheduler=scheduler)


# ---- other pictures -----------------------------------------------------------------------------


def flux2_klein() -> Pipe:
    """Return FLUX.2 Klein, the distilled one."""
    network = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * 16,  # two layers of the text encoder
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return diffusers.Flux2KleinPipeline(
        transformer=network,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3_text("Qwen3ForCausalLM"),
        tokenizer=qwen_tokenizer(),
        is_distilled=True,
    )


def hunyuan_image() -> Pipe:
    """Return HunyuanImage 2.1 distilled, a two-time flow map."""
    network = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=True,
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
        use_meanflow=True,
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=64,
        scaling_factor=0.75289,
    )
    return diffusers.HunyuanImagePipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=4.0),
        vae=vae,
        text_encoder=qwen2_vl_text(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5_text(vocab=400),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=None,
        ocr_guider=None,
    )


def qwen_image() -> Pipe:
    """Return Qwen-Image."""
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    shift = {"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
    return diffusers.QwenImagePipeline(
        transformer=network,
        scheduler=flow_scheduler(use_dynamic_shifting=True, **shift),
        vae=qwen_vae(),
        text_encoder=qwen2_vl_text(),
        tokenizer=qwen_tokenizer(),
    )


def z_image() -> Pipe:
    """Return Z-Image."""
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=3.0),
        vae=kl_vae(0.3611, 0.1159),
        text_encoder=qwen3_text(),
        tokenizer=qwen_tokenizer(),
    )


def prx() -> Pipe:
    """Return PRX."""
    network = diffusers.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=8,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    return diffusers.PRXPipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=3.0),
        vae=kl_vae(0.3611, 0.1159),
        text_encoder=t5_gemma_text(),
        tokenizer=gemma_tokenizer(),
    )


def ernie() -> Pipe:
    """Return ERNIE-Image without its prompt enhancer."""
    network = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    return diffusers.ErnieImagePipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=3.0),
        vae=flux2_vae(),
        text_encoder=qwen3_text(),
        tokenizer=qwen_tokenizer(),
    )


def krea2() -> Pipe:
    """Return Krea 2."""
    network = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    return diffusers.Krea2Pipeline(
        transformer=network,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=qwen3_vl_text(),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(0, 1),
    )


def dreamlite() -> Pipe:
    """Return DreamLite mobile: its UNet eats the latent beside that of a picture."""
    network = diffusers.DreamLiteUNetModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
        transformer_layers_per_block=1,
    )
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    return diffusers.DreamLiteMobilePipeline(
        unet=network,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen3_vl_text(2, "Qwen3VLForConditionalGeneration"),
        tokenizer=qwen_tokenizer(),
        processor=qwen3_vl_processor(),
    )


# ---- videos -------------------------------------------------------------------------------------

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def wan() -> Pipe:
    """Return Wan 2.1, text to video."""
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(**WAN, qk_norm="rms_norm_across_heads"),
        transformer_2=None,
        scheduler=flow_scheduler(shift=3.0),
        vae=wan_vae(),
        text_encoder=t5_text(kind="UMT5"),
        tokenizer=t5_tokenizer(),
    )


def anyflow() -> Pipe:
    """Return AnyFlow, a two-time flow map of videos."""
    two_times = {"gate_value": 0.25, "deltatime_type": "r"}
    return diffusers.AnyFlowPipeline(
        transformer=diffusers.AnyFlowTransformer3DModel(**WAN, **two_times),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
        vae=wan_vae(),
        text_encoder=t5_text(kind="UMT5"),
        tokenizer=t5_tokenizer(),
    )


# ---- classes that no adapter names --------------------------------------------------------------


def lumina2() -> Pipe:
    """Return Lumina 2: flow matching with the time reversed and the guided velocity rescaled."""
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=8,
    )
    return diffusers.Lumina2Pipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=6.0),
        vae=kl_vae(0.3611, 0.1159, levels=4),
        text_encoder=gemma2_text(),
        tokenizer=gemma_tokenizer(64),
    )


def auraflow() -> Pipe:
    """Return AuraFlow: flow matching with learned positions."""
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=network,
        scheduler=flow_scheduler(shift=1.73),
        vae=kl_vae(0.13025, quant=True),
        text_encoder=t5_text(kind="UMT5"),
        tokenizer=t5_tokenizer(),
    )


def cogview4() -> Pipe:
    """Return CogView 4: flow matching with a linear shift, told the size of the picture."""
    network = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=32,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    text = transformers.GlmConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=128,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
    )
    shift = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}
    return diffusers.CogView4Pipeline(
        transformer=network,
        scheduler=flow_scheduler(use_dynamic_shifting=True, **shift),
        vae=kl_vae(1.0, 0.0),
        text_encoder=transformers.GlmModel(text),
        tokenizer=t5_tokenizer(),  # adds a special token, as GLM's does: "" is not empty
    )


def chroma() -> Pipe:
    """Return Chroma: packed tokens as FLUX, but with masked text and guidance of its own."""
    network = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        transformer=network,
        scheduler=flow_scheduler(),
        vae=kl_vae(0.3611, 0.1159),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
    )


def pixart() -> Pipe:
    """Return PixArt-Sigma: predicts the noise, and a variance that is thrown away."""
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=network,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=kl_vae(0.13025, quant=True),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
    )


def hunyuan_dit() -> Pipe:
    """Return Hunyuan-DiT: predicts v, and a variance that is thrown away; DDPM adds noise."""
    network = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        hidden_size=32,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cube", "ball"]
    vocab = {word: i for i, word in enumerate(words)}
    text = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=network,
        scheduler=vp_scheduler("DDPMScheduler", prediction_type="v_prediction", clip_sample=False),
        vae=kl_vae(0.13025, quant=True),
        text_encoder=transformers.BertModel(text),
        tokenizer=transformers.BertTokenizer(vocab=vocab, model_max_length=77),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ltx() -> Pipe:
    """Return LTX-Video: packed tokens of a video."""
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    return diffusers.LTXPipeline(
        transformer=network,
        scheduler=flow_scheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=vae,
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
    )


# ---- pipelines to refuse: none goes from noise and a prompt to a picture ------------------------


def kandinsky_prior() -> Pipe:
    """Return Kandinsky 2.2's prior: makes an embedding, and has no autoencoder."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
        image_size=16,
        patch_size=8,
    )
    network = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        embedding_dim=32,
        num_embeddings=16,
    )
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        clip_sample_range=5.0,
    )
    size = {"height": 16, "width": 16}
    return diffusers.KandinskyV22PriorPipeline(
        prior=network,
        scheduler=scheduler,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        text_encoder=clip_text(projected=True),
        tokenizer=clip_tokenizer(),
    )


def stable_audio() -> Pipe:
    """Return Stable Audio."""
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    network = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=32,
        cross_attention_input_dim=32,
        global_states_input_dim=64,
        time_proj_dim=8,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=16,
    )
    return diffusers.StableAudioPipeline(
        transformer=network,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
        vae=vae,
        text_encoder=t5_text(),
        projection_model=StableAudioProjectionModel(32, 32, 0, 32),
        tokenizer=t5_tokenizer(),
    )


def inpaint() -> Pipe:
    """Return Stable Diffusion's inpainting: its UNet eats a mask and a picture too."""
    return diffusers.StableDiffusionInpaintPipeline(
        unet=unet(attention_head_dim=4, cross_attention_dim=32, in_channels=9),
        scheduler=vp_scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
        vae=kl_vae(quant=True),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# ---- the table ----------------------------------------------------------------------------------

SMALL = {"height": 16, "width": 16}
SHORT = {**SMALL, "max_sequence_length": 16}
SANA = {
    "height": 32,
    "width": 32,
    "max_sequence_length": 16,
    "use_resolution_binning": False,
    "complex_human_instruction": None,
}
VIDEO = {**SHORT, "num_frames": 5}
FLUX3 = {**SMALL, "text_encoder_out_layers": (0, 1, 3)}
FLUX2 = {**SMALL, "max_sequence_length": 32, "text_encoder_out_layers": (0, 1)}
UNBINNED = {**SMALL, "use_resolution_binning": False}
MASKED = {
    **SMALL,
    "image": torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16),
    "mask_image": torch.ones(1, 1, 16, 16),
}
CFG = ("guidance_scale", 1.0, 4.0)
CFG_FROM_0 = ("guidance_scale", 0.0, 3.0)
TRUE_CFG = ("true_cfg_scale", 1.0, 4.0)

Guidance = tuple[str, float, float]

FAMILIES: dict[str, tuple[Callable[[], Pipe], dict[str, Any], Guidance | None]] = {
    "flux": (flux, {**SHORT, "negative_prompt": ""}, TRUE_CFG),
    "flux_schnell": (flux_schnell, SHORT, None),
    "flux3_klein": (flux3_klein, FLUX3, None),
    "flux3_base": (flux3_base, FLUX3, ("guider", 1.0, 3.5)),
    "sdxl": (sdxl, SMALL, CFG),
    "sdxl_turbo": (sdxl_turbo, SMALL, CFG),
    "sdxl_lcm": (sdxl_lcm, SMALL, CFG),
    "sdxl_lcm_full": (sdxl_lcm_full, SMALL, None),
    "sdxl_tcd": (sdxl_tcd, SMALL, CFG),
    "sd15": (sd15, SMALL, CFG),
    "sd15_ddim": (sd15_ddim, SMALL, CFG),
    "sd15_flow": (sd15_flow, SMALL, CFG),
    "sd15_lcm": (sd15_lcm, SMALL, None),
    "sd3": (sd3, SHORT, CFG),
    "sana": (sana, SANA, CFG),
    "sana_sprint": (sana_sprint, {**SANA, "intermediate_timesteps": None}, None),
    "flux2_klein": (flux2_klein, FLUX2, None),
    "hunyuan_image": (hunyuan_image, {**SMALL, "distilled_guidance_scale": 3.25}, None),
    "qwen_image": (qwen_image, {**SHORT, "negative_prompt": " "}, TRUE_CFG),
    "z_image": (z_image, SHORT, CFG_FROM_0),
    "prx": (prx, UNBINNED, CFG),
    "ernie": (ernie, {**SMALL, "use_pe": False}, CFG),
    "krea2": (krea2, SHORT, CFG_FROM_0),
    "dreamlite": (dreamlite, SMALL, None),
    "wan": (wan, VIDEO, CFG),
    "anyflow": (anyflow, VIDEO, CFG),
    "generic_lumina2": (
        lumina2,
        {"height": 32, "width": 32, "max_sequence_length": 32, "system_prompt": ""},
        CFG,
    ),
    "generic_auraflow": (auraflow, SHORT, CFG),
    "generic_cogview4": (cogview4, SHORT, CFG),
    "generic_chroma": (chroma, SHORT, CFG),
    "generic_pixart": (
        pixart,
        {**UNBINNED, "max_sequence_length": 16, "clean_caption": False},
        CFG,
    ),
    "generic_hunyuan_dit": (hunyuan_dit, UNBINNED, CFG),
    "generic_ltx": (ltx, {**VIDEO, "height": 32, "width": 32}, CFG),
    "generic_kandinsky_prior": (kandinsky_prior, {"output_type": "pt"}, CFG),
    "generic_stable_audio": (stable_audio, {"audio_end_in_s": 4.0}, CFG),
    "generic_inpaint": (inpaint, MASKED, CFG),
}
"""Each name: its builder, its entry in CALLS and its entry in GUIDANCE."""

NAMES = tuple(FAMILIES)

REFUSED = ("generic_kandinsky_prior", "generic_stable_audio", "generic_inpaint")
"""The names of pipelines that do not go from noise and a prompt alone to a picture."""

CALLS = {name: call for name, (_, call, _) in FAMILIES.items()}
"""The arguments a call needs, beside the prompt and the number of steps."""

GUIDANCE = {name: guidance for name, (_, _, guidance) in FAMILIES.items()}
"""The argument that switches classifier-free guidance, its value for off, and one for on.

None where there is none to switch. The argument "guider" is a component: see `guided`.
"""

SETTINGS: dict[str, dict[str, Any]] = {
    "QwenImagePipeline": {"prompt_template_encode": "a {}", "prompt_template_encode_start_idx": 0},
    "HunyuanImagePipeline": {
        "prompt_template_encode": "a {}",
        "prompt_template_encode_start_idx": 0,
        "tokenizer_max_length": 24,
        "tokenizer_2_max_length": 8,
    },
    "Krea2Pipeline": {
        "prompt_template_encode_prefix": "",
        "prompt_template_encode_start_idx": 0,
        "prompt_template_encode_suffix": "ab",
        "prompt_template_encode_num_suffix_tokens": 2,
    },
    "DreamLiteMobilePipeline": {
        "prompt_template_encode_generate": "{}",
        "prompt_template_encode_generate_start_idx": 0,
    },
}
"""Attributes, by class, that `save_pretrained` does not keep.

The tiny tokenizers take a token a byte, so that a long prompt template would swallow the prompt.
"""


# ---- what tests call ----------------------------------------------------------------------------


def denoiser(pipe: Pipe) -> nn.Module:
    """Return the network that the sampling loop calls."""
    names = ("transformer", "unet", "prior")
    found = (getattr(pipe, name, None) for name in names)
    return next(network for network in found if network is not None)


def modules(pipe: Pipe) -> list[nn.Module]:
    """Return the components that have weights."""
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def refill(network: nn.Module) -> None:
    """Fill what was zero-initialised, or not at all, with small normals.

    A zero output layer would make the velocity 0 and every check of it vacuous.
    """
    for name, weight in network.named_parameters():
        if name.endswith("pad_token") or not weight.detach().any():
            nn.init.normal_(weight, 0.0, 0.05)


TIME_EMBEDDERS = ("TimestepEmbedding", "TimestepEmbedder", "MLPEmbedder", "Krea2TimestepEmbedding")


def strengthen(network: nn.Module) -> None:
    """Make the embedding of the time four times as large.

    It opens the gates of the blocks, as training does. Those of a fresh network are nearly shut:
    another prompt moved AuraFlow's latents by two parts in ten thousand.
    """
    for module in network.modules():
        if type(module).__name__ in TIME_EMBEDDERS:
            last = [weight for weight in module.parameters() if weight.ndim == 2][-1]
            last.data.mul_(4.0)


def silence(block: Any) -> None:
    """Switch off the progress bars of a modular pipeline's steps."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in getattr(block, "sub_blocks", {}).values():
        silence(inner)


def ready(pipe: Pipe) -> Pipe:
    """Return the pipeline in eval mode, silent, with the settings of its class."""
    for module in modules(pipe):
        module.eval()
    for name, value in SETTINGS.get(type(pipe).__name__, {}).items():
        setattr(pipe, name, value)
    if isinstance(pipe, diffusers.ModularPipeline):
        silence(pipe._blocks)  # `blocks` is a copy; the pipeline's own switch stops one level down
    else:
        pipe.set_progress_bar_config(disable=True)
    return pipe


def build(name: str, seed: int = 0) -> Pipe:
    """Return a tiny pipeline with random weights, the same for the same seed."""
    builder, _, _ = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = builder()
        refill(denoiser(pipe))
        strengthen(denoiser(pipe))
    return ready(pipe)


def save(name: str, folder: str | Path, seed: int = 0) -> Pipe:
    """Build a pipeline, write it into a folder as diffusers does, and return it."""
    pipe = build(name, seed)
    modular = isinstance(pipe, diffusers.ModularPipeline)
    pipe.save_pretrained(str(folder), **({"overwrite_modular_index": True} if modular else {}))
    if name == "prx":  # diffusers writes the config of the encoder, but reads that of both halves
        t5_gemma_config().save_pretrained(Path(folder) / "text_encoder")
    return pipe


def load(folder: str | Path) -> Pipe:
    """Load what `save` wrote, without the network."""
    if not (Path(folder) / "modular_model_index.json").exists():
        return ready(diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True))
    # the saved index names the whole pipeline, so the prompt upsampler comes back: drop it again
    blocks = diffusers.ModularPipeline.from_pretrained(str(folder)).blocks
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = blocks.init_pipeline(str(folder))
    pipe.load_components(dtype=torch.float32)
    return ready(pipe)


def guided(pipe: Pipe, name: str, *, on: bool) -> dict[str, float]:
    """Return the argument that switches classifier-free guidance on or off.

    Where the guider is a component of the pipeline, exchange it and return nothing.
    """
    if GUIDANCE[name] is None:
        return {}
    argument, low, high = GUIDANCE[name]
    value = high if on else low
    if argument != "guider":
        return {argument: value}
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=value))
    return {}


def run(
    pipe: Pipe, name: str, *, steps: int = 2, seed: int = 0, output_type: str = "pt", **call: Any
) -> Tensor:
    """Sample once and return the latents (`output_type="latent"`) or the pictures ("pt")."""
    given = {"prompt": "a red cube", "output_type": output_type, **CALLS[name], **call}
    generator = torch.Generator().manual_seed(seed)
    out = pipe(num_inference_steps=steps, generator=generator, **given)
    if isinstance(pipe, diffusers.ModularPipeline):
        return out.get("latents" if output_type == "latent" else "images")
    return torch.as_tensor(out[0])


# ---- the table of costs -------------------------------------------------------------------------


@contextmanager
def clocked(owner: Any, method: str, seconds: list[float]) -> Iterator[None]:
    """Append the time of each call of a method to `seconds`."""
    called = getattr(owner, method)

    @wraps(called)  # modular pipelines read the signature of the denoiser
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = called(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return out

    setattr(owner, method, timed)
    try:
        yield
    finally:
        delattr(owner, method)


def costs(name: str) -> str:
    """Return one line of the table: the sizes and times of one pipeline."""
    start = time.perf_counter()
    pipe = build(name)
    built = time.perf_counter() - start
    network, decoder = denoiser(pipe), pipe.components.get("vae")
    calls: list[float] = []
    decodes: list[float] = []
    run(pipe, name)  # the first call is slower
    with clocked(network, "forward", calls):
        latents = run(pipe, name, steps=4, output_type="latent")
    shape = "unknown"
    if decoder is not None:
        with clocked(decoder, "decode", decodes):
            shape = str(tuple(run(pipe, name).shape))
    kind = next(key for key, part in pipe.components.items() if part is network)
    call = f"{1e3 * min(calls):6.1f} ms x{len(calls)}"
    decode = f"{1e3 * min(decodes, default=0.0):6.1f} ms"
    row = f"{name:18} {type(pipe).__name__:30} {kind:12} build {built:4.1f} s  call {call}"
    return f"{row}  decode {decode}  latents {tuple(latents.shape)}  pictures {shape}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or NAMES:
        print(costs(chosen), flush=True)
