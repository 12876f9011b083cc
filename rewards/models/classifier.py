"""Log-probability of a class by a classifier: models of timm, of torchvision, or your own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.backbone import Backbone
from rewards.models.hub import Source
from rewards.models.instances import once, stamp
from rewards.models.labels import by_name, listed, plain
from rewards.models.libraries import LIBRARIES, of_timm, put
from rewards.models.prompts import one_each
from steer.reward import Reward, clamp01, hint

__all__ = ["NEEDS", "SOURCE", "Classifier", "Logits"]

SOURCE = Source(
    "timm/resnet18.a1_in1k",
    ("model.safetensors",),
    licence="Apache-2.0",
    size="47 MB",
)
"""The weights of the default model."""


NEEDS = (SOURCE,)
"""What the default options need and the package does not contain."""


class Classifier(Reward):
    """`log softmax(logits(image))[target]`, the log-probability of a class, in (-inf, 0] nats.

    Known hack: invisible patterns change the output of a single classifier to any class (Szegedy
    et al. 2013, arXiv 1312.6199); check with another, or train it on noised pictures.

    Args:
        model: "timm:NAME" with a name of `timm.list_models()`, with its tag or without, a folder
            or org/name of the hub in timm's layout; "torchvision:NAME" with a name of
            `torchvision.models.list_models()`; "file.py:Name", a module or what makes one; or a
            module, pictures (n, 3, h, w) -> logits (n, classes), which is frozen from then on.
        weights: the tag of published weights, or your own file, .safetensors or .pth with tensors
            only. Default: the published ones that the library recommends.
        target: the class, by its index or name. None: the class that the prompt names.
        names: a file with the names of the classes, one per line, or a list of them; needed where
            they are not ImageNet's. It says how many classes there are, too.
        preprocess: from pictures in [0, 1] to what the model takes. Default: as the library says
            of the weights; your own module takes pictures in [0, 1].
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the network.
        checkpoint: recompute its blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown model, tag or class, with the nearest names; weights that do not
            fit, or that cannot be loaded: the message says what to download and where to put it.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = "timm:resnet18",
        weights: str | Path | None = None,
        target: int | str | None = None,
        names: str | Path | Sequence[str] | None = None,
        preprocess: nn.Module | None = None,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        given = None if names is None else listed(names)
        execution = {"dtype": dtype, "compile": compile, "checkpoint": checkpoint}
        self.backbone = _backbone(model, weights, given, preprocess, execution)
        self.names = given or self.backbone.names
        self._index = by_name(self.names)
        self.target = None if target is None else self.index(target)

    def index(self, target: int | str) -> int:
        """Return the index of a class given by index or name.

        Raises:
            ValueError: there is no such class, or more than one; the message has the nearest.
        """
        count = len(self.names) or self.backbone.classes
        if isinstance(target, int):
            if (count is not None and not 0 <= target < count) or target < 0:
                last = "its number of classes" if count is None else str(count - 1)
                raise ValueError(f"class {target} is out of range: give 0 to {last}")
            return target
        if not self.names:
            raise ValueError(
                f"the classifier has no names for its classes, so {target!r} cannot be found: "
                "give names=FILE with one name per line, or target=INDEX"
            )
        found = self._index.get(plain(target), [])
        if len(found) > 1:
            several = " and ".join(f"{i} ({self.names[i]})" for i in found)
            raise ValueError(f"class {target!r} is ambiguous ({several}): give target=INDEX")
        if not found:
            raise ValueError(
                f"unknown class {target!r}: {hint(plain(target), self._index)}There are "
                f"{len(self.names)}, as {self.names[0]!r}"
            )
        return found[0]

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] -> (n,) in (-inf, 0].

        Raises:
            ValueError: without a target: no prompts, not one for each image, or one that names
                no class.
        """
        if self.target is None:
            prompts = one_each(images, prompts, "the reward 'classifier' without a target")
            columns = [self.index(prompt) for prompt in prompts]
        else:
            columns = [self.target] * len(images)
        logits = self.backbone.image_features(images)
        if logits.ndim != 2 or logits.shape[1] <= max(columns, default=0):
            raise ValueError(
                f"the classifier gave logits of shape {tuple(logits.shape)} for {len(images)} "
                f"images and class {max(columns)}: it must give (n, classes)"
            )
        rows = torch.tensor(columns, device=logits.device)[:, None]
        return F.log_softmax(logits, -1).gather(1, rows)[:, 0].to(images.device)


class Logits(Backbone):
    """A classifier with its preprocessing; its features are the logits (n, classes).

    Args:
        model: pictures (n, 3, *size) -> logits (n, classes).
        preprocess: from pictures in [0, 1] to its input.
        names: names of its classes, if they are known.
        classes: number of classes, if it is known.
        checkpoint: recompute its blocks in the backward pass.
        **execution: see `Backbone`.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: nn.Module,
        names: Sequence[str] = (),
        classes: int | None = None,
        checkpoint: bool = False,
        **execution: Any,
    ) -> None:
        if checkpoint and hasattr(model, "set_grad_checkpointing"):  # as timm does it
            model.set_grad_checkpointing()
            checkpoint = False
        super().__init__(
            model,
            preprocess,  # type: ignore[arg-type]
            checkpoint=checkpoint,
            **execution,
        )
        self.names, self.classes = list(names), classes

    def encode_image(self, x: Tensor) -> Tensor:
        """Return the logits of preprocessed pictures, (n, classes)."""
        return self.model(x)


class _Clamp(nn.Module):
    """Preprocessing that only clamps to [0, 1], with the gradient passed straight through."""

    def forward(self, images: Tensor) -> Tensor:
        return clamp01(images)


def _backbone(
    model: str | Path | nn.Module,
    weights: str | Path | None,
    names: list[str] | None,
    preprocess: nn.Module | None,
    execution: dict[str, Any],
) -> Logits:
    """Make the classifier that `model` names; models of the libraries are made once."""
    if isinstance(model, str | Path):
        library, _, name = str(model).partition(":")
        if Path(model).is_dir():
            library, name = "timm", str(model)
        if library in LIBRARIES:
            files = [Path(str(x)) for x in (name, weights) if x is not None and Path(x).exists()]
            count = None if names is None else len(names)
            own = None if preprocess is None else id(preprocess)
            key = (
                *("classifier", str(model), str(weights), count, own),
                *map(stamp, files),
                *sorted(execution.items()),
            )

            def make() -> Logits:
                network, theirs, labels = LIBRARIES[library](name, weights, count)
                classes = count or len(labels) or None
                return Logits(network, preprocess or theirs, labels, classes, **execution)

            return once(key, make)
        model = _own(str(model))
    if weights is not None:
        put(model, weights, "your module")
    theirs = preprocess
    if theirs is None:
        settings = getattr(model, "pretrained_cfg", None)
        theirs = of_timm(settings) if settings else _Clamp()
    return Logits(model, theirs, **execution)


def _own(text: str) -> nn.Module:
    """Return the module of 'file.py:Name'."""
    from rewards.loading import from_file

    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(
            f"unknown model {text!r}: give timm:NAME, torchvision:NAME, file.py:Name, or, in "
            "Python, a module"
        )
    found = from_file(Path(file), name)
    made = found if isinstance(found, nn.Module) else found()
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"{text!r} is neither a module nor a function that returns one, but "
            f"{type(made).__name__}"
        )
    return made
