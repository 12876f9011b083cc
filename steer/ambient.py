"""Shield a run from the caller's state of torch: inference mode, autocast, training mode."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from steer.reward import at_rest

__all__ = ["plain"]


@contextmanager
def plain(*modules: nn.Module) -> Iterator[None]:
    """Run as if called plainly: no inference mode, no autocast, modules in evaluation mode.

    Tensors that are made within can be differentiated. The gradient mode is left alone.

    Args:
        modules: held as `steer.reward.at_rest` does.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(at_rest(*modules))
        yield
