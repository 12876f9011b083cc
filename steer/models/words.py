"""Prompts as bags of words: small, offline, with a warning about unknown words.

>>> words = BagOfWords(["apple", "red"], width=8)
>>> words.parse("A red, shiny apple")
([2, 1], ['shiny'])
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steer.onto import onto

__all__ = ["IGNORED", "BagOfWords", "Encoded", "split"]

IGNORED = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "with",
        "and",
        "in",
        "on",
        "at",
        "to",
        "by",
        "for",
        "picture",
        "image",
        "photo",
        "emoji",
    ]
)
"""Words without meaning in a bag of words, which are dropped without a warning."""


def split(text: str) -> list[str]:
    """Lower-case words and numbers of `text`, without the ignored ones.

    >>> split("Face with tears of joy")
    ['face', 'tears', 'joy']
    """
    words = re.findall(r"[^\W_]+", text.lower().replace("’", "").replace("'", ""))
    return [w for w in words if w not in IGNORED]


def _forms(word: str) -> Iterable[str]:
    """Return the word, then its plausible singular and plural forms."""
    yield word
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]
    yield word + "s"
    if word.endswith("y"):
        yield word[:-1] + "ies"


class BagOfWords(nn.Module):
    """Text vector: `layer_norm(mlp(sum of word vectors / sqrt(number of words)))`.

    Word order is ignored. The empty prompt is a word of its own (index 0).

    Args:
        vocabulary: the known words, lower case.
        width: size of the word and text vectors.
    """

    def __init__(self, vocabulary: Sequence[str], width: int = 192) -> None:
        super().__init__()
        self.vocabulary = list(vocabulary)
        self._index = {w: i + 1 for i, w in enumerate(self.vocabulary)}
        self.embedding = nn.Embedding(len(self.vocabulary) + 1, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def parse(self, prompt: str) -> tuple[list[int], list[str]]:
        """Return the indices of the words that are known, and the words that are not."""
        known, unknown = [], []
        for word in dict.fromkeys(split(prompt)):
            index = next((self._index[f] for f in _forms(word) if f in self._index), None)
            if index is None:
                unknown.append(word)
            elif index not in known:
                known.append(index)
        return known, unknown

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return word indices (p, l), padded with -1; a prompt without a known word is [0]."""
        rows = [self.parse(p)[0] or [0] for p in prompts]
        length = max(map(len, rows))
        return torch.tensor([r + [-1] * (length - len(r)) for r in rows])

    def bind(self, prompts: Sequence[str], stacklevel: int = 2) -> "Encoded":
        """Return prompts ready to be encoded; words that are not known are dropped with a warning.

        Raises:
            TypeError: a prompt instead of a list of them.
            ValueError: no prompt at all.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts are a list: write given([{prompts!r}])")
        if not prompts:
            raise ValueError('no prompts to bind: give at least one, [""] for none')
        for prompt in prompts:
            known, unknown = self.parse(prompt)
            if unknown:
                rest = "the rest is still used" if known else "it acts as the empty prompt"
                warnings.warn(
                    f"prompt {prompt!r}: not in the model's vocabulary: "
                    f"{', '.join(map(repr, unknown))}; dropped, and {rest}",
                    stacklevel=stacklevel,
                )
        return Encoded(self.tokens(prompts))

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool and transform word indices (p, l) -> text vectors (p, width)."""
        present = (tokens >= 0).unsqueeze(-1).to(self.embedding.weight)
        words = self.embedding(tokens.clamp(min=0)) * present
        pooled = words.sum(1) / present.sum(1).sqrt()
        h = self.mlp(pooled)
        return F.layer_norm(h, h.shape[-1:], self.norm.weight.to(h), self.norm.bias.to(h))


class Encoded:
    """The text vectors of prompts, encoded again only if they may have changed.

    They are cached while the text encoder requires no gradient, its weights (and those of its
    adapters) are unchanged, and its adapters have the same scales. A copy starts with an empty
    cache.

    Args:
        tokens: word indices (p, l).
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._kept: tuple[list[Tensor], tuple[object, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple[Tensor]]:
        return Encoded, (self.tokens.cpu(),)

    def _on(self, device: torch.device) -> Tensor:
        """Return the word indices on a device, where they are kept."""
        self.tokens = onto(self.tokens, device)
        return self.tokens

    def __call__(self, text: BagOfWords, device: torch.device) -> Tensor:
        """Return the text vectors (p, width)."""
        found = _standing(text)
        if found is None:
            return text(self._on(device))
        weights, setting = found
        state = (
            setting,
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
            *((p.data_ptr(), p._version, p.dtype, p.device) for p in weights),
        )
        kept = self._kept
        if kept is not None and kept[1] == state:
            return kept[2]
        made = text(self._on(device))
        # together with the weights, so that their addresses are not reused
        self._kept = [p.detach() for p in weights], state, made
        return made


def _standing(text: nn.Module) -> tuple[list[Tensor], tuple[object, ...]] | None:
    """Return the text encoder's weights and the state of its adapters; None if they may change.

    They may change if they require a gradient, or if there are random operations. Merged adapters
    change weights without changing their version counter.
    """
    if torch.compiler.is_compiling():
        return None
    layers: list[Any] = [m for m in text.modules() if hasattr(m, "disable_adapters")]  # peft's
    on = [m for m in layers if not m.disable_adapters]
    drawing = any(isinstance(m, nn.Dropout) and m.training and m.p for m in text.modules())
    if drawing or any(m.merged for m in on):
        return None
    weights: list[Tensor] = [p for n, p in text.named_parameters() if on or ".lora_" not in n]
    strange = any(type(p) is not nn.Parameter or p.is_inference() for p in weights)
    learning = torch.is_grad_enabled() and any(p.requires_grad for p in weights)
    setting = tuple(
        (id(m), *((a, getattr(m, "scaling", {}).get(a)) for a in m.active_adapters)) for m in on
    )
    return None if strange or learning else (weights, setting)
