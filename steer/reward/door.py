"""Checks around the call of a reward: images, scores, and modules in evaluation mode."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Rest", "at_rest", "check_images", "check_scores", "plain", "refuse_inference"]


def check_images(images: Tensor, pictures: bool = True) -> None:
    """Refuse images that a reward would misinterpret.

    Args:
        images: the images to score.
        pictures: whether a batch with four axes contains pictures (n, 3, h, w).

    Raises:
        TypeError: the images are not a tensor.
        ValueError: integers, or pictures with another number or order of channels.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"a reward got a {type(images).__name__}: give a tensor (n, 3, h, w) of floats in [0, "
            "1]"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}: a reward sees floats in [0, 1], so divide bytes by 255 "
            "and 16 bits by 65535"
        )
    if not pictures or images.ndim != 4 or images.shape[1] == 3:
        return
    shape = tuple(images.shape)
    mend = {
        1: "grey ones need images.expand(-1, 3, -1, -1)",
        4: "paste transparent ones on white first",
    }.get(images.shape[1], "decode the samples to pictures")
    if images.shape[-1] in {3, 4}:
        mend = "channels go before rows and columns, images.permute(0, 3, 1, 2)"
    raise ValueError(
        f"images of shape {shape}: a reward sees pictures (n, 3, h, w), so {mend}; a reward of "
        "something else than pictures says so, wrap(f, clamp=False) or pictures = False"
    )


def check_scores(scores: Tensor, images: Tensor, name: str) -> Tensor:
    """Return the scores (n,) as floats on the device of the images.

    Args:
        scores: what the reward returned.
        images: the scored images, (n, ...).
        name: of the reward.

    Raises:
        ValueError: it returned something else; the message says what.
    """
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"reward {name!r} returned {type(scores).__name__}: return a tensor of shape (n,)"
        )
    if scores.shape != images.shape[:1]:
        raise ValueError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {len(images)} images: "
            f"return one number per image, shape ({len(images)},), not reduced over the batch"
        )
    if not scores.is_floating_point():
        scores = scores.to(torch.float32)
    return scores.to(images.device)


_LOCK = threading.Lock()
_HELD: dict[int, tuple[nn.Module, list[int], list[nn.Module], list[Tensor]]] = {}
"""Modules that are held: by how many, and what to restore when the last one releases them."""


class Rest:
    """Modules that are held repeatedly, at each step of a run; their members are listed only once.

    Submodules that are added later are not held.

    Args:
        *modules: the modules.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self.members = [(m, list(m.modules()), list(m.parameters())) for m in modules]


def _hold(module: nn.Module, inside: Iterable[nn.Module], parameters: Iterable[Tensor]) -> None:
    with _LOCK:
        if id(module) not in _HELD:
            training = [m for m in inside if m.training]
            asking = [p for p in parameters if p.requires_grad and not p.is_inference()]
            _HELD[id(module)] = module, [0], training, asking
            for m in training:
                m.training = False
            for p in asking:
                p.requires_grad_(False)
        _HELD[id(module)][1][0] += 1


def _let_go(module: nn.Module) -> None:
    with _LOCK:
        _, holders, training, asking = _HELD[id(module)]
        holders[0] -= 1
        if holders[0]:
            return
        del _HELD[id(module)]
        for m in training:
            m.training = True
        for p in asking:
            p.requires_grad_(True)


@contextmanager
def at_rest(*modules: nn.Module | Rest) -> Iterator[None]:
    """Hold modules in evaluation mode with frozen weights, and restore both afterwards.

    In training mode dropout would change the scores and batch statistics would be updated, and
    weights that require gradients would receive them. A module that several threads hold is
    restored by the last one.
    """
    held: list[nn.Module] = []
    try:
        for given in modules:
            known = given.members if isinstance(given, Rest) else Rest(given).members
            for module, inside, parameters in known:
                _hold(module, inside, parameters)
                held.append(module)
        yield
    finally:
        for module in held:
            _let_go(module)


def refuse_inference(what: str, module: nn.Module) -> None:
    """Raise a ValueError if weights were made in inference mode, so that no gradient can pass.

    Args:
        what: owner of the weights, for the message.
        module: the module that the gradient must pass.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    found = [name for name, tensor in named if tensor.is_inference()]
    if found:
        raise ValueError(
            f"a gradient must pass the {what}, and {len(found)} of its weights were made inside "
            f"torch.inference_mode(), {found[0]} the first of them: make or load it outside of "
            "that (torch.no_grad() is fine)"
        )


@contextmanager
def plain(*modules: nn.Module | Rest, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run independently of the caller's state of torch, so that the results are the same.

    Inference mode and autocast are off, and modules are in evaluation mode. Tensors made in this
    context can be differentiated. The gradient mode is not changed.

    Args:
        modules: held as `at_rest` does.
        dtype: torch's default dtype in the context. Default: not changed.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if dtype is not None:
            torch.set_default_dtype(dtype)
            stack.callback(torch.set_default_dtype, before)
        stack.enter_context(at_rest(*modules))
        yield
