"""A small untrained Stable Diffusion pipeline of diffusers' own classes, and its training flow.

The classes are standard ones: `StableDiffusionPipeline` with an `AutoencoderKL`, a `CLIPTextModel`
and a `UNet2DConditionModel` that predicts the velocity of a rectified flow. Only
`steer.backends.second_time.SecondTime` is added, which makes the velocity a flow map.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from steer.backends.latents import Codec
from steer.backends.pipeline import rows_time
from steer.backends.second_time import SecondTime
from steer.flow import FlowMap, per_row
from steer.path import Linear, Time, as_time, like

__all__ = ["PipelineTraining", "autoencoder", "pairs_merged", "tokenizer", "untrained"]

LENGTH = 24
"""Tokens of a prompt, including both end tokens."""


def tokenizer(texts: Sequence[str], size: int = 2048) -> Any:
    """Return a CLIP tokenizer whose byte pairs were merged on a list of texts.

    The same texts give the same tokenizer. (The trainer of `tokenizers` breaks ties at random, and
    a resumed run must not have another tokenizer.)

    Args:
        texts: texts with the words of the vocabulary, frequent ones first; other words are split
            into letters.
        size: maximum size of the vocabulary.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.Whitespace()
    found = (word for text in texts for word, _ in split.pre_tokenize_str(text.lower()))
    words = Counter(word for word in found if word.isascii())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = list(pairs_merged(words, size - len(tokens) - 2))
    tokens += list(dict.fromkeys(a + b for a, b in merges))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def pairs_merged(words: Mapping[str, int], most: int) -> Iterator[tuple[str, str]]:
    """Yield the merges of byte-pair encoding, the most frequent pair first (Sennrich et al. 2016).

    Of equally frequent pairs the alphabetically last comes first (1508.07909).

    Args:
        words: word -> frequency.
        most: number of merges.
    """
    parts = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    for _ in range(most):
        counts: Counter[tuple[str, str]] = Counter()
        for word, part in parts.items():
            for pair in pairwise(part):
                counts[pair] += words[word]
        if not counts:
            return
        best = max(counts, key=lambda pair: (counts[pair], pair))
        yield best
        for word, part in parts.items():
            if best[0] in part:
                parts[word] = _joined(part, best)


def _joined(part: list[str], pair: tuple[str, str]) -> list[str]:
    made: list[str] = []
    for symbol in part:
        if made and (made[-1], symbol) == pair:
            made[-1] += symbol
        else:
            made.append(symbol)
    return made


def autoencoder(channels: Sequence[int] = (24, 48), latent: int = 4) -> Any:
    """Return an untrained AutoencoderKL that halves the sides at each level after the first.

    Args:
        channels: channels of each level.
        latent: channels of the latent.
    """
    from diffusers import AutoencoderKL

    levels = len(channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(channels),
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
    )


def untrained(
    tokens: Any,
    vae: Any,
    *,
    channels: Sequence[int] = (48, 96, 160),
    blocks: int = 1,
    text_width: int = 128,
) -> "PipelineTraining":
    """Return the flow of an untrained UNet and text encoder.

    Args:
        tokens: the tokenizer, see `tokenizer`.
        vae: the autoencoder, trained.
        channels: channels of each level of the UNet; only the middle has attention.
        blocks: residual blocks of each level, on the way down.
        text_width: width of the text encoder, which has two layers.
    """
    import diffusers
    import transformers

    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_attention_heads=text_width // 32,
            num_hidden_layers=2,
            vocab_size=len(tokens),
            max_position_embeddings=LENGTH,
            hidden_act="gelu",
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=["DownBlock2D"] * len(channels),
        up_block_types=["UpBlock2D"] * len(channels),
        block_out_channels=list(channels),
        layers_per_block=blocks,
        cross_attention_dim=text_width,
        attention_head_dim=[c // 32 for c in channels],  # diffusers' name for the number of heads
        norm_num_groups=16,
        addition_embed_type="text",  # pooled by attention, added to the time
        encoder_hid_dim=None,
        addition_embed_type_num_heads=text_width // 32,
    )
    return PipelineTraining(unet, vae, encoder, tokens)


class PipelineTraining(FlowMap):
    """The pipeline as a flow whose UNet, text encoder and second time can be trained.

    `steer.load` binds prompts by the pipeline's own call, without gradients; here they are encoded
    as `StableDiffusionPipeline.encode_prompt` does, with gradients.

    Args:
        unet: the denoiser.
        vae: the autoencoder, which is not trained.
        encoder: the text encoder.
        tokens: its tokenizer.
    """

    def __init__(self, unet: Any, vae: Any, encoder: Any, tokens: Any) -> None:
        super().__init__()
        self.path = Linear()
        config = unet.config
        self.event_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.network, self.vae, self.tokenizer = unet, vae.requires_grad_(False), tokens
        self.encoder = encoder
        width = unet.time_embedding.linear_2.out_features
        self.second_time = SecondTime("time_embedding", width)
        self._bound: Tensor | None = None

    def given(self, prompts: Sequence[str]) -> Self:
        """Bind p prompts: the result takes p * n rows, prompt-major."""
        view = copy.copy(self)
        view._modules = dict(self._modules)
        distinct = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        tokens = self.tokenizer(
            distinct, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        )
        states = self.encoder(tokens.input_ids.to(self.encoder.device))[0]
        view._bound = states[torch.tensor([place[p] for p in prompts], device=states.device)]
        return view

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x)`, the map's diagonal, (n, *event)."""
        return self.mean_velocity(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x) = x + (t-s) v(x,s,t)`, (n, *event)."""
        return x + like(as_time(t) - as_time(s), x) * self.mean_velocity(x, s, t)

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return v(x, s, t), (n, *event)."""
        return -self._predict(x, s, t)

    def _predict(self, x: Tensor, s: Time, t: Time) -> Tensor:
        if self._bound is None:
            raise ValueError("no prompts are bound: call flow.given([...]) first")
        states = per_row(self._bound, len(x))
        now, target = 1 - rows_time(s, x), 1 - rows_time(t, x)
        with self.second_time.told(self.network, now, target):
            return self.network(x, 1000 * now, states, return_dict=False)[0].to(x)

    def decode(self, x: Tensor) -> Tensor:
        """Return pictures (n, 3, h, w), not clamped."""
        return Codec(self.vae, "grid", (0, 0)).decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return the states of pictures (n, 3, h, w) in [0, 1]."""
        return Codec(self.vae, "grid", (0, 0)).encode(images, True)

    def assembled(self) -> Any:
        """Return the pipeline with this flow's own modules.

        Its scheduler takes Euler steps of the velocity, from noise level .999 to 0.
        """
        import diffusers

        return diffusers.StableDiffusionPipeline(
            unet=self.network,
            scheduler=diffusers.DPMSolverMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                solver_order=1,
                steps_offset=1,
            ),
            vae=self.vae,
            text_encoder=self.encoder,
            tokenizer=self.tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
