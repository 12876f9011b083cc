"""How sure a classifier is of a class: models of timm, of torchvision, or one's own."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.messages import hint
from rewards.models.backbone import Backbone, once, stamp
from rewards.models.hub import Source, fetch, fetch_url, state
from rewards.models.preprocess import Preprocess
from rewards.models.prompts import one_each
from steer.reward import Reward, clamp01

__all__ = ["NEEDS", "SOURCE", "Classifier", "Logits"]

SOURCE = Source(
    "timm/resnet18.a1_in1k",
    ("model.safetensors",),
    licence="Apache-2.0",
    size="47 MB",
)
"""The weights of the default model."""

_WEIGHTS = ("config.json", "model.safetensors")


NEEDS = (SOURCE,)
"""What the default options need that does not come along."""


class Classifier(Reward):
    """`log softmax(logits(image))[target]`, the log-probability of a class, in (-inf, 0] nats.

    Known hack: patterns that no one sees move a single classifier to any class (Szegedy et al.
    2013, arXiv 1312.6199); check with another, or train it on noised pictures.

    Args:
        model: "timm:NAME" with a name of `timm.list_models()`, with its tag or without, a folder
            or org/name of the hub in timm's layout; "torchvision:NAME" with a name of
            `torchvision.models.list_models()`; "file.py:Name", a module or what makes one; or a
            module, pictures (n, 3, h, w) -> logits (n, classes), which is frozen from then on.
        weights: the tag of published weights, or a file of one's own, .safetensors or .pth with
            tensors alone. Default: the published ones that the library recommends.
        target: the class, by its index or name. None: the class that the prompt names.
        names: a file with the names of the classes, one a line, or a list of them; needed where
            they are not ImageNet's. It says how many classes there are, too.
        preprocess: from pictures in [0, 1] to what the model takes. Default: as the library says
            of the weights; a module of one's own takes pictures in [0, 1].
        dtype: of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the network.
        checkpoint: recompute its blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown model, tag or class, with the nearest names; weights that do not
            fit, or that cannot be had: says what to download and where to put it.
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
        given = None if names is None else _listed(names)
        execution = {"dtype": dtype, "compile": compile, "checkpoint": checkpoint}
        self.backbone = _backbone(model, weights, given, preprocess, execution)
        self.names = given or self.backbone.names
        self._index = _index(self.names)
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
                f"the classifier has no names for its classes, so {target!r} names none: give "
                "names=FILE, one a line, or target=INDEX"
            )
        found = self._index.get(_plain(target), [])
        if len(found) > 1:
            several = " and ".join(f"{i} ({self.names[i]})" for i in found)
            raise ValueError(f"class {target!r} is any of {several}: give target=INDEX")
        if not found:
            raise ValueError(
                f"unknown class {target!r}: {hint(_plain(target), self._index)}There are "
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
        names: of its classes, where they are known.
        classes: how many, where that is known.
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
        if checkpoint and hasattr(model, "set_grad_checkpointing"):  # timm's own way
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
    """Pictures as they are, clamped to [0, 1] with the gradient passed straight through."""

    def forward(self, images: Tensor) -> Tensor:
        return clamp01(images)


def _backbone(
    model: str | Path | nn.Module,
    weights: str | Path | None,
    names: list[str] | None,
    preprocess: nn.Module | None,
    execution: dict[str, Any],
) -> Logits:
    """Make the classifier that was asked for; models of the libraries once."""
    if isinstance(model, str | Path):
        library, _, name = str(model).partition(":")
        if Path(model).is_dir():
            library, name = "timm", str(model)
        if library in _LIBRARIES:
            files = [Path(str(x)) for x in (name, weights) if x is not None and Path(x).exists()]
            count = None if names is None else len(names)
            own = None if preprocess is None else id(preprocess)
            key = (
                *("classifier", str(model), str(weights), count, own),
                *map(stamp, files),
                *sorted(execution.items()),
            )

            def make() -> Logits:
                network, theirs, labels = _LIBRARIES[library](name, weights, count)
                classes = count or len(labels) or None
                return Logits(network, preprocess or theirs, labels, classes, **execution)

            return once(key, make)
        model = _own(str(model))
    if weights is not None:
        _fill(model, weights, "your module")
    theirs = preprocess
    if theirs is None:
        settings = getattr(model, "pretrained_cfg", None)
        theirs = _of_timm(settings) if settings else _Clamp()
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
        raise ValueError(f"{text!r} is no module and makes none, but {type(made).__name__}")
    return made


def _fill(model: nn.Module, file: str | Path, what: str) -> None:
    """Load weights into a model, all of them."""
    try:
        model.load_state_dict(state(file, "classifier", "weights"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the weights {str(file)!r} do not fit {what}: {reason}. Give those of this very "
            "model; where it has other classes than ImageNet's, names=FILE with all of them"
        ) from error


def _timm(
    name: str, weights: str | Path | None, classes: int | None
) -> tuple[nn.Module, Preprocess, list[str]]:
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    options = {} if classes is None else {"num_classes": classes}
    overlay: dict[str, Any] = dict(options)
    if Path(name).is_dir():
        named = f"local-dir:{name}"
    elif "/" in name:
        folder = fetch(Source(name.removeprefix("hf-hub:"), _WEIGHTS), "classifier")
        named = f"local-dir:{folder}"
    else:
        architecture, _, tag = name.partition(".")
        if weights is not None and not _is_file(weights):
            tag = str(weights)
        named = f"{architecture}.{tag}" if tag else architecture
        if not timm.is_model(architecture):
            raise ValueError(
                f"unknown model {name!r} of timm: {hint(name, timm.list_models())}"
                "timm.list_models() has them all; a folder or org/name of the hub is taken too"
            )
        known = timm.list_pretrained(f"{architecture}.*")
        if tag and named not in known:
            raise ValueError(
                f"unknown weights {named!r} of timm: {hint(named, known)}Known: "
                f"{', '.join(known) or 'none'}; or give a file that exists"
            )
        if weights is None or not _is_file(weights):
            overlay["file"] = str(_published(timm.get_pretrained_cfg(named), named))
    if weights is not None and _is_file(weights):
        state(weights, "classifier", "weights")  # its errors are the better ones
        overlay |= {"file": str(weights), "source": ""}
    try:
        model = timm.create_model(
            named, pretrained=True, pretrained_cfg_overlay=overlay, **options
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cannot load timm's {name!r}: {reason}. Give weights of this very model; where it "
            "has other classes than ImageNet's, names=FILE with all of them"
        ) from error
    settings = model.pretrained_cfg
    labels = list(settings.get("label_names") or [])
    described = settings.get("label_descriptions") or {}
    labels = [described.get(label, label) for label in labels]
    if not labels and classes is None:
        subset = infer_imagenet_subset(model)
        if subset:
            info = ImageNetInfo(subset)
            labels = [info.index_to_description(i) for i in range(info.num_classes())]
    return model, _of_timm(settings), labels


def _published(cfg: Any, name: str) -> Path:
    """Return the file of published weights of timm."""
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise ValueError(f"timm publishes no weights for {name!r}: give weights=FILE")
    if cfg.hf_hub_id:
        file = cfg.hf_hub_filename or "model.safetensors"
        source = Source(cfg.hf_hub_id, (file,), cfg.license or "")
        return fetch(source, "classifier", "weights") / file
    return fetch_url(cfg.url, "classifier", "weights")


def _of_timm(settings: Any) -> Preprocess:
    """Return the preprocessing that timm's `pretrained_cfg` says."""
    size = tuple(settings["input_size"][-2:])
    share = settings.get("crop_pct") or 0.875
    fit = {"squash": "squash", "border": "pad"}.get(settings.get("crop_mode"), "crop")
    return Preprocess(
        size,
        settings["mean"],
        settings["std"],
        settings.get("interpolation") or "bicubic",
        fit,
        fitted=[math.floor(side / share) for side in size],
        fill=sum(settings["mean"]) / 3,
    )


def _torchvision(
    name: str, weights: str | Path | None, classes: int | None
) -> tuple[nn.Module, Preprocess, list[str]]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"unknown model {name!r} of torchvision: {hint(name, known)}"
            "torchvision.models.list_models() has them all"
        )
    tags = models.get_model_weights(name)
    file = None
    entry = tags.DEFAULT  # type: ignore[attr-defined]
    if weights is not None and _is_file(weights):
        file = weights
    elif weights is not None:
        if str(weights) not in tags.__members__:
            raise ValueError(
                f"unknown weights {str(weights)!r} of torchvision's {name}: "
                f"{hint(str(weights), tags.__members__)}Known: {', '.join(tags.__members__)}; or "
                "give a .pth or .safetensors file that exists"
            )
        entry = tags[str(weights)]
    if file is None:
        file = fetch_url(entry.url, "classifier", "weights")
    labels = list(entry.meta["categories"])
    options: dict[str, Any] = {"num_classes": classes or len(labels)}
    if name in {"googlenet", "inception_v3"}:  # as their published weights are built
        options |= {"transform_input": True, "init_weights": False}
    model = models.get_model(name, weights=None, **options)
    _fill(model, file, f"torchvision's {name} with {options['num_classes']} classes")
    settings = entry.transforms()
    size = list(settings.crop_size) * (2 if len(settings.crop_size) == 1 else 1)
    fitted = list(settings.resize_size) * (2 if len(settings.resize_size) == 1 else 1)
    preprocess = Preprocess(
        size, settings.mean, settings.std, settings.interpolation.value, "crop", fitted=fitted
    )
    return model, preprocess, [] if classes is not None else labels


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision}


def _is_file(weights: str | Path) -> bool:
    """Tell a file from a tag."""
    path = Path(weights)
    return path.exists() or path.suffix in {".pth", ".pt", ".safetensors", ".bin"}


def _listed(names: str | Path | Sequence[str]) -> list[str]:
    """Read the names of classes."""
    if not isinstance(names, str | Path):
        return [str(name) for name in names]
    path = Path(names)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(names)!r}: give names= a text file with the name of a class a line"
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{str(names)!r} is empty: it must hold the name of a class a line")
    return lines


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _index(names: Sequence[str]) -> dict[str, list[int]]:
    """Map names to classes; a whole name goes before a synonym ('tabby, tabby cat')."""
    whole: dict[str, list[int]] = {}
    part: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        whole.setdefault(_plain(name), []).append(i)
        for synonym in name.split(","):
            part.setdefault(_plain(synonym), []).append(i)
    return part | whole
