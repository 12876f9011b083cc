"""Public models by a short name: their pipeline, and the sizes of its components.

Values that are missing here are the class's defaults in diffusers. If those belong to another
model, the numbers are from the model's page. A folder's own files take precedence.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["PUBLIC", "Public"]

Config = Mapping[str, Any]
Part = tuple[str, Config]
"""A class of diffusers or transformers, and its configuration."""


class Public(NamedTuple):
    """A public model.

    Attributes:
        pipeline: class of its pipeline.
        parts: name of a component in the pipeline -> its class and configuration.
        size: height and width of its pictures.
        source: source of the numbers.
        hub: its repository.
        more: further arguments of the pipeline's call.
        options: options of `PipelineFlow` that are otherwise deduced from the model's name.
    """

    pipeline: str
    parts: Mapping[str, Part]
    size: tuple[int, int]
    source: str
    hub: str
    more: Config = MappingProxyType({})
    options: Config = MappingProxyType({})


_CLIP_L: Part = (
    "CLIPTextModel",
    {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
     "num_hidden_layers": 12, "projection_dim": 768},
)  # fmt: skip
_CLIP_L_PROJECTED: Part = ("CLIPTextModelWithProjection", _CLIP_L[1])
_CLIP_G: Part = (
    "CLIPTextModelWithProjection",
    {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
     "num_hidden_layers": 32, "projection_dim": 1280},
)  # fmt: skip
_T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
       "feed_forward_proj": "gated-gelu"}  # fmt: skip
_T5_XXL: Part = ("T5EncoderModel", {**_T5, "vocab_size": 32128})
_UMT5_XXL: Part = ("UMT5EncoderModel", {**_T5, "vocab_size": 256384})
_BYT5: Part = (
    "T5EncoderModel",
    {"vocab_size": 384, "d_model": 1472, "d_ff": 3584, "d_kv": 64, "num_layers": 12,
     "num_heads": 6, "feed_forward_proj": "gated-gelu"},
)  # fmt: skip
_GEMMA_2B: Part = (
    "Gemma2Model",
    {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
     "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000},
)  # fmt: skip
_QWEN3 = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
_QWEN3_4B: Part = ("Qwen3Model", _QWEN3)
_QWEN3_VL_4B: Part = (
    "Qwen3VLForConditionalGeneration",
    {
        "text_config": _QWEN3, "tie_word_embeddings": True,
        "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
                          "num_heads": 16, "out_hidden_size": 2560},
    },
)  # fmt: skip
_QWEN25_VL_7B: Part = (
    "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4,
                        "vocab_size": 152064},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
                          "num_heads": 16, "out_hidden_size": 3584},
    },
)  # fmt: skip

_FLOW: Part = ("FlowMatchEulerDiscreteScheduler", {})
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "steps_offset": 1}  # fmt: skip


def _kl(channels: int, scale: float, shift: float | None = None, quant: bool = False) -> Part:
    config = {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": channels,
        "sample_size": 1024, "scaling_factor": scale, "shift_factor": shift,
        "use_quant_conv": quant, "use_post_quant_conv": quant,
    }  # fmt: skip
    return "AutoencoderKL", config


_FLUX_VAE = _kl(16, 0.3611, 0.1159)
_DC_VAE: Part = (
    "AutoencoderDC",
    {
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
        "upsample_block_type": "interpolate", "downsample_block_type": "conv",
        "scaling_factor": 0.41407,
    },
)  # fmt: skip
_HUNYUAN_VAE: Part = (
    "AutoencoderKLHunyuanImage",
    {"in_channels": 3, "out_channels": 3, "latent_channels": 64,
     "block_out_channels": (128, 256, 512, 512, 1024, 1024), "layers_per_block": 2,
     "spatial_compression_ratio": 32, "sample_size": 384, "scaling_factor": 0.75289},
)  # fmt: skip
_SDXL_UNET: Part = (
    "UNet2DConditionModel",
    {
        "block_out_channels": (320, 640, 1280), "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)  # fmt: skip


def _flux(dev: bool) -> Mapping[str, Part]:
    return {
        "transformer": ("FluxTransformer2DModel", {"guidance_embeds": dev}),
        "vae": _FLUX_VAE, "text_encoder": _CLIP_L, "text_encoder_2": _T5_XXL, "scheduler": _FLOW,
    }  # fmt: skip


def _sprint(config: Config) -> Mapping[str, Part]:
    shared = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return {
        "transformer": ("SanaTransformer2DModel", {**shared, **config}),
        "vae": _DC_VAE, "text_encoder": _GEMMA_2B, "scheduler": ("SCMScheduler", {}),
    }  # fmt: skip


CLASS = "defaults of diffusers' class"
PAGE = "the model's page"
BOTH = "defaults of diffusers' classes; autoencoder and text encoders by the model's page"

PUBLIC: Mapping[str, Public] = MappingProxyType(
    {
        "sd15": Public(
            "StableDiffusionPipeline",
            {
                "unet": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}),
                "vae": _kl(4, 0.18215, quant=True), "text_encoder": _CLIP_L,
                "scheduler": ("PNDMScheduler", {**_BETAS, "skip_prk_steps": True}),
            },
            (512, 512), BOTH, "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        "sdxl": Public(
            "StableDiffusionXLPipeline",
            {
                "unet": _SDXL_UNET, "vae": _kl(4, 0.13025, quant=True), "text_encoder": _CLIP_L,
                "text_encoder_2": _CLIP_G, "scheduler": ("EulerDiscreteScheduler", _BETAS),
            },
            (1024, 1024), PAGE, "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        "sd3-medium": Public(
            "StableDiffusion3Pipeline",
            {
                "transformer": (
                    "SD3Transformer2DModel",
                    {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                     "pos_embed_max_size": 192},
                ),
                "vae": _kl(16, 1.5305, 0.0609), "text_encoder": _CLIP_L_PROJECTED,
                "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL, "scheduler": _FLOW,
            },
            (1024, 1024), PAGE, "stabilityai/stable-diffusion-3-medium-diffusers",
        ),
        "sana-sprint-0.6b": Public(
            "SanaSprintPipeline",
            _sprint({"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16,
                     "cross_attention_head_dim": 72, "cross_attention_dim": 1152}),
            (1024, 1024), PAGE, "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
        ),
        "sana-sprint-1.6b": Public(
            "SanaSprintPipeline", _sprint({}),
            (1024, 1024), BOTH, "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        ),
        "flux3-klein": Public(
            "Flux3DistilledModularPipeline",
            {
                "transformer": ("Flux3Transformer2DModel", {"flow_map": True}),
                "vae": ("AutoencoderKLFlux2", {}), "text_encoder": _QWEN3_VL_4B,
                "scheduler": _FLOW,
            },
            (1024, 1024), CLASS + "; the text encoder by the width that the transformer takes",
            "black-forest-labs/flux-3-image-klein",
        ),
        "flux-schnell": Public(
            "FluxPipeline", _flux(False), (1024, 1024), BOTH, "black-forest-labs/FLUX.1-schnell"
        ),
        "flux-dev": Public(
            "FluxPipeline", _flux(True), (1024, 1024), BOTH, "black-forest-labs/FLUX.1-dev"
        ),
        "z-image-turbo": Public(
            "ZImagePipeline",
            {
                "transformer": ("ZImageTransformer2DModel", {}), "vae": _FLUX_VAE,
                "text_encoder": _QWEN3_4B, "scheduler": _FLOW,
            },
            (1024, 1024), BOTH, "Tongyi-MAI/Z-Image-Turbo",
            options=MappingProxyType({"kind": "one-jump"}),
        ),
        "qwen-image": Public(
            "QwenImagePipeline",
            {
                "transformer": ("QwenImageTransformer2DModel", {}),
                "vae": ("AutoencoderKLQwenImage", {}), "text_encoder": _QWEN25_VL_7B,
                "scheduler": _FLOW,
            },
            (1024, 1024), BOTH, "Qwen/Qwen-Image",
        ),
        "hunyuan-image": Public(
            "HunyuanImagePipeline",
            {
                "transformer": (
                    "HunyuanImageTransformer2DModel",
                    {"guidance_embeds": True, "use_meanflow": True, "text_embed_2_dim": 1472},
                ),
                "vae": _HUNYUAN_VAE, "text_encoder": _QWEN25_VL_7B, "text_encoder_2": _BYT5,
                "scheduler": _FLOW,
            },
            (2048, 2048), BOTH,
            "hunyuanvideo-community/HunyuanImage-2.1-Distilled-Diffusers",
        ),
        "wan-1.3b": Public(
            "WanPipeline",
            {
                "transformer": (
                    "WanTransformer3DModel",
                    {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
                ),
                "vae": ("AutoencoderKLWan", {}), "text_encoder": _UMT5_XXL, "scheduler": _FLOW,
            },
            (480, 832), PAGE, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            MappingProxyType({"num_frames": 9}),
        ),
    }
)  # fmt: skip
"""Short name -> the model."""
