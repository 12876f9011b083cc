"""Count the bytes of live tensors, now and at the peak, and those kept for a backward pass.

`Live` counts real tensors and fake ones (with shapes but no values) in the same way, so that a
forecast and a measurement are comparable.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Live", "bytes_of", "fake_mode", "fused", "saved_bytes"]


class Live(TorchDispatchMode):
    """Count the bytes of existing storages while it is active.

    A storage counts once, for any number of tensors on it, from its creation until it is freed.
    Memory inside kernels, and memory that the allocator caches, is not counted.

    Attributes:
        now: bytes that are alive now.
        peak: the maximum so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def hold(self, *modules: nn.Module) -> "Live":
        """Count the parameters and buffers of modules that existed before."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self.note(tensor)
        return self

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it was not counted before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, gone)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors, each counted once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def saved_bytes(run: Callable[[], Any], beside: Iterable[Tensor] = ()) -> int:
    """Return the bytes that a call keeps for its backward pass, each storage counted once.

    Args:
        run: the call; its result is dropped.
        beside: tensors that exist in any case: parameters and buffers.
    """
    own = {t.untyped_storage()._cdata for t in beside}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, (storage.nbytes(), storage))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(size for size, _ in kept.values())


class _Mode(FakeTensorMode):
    """A mode that is shared by copies of its tensors, because copying the mode itself crashes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Mode":
        return self


def fake_mode() -> FakeTensorMode:
    """Return a mode whose tensors have no values, but may be mixed with real times and masks."""
    return _Mode(allow_non_fake_inputs=True)


_PLAIN_ATTENTION, _PLAIN_NORM = F.scaled_dot_product_attention, F.rms_norm


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if not isinstance(input, FakeTensor) or (weight is not None and weight.dtype != input.dtype):
        return _PLAIN_NORM(input, normalized_shape, weight, eps)
    return _OneKernel.apply(input, weight)


class _OneKernel(torch.autograd.Function):
    """An RMS norm that keeps its input and one number per row, like CUDA's kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        rows = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        wanted = weight is not None and ctx.needs_input_grad[1]
        return torch.empty_like(x), torch.empty_like(weight) if wanted else None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not any(isinstance(t, FakeTensor) for t in (query, key, value)):
        return _PLAIN_ATTENTION(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        heads = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(heads, -3) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as the kernel needs it: a bias
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    lead = query.shape[:-3]
    if len(lead) != 1:  # the kernel needs (n, heads, length, width)
        query, key, value = (t.reshape(-1, *t.shape[-3:]) for t in (query, key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[1:])


@contextmanager
def fused(cuda: bool = True) -> Iterator[None]:
    """Use a device's fused kernels for tensors without values.

    Attention uses a fused kernel, whose memory is linear in the length; by default, tensors
    without values use the plain implementation, which is quadratic. On CUDA, RMS norms use a fused
    kernel, too; the CPU has none, and keeps the intermediate results. Real tensors are not
    affected.

    torch's functions are replaced and restored, because a torch function mode would not be active
    when checkpointing recomputes them in the backward pass.

    Args:
        cuda: whether the device is a CUDA device.
    """
    F.scaled_dot_product_attention = _attention
    F.rms_norm = _rms_norm if cuda else _PLAIN_NORM
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = _PLAIN_ATTENTION, _PLAIN_NORM
