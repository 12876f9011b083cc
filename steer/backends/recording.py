"""What a pipeline feeds its denoiser, taken from the pipeline's own call.

The denoiser's `forward` is replaced for one call of the pipeline by a function that keeps the
arguments and ends the call. So prompts, position ids, guidance and size embeddings and the time
grid are the pipeline's own, whatever its class; nothing of it is written a second time here.
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
"""How many prompts' encodings are kept, as long as the text encoders are there to make them."""


class Answer(tuple[Tensor]):
    """What a denoiser returns: a tuple of one, and the object with a `sample`."""

    @property
    def sample(self) -> Tensor:
        """The prediction."""
        return self[0]


class _Reached(Exception):
    """The call that was waited for."""


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """Return a pipeline's modules by what it calls them."""
    return {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}


class Recorder:
    """Records the calls that a pipeline makes of its denoiser.

    Texts are encoded once: what `pipe.encode_prompt` returns is kept by its arguments, so that
    another resolution or number of steps costs no text encoder, and `release` may drop them.

    Args:
        pipe: the pipeline.
        network: its denoiser.
        state: the name of the argument of the denoiser that is the noisy state.
    """

    def __init__(self, pipe: Any, network: nn.Module, state: str) -> None:
        self.pipe, self.network, self.state = pipe, network, state
        self.released = False
        self._texts: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, expected: int, **call: Any) -> list[dict[str, Any]]:
        """Return the arguments of the denoiser's first calls, by name.

        Args:
            expected: how many calls; fewer where one call holds several rows, as pipelines do
                that batch the negative prompt with the prompt.
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
        """Call the pipeline with a function in its denoiser's place, and return what it does.

        Args:
            answer: arguments by name -> the prediction.
            **call: what the pipeline is called with.
        """
        forward = self.network.forward
        signature, recording = inspect.signature(forward), threading.get_ident()

        @functools.wraps(forward)  # modular pipelines pass what the signature names
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != recording:  # another thread samples with it meanwhile
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
            except AttributeError as error:  # which a property of a module would hide
                raise RuntimeError(
                    f"{type(self.pipe).__name__} could not be called ({error}): is one of its "
                    "components missing?"
                ) from error

    def release(self) -> None:
        """Drop the pipeline's text encoders; prompts that were bound before stay known."""
        self.released = True
        for name in modules_of(self.pipe):
            if "text_encoder" in name:
                setattr(self.pipe, name, None)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keep the progress bar, and the log of how the call ends, off the screen."""
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
        """Let `pipe.encode_prompt` answer from memory what it was asked before."""
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
    """Put a function in the place of a method, and put back what the object itself had there.

    Hooks that offload a module are such a forward of its own.
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
    """Give what shows a progress bar: a pipeline, or blocks of a modular one, at any depth."""
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
