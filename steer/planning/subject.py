"""The model of a plan: a flow whose tensors have no values, and the sizes of its parts."""

import copy
import dataclasses
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from steer.catalogue import MODELS
from steer.doors import is_pipeline
from steer.flow import FlowMap
from steer.planning.live import bytes_of, fake_mode

__all__ = ["Subject", "faked", "outlined_flow", "subject"]


@dataclass(frozen=True)
class Subject:
    """A flow without values, with a prompt bound, and the sizes of its parts.

    Attributes:
        flow: the flow; its denoiser and decoder are called.
        mode: mode of its tensors.
        name: name of the model.
        source: source of its sizes.
        parameters: part -> number of parameters.
        weights: part -> bytes.
        beside: bytes of parts that are in memory but not called, such as text encoders.
        cuda: whether the plan is for a CUDA device.
    """

    flow: Any
    mode: FakeTensorMode
    name: str
    source: str
    parameters: Mapping[str, int]
    weights: Mapping[str, int]
    beside: int
    cuda: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        shape = tuple(self.flow.event_shape)
        known = getattr(self.flow, "height", None), getattr(self.flow, "width", None)
        return (known[0] or shape[-2], known[1] or shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights."""
        return next(self.flow.denoiser.parameters()).dtype

    def start(self, rows: int) -> Tensor:
        """Return a start without values, (rows, *event)."""
        with self.mode:
            return torch.zeros(rows, *self.flow.event_shape)


def subject(
    model: Any,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    text_tokens: int | None = None,
    cuda: bool = True,
    mode: FakeTensorMode | None = None,
    **options: Any,
) -> Subject:
    """Return the model of a plan, without reading a pipeline's weights.

    Args:
        model: a pipeline by its folder, its hub id or a short name of `steer.backends.sizes`, or a
            live one; an embedded model, a folder in our format, file.py:Name or a flow map (these
            are loaded).
        height: of the pictures. Default: the model's own.
        width: likewise.
        dtype: of its weights. Default: bfloat16 for a pipeline on CUDA, else float32.
        text_tokens: number of text tokens of the denoiser. Default: the length that prompts are
            padded to, else a typical number.
        cuda: whether the plan is for a CUDA device.
        mode: of the tensors. Default: a new one.
        **options: of the pipeline, see `steer.load`.

    Raises:
        ValueError: a model that is none of these, or a size that it does not support.
    """
    text, mode = isinstance(model, str | os.PathLike), mode or fake_mode()
    name = os.fspath(model) if text else ""
    own: Any = getattr(model, "flow", model)
    if hasattr(own, "pipe") and hasattr(own, "mixes"):  # a pipeline that is wrapped as a flow
        known: dict[str, Any] = {"call": own.call_arguments, "checkpointing": own.checkpointing}
        if own.mixes:
            known["cfg"] = own.no_cfg if own.cfg is None else own.cfg
        height, width, options = height or own.height, width or own.width, {**known, **options}
        dtype, model = dtype or next(own.network.parameters()).dtype, own.pipe
    elif text and os.fspath(model) in MODELS:
        from steer.models.folder import ZOO

        name, model = os.fspath(model), ZOO / os.fspath(model)
    known_name = isinstance(model, str | os.PathLike) and _is_pipeline(model)
    if is_pipeline(model) or known_name:
        kind = dtype or (torch.bfloat16 if cuda else torch.float32)
        return _of_pipeline(model, name, (height, width), kind, text_tokens, cuda, mode, options)
    if height is not None or width is not None:
        raise ValueError("this model has pictures of one size: leave height and width out")
    return _of_flow(model, name, dtype, cuda, mode, options)


def _is_pipeline(model: str | os.PathLike[str]) -> bool:
    from steer.backends.folders import INDEX, MODULAR
    from steer.backends.outline import names_public
    from steer.hub import is_hub_id

    folder = Path(model)
    if folder.is_dir():
        return any((folder / name).is_file() for name in (INDEX, MODULAR))
    text = os.fspath(model)
    return names_public(model) is not None or is_hub_id(text) or not _ours(text)


def _ours(text: str) -> bool:
    """Return whether a text may be a model that `steer.load` itself reads."""
    return Path(text).exists() or ".py:" in text


def _of_pipeline(
    model: Any,
    name: str,
    size: tuple[int | None, int | None],
    dtype: torch.dtype,
    tokens: int | None,
    cuda: bool,
    mode: FakeTensorMode,
    options: Mapping[str, Any],
) -> Subject:
    flow, condition, texts, plan = outlined_flow(model, size, dtype, tokens, mode, options)
    flow = flow.bound_to(
        [
            dataclasses.replace(
                condition,
                prompt=faked(condition.prompt, mode),
                negative=faked(condition.negative, mode),
            )
        ]
    )
    parts = {**texts, flow.network_name: flow.network, "vae": flow.vae}
    return Subject(
        flow, mode, name or flow.name or plan.pipeline, plan.source,
        {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()},
        {key: _weight(part) for key, part in parts.items()},
        sum(_weight(part) for part in texts.values()), cuda,
    )  # fmt: skip


def outlined_flow(
    model: Any,
    size: tuple[int | None, int | None],
    dtype: torch.dtype,
    tokens: int | None,
    mode: AbstractContextManager[Any],
    options: Mapping[str, Any],
) -> tuple[Any, Any, dict[str, nn.Module], Any]:
    """Return a pipeline's flow, made from configurations, and the condition of a prompt for it.

    Args:
        model: the pipeline: a folder, a hub id, a short name or a live one.
        size: height and width; None: the model's own.
        dtype: of the weights.
        tokens: of text. Default: the pipeline's own number.
        mode: how weights are made: a `FakeTensorMode`, or a `torch.device` for random ones.
        options: of the pipeline.

    Returns:
        The flow, the condition (on the CPU), the text encoders (on the meta device) and the
        blueprint.
    """
    from steer.backends.outline import blueprint, default_size, outlined
    from steer.backends.stand_ins import stand_in
    from steer.backends.table import flow_of

    plan, (height, width) = blueprint(model), size
    pipe, texts = outlined(plan, mode, dtype)
    if height is None or width is None:
        usual = default_size(plan, pipe)
        height, width = height or usual[0], width or usual[1]
    call = {**plan.call, **dict(options.get("call") or {})}
    given = {**plan.options, **options, "call": call, "height": height, "width": width}
    flow: Any = flow_of(pipe, **given)
    return flow, stand_in(flow, tokens), texts, plan


def _of_flow(
    model: Any,
    name: str,
    dtype: torch.dtype | None,
    cuda: bool,
    mode: FakeTensorMode,
    options: Mapping[str, Any],
) -> Subject:
    if isinstance(model, FlowMap):
        flow = model
    else:
        from steer.models.loading import load

        flow = load(
            model, dtype=dtype, **{k: v for k, v in options.items() if k != "checkpointing"}
        )
    name = name or flow.name or type(flow).__name__
    flow = flow.given([""])
    beside = {id(v): v for v in vars(flow).values() if isinstance(v, list)}  # a posterior map
    with FakeCopyMode(mode):
        flow = copy.deepcopy(flow, beside)
    flow.requires_grad_(False)
    inner = flow.denoiser
    parts = {"denoiser": inner}
    rest = [p for p in flow.parameters() if not any(p is q for q in inner.parameters())]
    weights = {"denoiser": _weight(inner)}
    if rest:
        weights["the rest"] = bytes_of(rest)
    return Subject(
        flow, mode, name, "the model's own files",
        {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()},
        weights, 0, cuda,
    )  # fmt: skip


def faked(value: Any, mode: FakeTensorMode) -> Any:
    """Replace floating tensors in a tree by tensors without values; other tensors stay real."""

    def one(leaf: Any) -> Any:
        wanted = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return mode.from_tensor(leaf) if wanted and not isinstance(leaf, FakeTensor) else leaf

    return tree_map(one, value)


def _weight(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers, also of those on the meta device."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
