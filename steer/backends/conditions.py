"""The conditioning of prompts: recorded for each prompt, joined for the rows of a call."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Condition", "Rows", "dtypes_of", "halves", "rows_of"]

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """The denoiser's arguments for one prompt, apart from state and time.

    Attributes:
        prompt: its arguments by name, for one row.
        negative: those of the negative prompt; None without classifier-free guidance.
        shape: of one state, without the batch axis.
        dtype: arguments with this dtype are converted with the denoiser. It is the denoiser's
            dtype at recording, or, if the text encoders have another one, that in which the
            pipeline would have called the denoiser.
    """

    prompt: Arguments
    negative: Arguments | None
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Rows:
    """A subset of the rows of a call, and their arguments.

    Attributes:
        index: indices of the rows; None for all.
        prompt: the denoiser's arguments.
        negative: those of the negative prompts.
    """

    index: Tensor | None
    prompt: Arguments
    negative: Arguments | None


def rows_of(
    conditions: Sequence[Condition],
    rows: int,
    shared: frozenset[str],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Rows]:
    """Return the arguments of `rows` prompt-major rows, in as few calls as their shapes allow.

    Prompts whose encodings have different lengths cannot share a call: there is one call per
    length.

    Args:
        conditions: one for each of p prompts.
        rows: p * n.
        shared: names of arguments that have no batch axis.
        device: where the arguments go.
        dtype: dtype of arguments that are in the denoiser's precision.
    """
    each = rows // len(conditions)
    alike: dict[str, list[int]] = {}
    for i, one in enumerate(conditions):
        alike.setdefault(_form({"prompt": one.prompt, "negative": one.negative}), []).append(i)
    found = []
    for members in alike.values():
        some = [conditions[i] for i in members]
        index = None
        if len(alike) > 1:
            index = torch.cat([torch.arange(i * each, (i + 1) * each) for i in members])
        was = some[0].dtype

        def joined(all_of: Sequence[Arguments], was: torch.dtype = was) -> Arguments:
            return {
                k: _moved(
                    _joined([one[k] for one in all_of], each, k in shared), device, was, dtype
                )
                for k in all_of[0]
            }

        negatives = [c.negative for c in some if c.negative is not None]
        found.append(
            Rows(
                None if index is None else index.to(device),
                joined([c.prompt for c in some]),
                joined(negatives) if negatives else None,
            )
        )
    return found


def halves(arguments: Arguments, count: int = 2) -> Iterator[Arguments]:
    """Split arguments into parts of `count` rows."""
    for i in range(count):
        yield {k: _part(v, count, i) for k, v in arguments.items()}


def dtypes_of(value: Any) -> set[torch.dtype]:
    """Return the floating dtypes in arguments."""
    if isinstance(value, Tensor):
        return {value.dtype} if value.is_floating_point() else set()
    inside = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple):
        return set()
    return set().union(*map(dtypes_of, inside))


def _part(value: Any, count: int, i: int) -> Any:
    if isinstance(value, Mapping):
        return {k: _part(v, count, i) for k, v in value.items()}
    if isinstance(value, Tensor) and value.ndim and len(value) == count:
        return value[i : i + 1]
    if isinstance(value, list) and len(value) == count:
        return value[i : i + 1]
    return value


def _form(value: Any) -> str:
    """Return a key that is equal for arguments that can be joined."""
    if isinstance(value, Mapping):
        return str({k: _form(v) for k, v in value.items()})
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, list) and value and isinstance(value[0], Mapping | list | Tensor):
        return "rows"  # a list has one entry per row, of any length
    return repr(value) if not isinstance(value, list | tuple) else str([_form(v) for v in value])


def _joined(values: Sequence[Any], each: int, shared: bool) -> Any:
    """Join one argument of several prompts, each for `each` rows."""
    first = values[0]
    if isinstance(first, Mapping):
        return {k: _joined([v[k] for v in values], each, shared) for k in first}
    if shared:
        return first
    if isinstance(first, list) and len(first) == 1:
        return [row for value in values for row in value for _ in range(each)]
    if isinstance(first, Tensor) and first.ndim and len(first) == 1:
        if len(values) == 1:
            return first.expand(each, *first.shape[1:])
        return torch.cat(list(values)).repeat_interleave(each, 0)
    return first


def _moved(value: Any, device: torch.device, was: torch.dtype, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {k: _moved(v, device, was, dtype) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(v, device, was, dtype) for v in value]
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.dtype == was else None)
    return value
