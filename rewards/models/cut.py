"""Prompts that are longer than the text tower's limit: one warning per prompt."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["warn_of_cut"]


def warn_of_cut(texts: Sequence[str], tokenizer: Callable[[list[str]], Any]) -> None:
    """Warn about each text that is cut; say how many tokens are kept and where they end.

    A text is cut if its tokens do not change when a letter is removed and when words are added.

    Args:
        texts: the texts to encode.
        tokenizer: texts -> ids (n, length), or a dict or tuple that holds them.
    """
    for text in _cut(texts, tokenizer):
        ids = _ids(tokenizer, [text])
        low, high = 0, len(text)  # the shortest prefix with the same tokens
        while low < high:
            middle = (low + high) // 2
            same = torch.equal(_ids(tokenizer, [text[:middle]]), ids)
            low, high = (low, middle) if same else (middle + 1, high)
        warnings.warn(
            f"a reward reads the first {ids.shape[1]} tokens of a prompt, and this one is longer: "
            f"everything after {_end(text[:low])!r} is ignored in {_start(text)!r}",
            stacklevel=2,
        )


def _cut(texts: Sequence[str], tokenizer: Callable[[list[str]], Any]) -> Iterable[str]:
    """Yield the texts that are cut."""
    kept = [text.strip() for text in texts]
    if not kept:
        return
    length = _ids(tokenizer, kept[:1]).shape[1]
    long = [text for text in kept if len(text.encode()) + 2 > length]  # a token is 1 byte or more
    if not long:
        return
    ids = _ids(tokenizer, long)
    less = _ids(tokenizer, [text[:-1] for text in long])
    more = _ids(tokenizer, [f"{text} and more" for text in long])
    for i, text in enumerate(long):
        if torch.equal(ids[i], less[i]) and torch.equal(ids[i], more[i]):
            yield text


def _ids(tokenizer: Callable[[list[str]], Any], texts: list[str]) -> Tensor:
    found = tokenizer(texts)
    if isinstance(found, dict):
        found = found["input_ids"]
    return (found[0] if isinstance(found, tuple) else found).cpu()


def _end(text: str) -> str:
    return text if len(text) <= 30 else f"... {text[-30:]}"


def _start(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]} ..."
