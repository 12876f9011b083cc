"""Record the arguments that a pipeline passes to its denoiser.

The denoiser's `forward` is replaced for one call of the pipeline by a function that keeps the
arguments and ends the call. So prompts, position ids, guidance and size embeddings and the time
grid are the pipeline's own, for any class, and none of its code is duplicated here.
"""

import copy
import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from steer.reward import at_rest, plain

__all__ = ["Answer", "Recorder", "instead", "modules_of"]

KEPT = 64
"""Number of prompts whose encodings are cached, while the text encoders exist."""


class Answer(tuple[Tensor]):
    """A denoiser's return value, both as a tuple of one and as an object with `sample`."""

    @property
    def sample(self) -> Tensor:
        """The prediction."""
        return self[0]


class _Reached(Exception):
    """Raised when the expected call has been recorded."""


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """Return a pipeline's modules by their names in it."""
    return {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}


class Recorder:
    """Record the calls that a pipeline makes to its denoiser.

    Texts are encoded once: results of `pipe.encode_prompt` are cached by its arguments. So another
    resolution or number of steps needs no text encoder, and `release` can drop the encoders.

    Args:
        pipe: the pipeline.
        network: its denoiser.
        state: name of the denoiser's argument for the noisy state.
    """

    def __init__(self, pipe: Any, network: nn.Module, state: str) -> None:
        self.pipe, self.network, self.state = pipe, network, state
        self.released = False
        self._texts: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, expected: int, **call: Any) -> list[dict[str, Any]]:
        """Return the arguments of the denoiser's first calls, by name.

        Args:
            expected: number of calls; fewer if one call holds several rows, as in pipelines that
                batch the negative prompt with the prompt.
            **call: what the pipeline is called with.
        """
        calls: list[dict[str, Any]] = []

        def answer(arguments: dict[str, Any]) -> Tensor:
            calls.append(arguments)
            state = arguments[self.state]
            if len(calls) == expected or len(state) > 1:
                raise _Reached
            return state

        with suppress(_Reached):
            self.run(answer, **call)
        if not calls:
            raise RuntimeError(
                f"{type(self.pipe).__name__} never called its denoiser "
                f"({type(self.network).__name__}): it cannot be used as a flow"
            )
        return calls

    def run(self, answer: Callable[[dict[str, Any]], Any], **call: Any) -> Any:
        """Call the pipeline with a function in place of its denoiser, and return its result.

        Args:
            answer: arguments by name -> the prediction.
            **call: what the pipeline is called with.
        """
        forward = self.network.forward
        signature, recording = inspect.signature(forward), threading.get_ident()

        @functools.wraps(forward)  # modular pipelines pass the arguments that the signature names
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != recording:  # another thread is using the denoiser
                return forward(*args, **kwargs)
            found = dict(signature.bind(*args, **kwargs).arguments)
            found |= found.pop("kwargs", {})
            found.pop("return_dict", None)
            return Answer((answer(found),))

        at_work = instead(self.network, "forward", stand_in)
        with self._lock, self._quiet(), self._remembering(), at_work, torch.no_grad():
            try:
                with plain(), at_rest(*modules_of(self.pipe).values()):
                    return self.pipe(**call)
            except AttributeError as error:  # which a module's property would hide
                raise RuntimeError(
                    f"{type(self.pipe).__name__} could not be called ({error}): is one of its "
                    "components missing?"
                ) from error

    def release(self) -> None:
        """Drop the pipeline's text encoders; earlier prompts can still be bound."""
        self.released = True
        for name in modules_of(self.pipe):
            if "text_encoder" in name:
                setattr(self.pipe, name, None)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Suppress the progress bar, and the log message about the end of the call."""
        from diffusers.utils import logging

        level = logging.get_verbosity()
        with ExitStack() as stack:
            logging.set_verbosity(logging.CRITICAL)
            stack.callback(logging.set_verbosity, level)
            for owner in _with_bars(self.pipe):
                own = vars(owner).get("_progress_bar_config")
                owner._progress_bar_config = {"disable": True}
                stack.callback(_put_back, owner, own)
            yield

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Let `pipe.encode_prompt` return cached results for earlier arguments."""
        encode = getattr(self.pipe, "encode_prompt", None)
        if encode is None:
            yield
            return

        @functools.wraps(encode)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(encode).bind(*args, **kwargs).arguments
            if _has_tensors(given):
                return encode(*args, **kwargs)
            key = repr(sorted(given.items()))
            if key not in self._texts:
                self._refuse_released()
                self._texts[key] = encode(*args, **kwargs)
                if len(self._texts) > KEPT:
                    self._texts.popitem(last=False)
            return copy.copy(self._texts[key])

        with instead(self.pipe, "encode_prompt", remembered):
            yield

    def _refuse_released(self) -> None:
        if self.released:
            raise RuntimeError(
                "the text encoders were released, and this prompt was not bound before: bind all "
                "prompts with flow.given([...]) first, then release the text encoders"
            )


@contextmanager
def instead(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method by a function, and restore the object's own attribute afterwards.

    Offloading hooks, for example, set a `forward` on the module itself.
    """
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _with_bars(pipe: Any) -> Iterator[Any]:
    """Yield objects with a progress bar: a pipeline, or blocks of a modular one at any depth."""
    blocks = getattr(pipe, "_blocks", None)
    if blocks is None and hasattr(pipe, "set_progress_bar_config"):
        yield pipe
    waiting = [] if blocks is None else [blocks]
    while waiting:
        block = waiting.pop()
        waiting += getattr(block, "sub_blocks", {}).values()
        if hasattr(block, "progress_bar"):
            yield block


def _put_back(owner: Any, config: Any) -> None:
    if config is None:
        del owner._progress_bar_config
    else:
        owner._progress_bar_config = config


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)
