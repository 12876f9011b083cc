"""Encoders of pictures and texts that rewards stand on: loaded once, run the same way.

One object per weights: rewards that name the same model share it, in memory and, within a sum,
in computation. It is moved as a whole: `reward.to(...)` moves it for all who share it.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.messages import reason, unknown
from rewards.models.hub import Source, fetch, home
from rewards.models.preprocess import Preprocess
from rewards.models.prompts import one_each
from steer.reward import Reward, name_of, shared

__all__ = [
    "DTYPES",
    "Backbone",
    "Cosine",
    "OpenClip",
    "Transformers",
    "checkpointed",
    "fill",
    "folder_of",
    "once",
    "open_clip_backbone",
    "pretrained",
    "stamp",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What the `dtype` option of a reward may be."""

TEXTS = 4096
"""Prompts whose features a backbone keeps."""


class Backbone(nn.Module):
    """A frozen encoder with its preprocessing: pictures in [0, 1] -> features.

    It runs in evaluation mode, in its own dtype whatever autocast says, on the device where it is;
    pictures are brought there and features come back in float32 (or float64).

    Args:
        model: the network; its weights are frozen.
        preprocess: from pictures in [0, 1] to its input.
        dtype: of its weights: None for those it has, or one of `DTYPES`.
        compile: compile the tower of pictures (`torch.compile`): pays on a GPU, for many calls of
            one batch size.
        checkpoint: recompute the tower's blocks in the backward pass: a block's memory instead of
            the tower's, for one more forward call.

    Raises:
        ValueError: an unknown dtype.
    """

    texts = TEXTS
    """Prompts whose features are kept."""

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        *,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise unknown("dtype", str(dtype), DTYPES)
        self.model = model.requires_grad_(False).eval()
        if dtype is not None:
            self.model.to(DTYPES[dtype])
        self.preprocess = preprocess
        if checkpoint:
            checkpointed(self.tower)
        if compile:
            self.tower.compile()
        self._texts: dict[str, Tensor] = {}

    @property
    def tower(self) -> nn.Module:
        """The part of the model that sees pictures."""
        return self.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model's weights are."""
        return next(self.model.parameters()).dtype

    @abstractmethod
    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures (n, 3, *size) in the model's dtype -> (n, d)."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> (n, d)."""
        raise NotImplementedError(f"{type(self).__name__} reads no texts")

    def image_features(self, images: Tensor) -> Tensor:
        """Encode images (n, 3, h, w) in [0, 1] -> (n, d), float32 or wider.

        Within `steer.reward.sharing`, pictures that were encoded already are not encoded again.
        """
        return shared(self, images, lambda: self._image_features(images))

    def _image_features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            x = self.preprocess(images.to(self.device)).to(self.dtype)
            features = self.encode_image(x)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> (n, d), float32 or wider; each text once."""
        known = self._texts
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            with torch.autocast(self.device.type, enabled=False):
                features = self.encode_text(new)
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            known = known | dict(zip(new, features.cpu(), strict=True))
            self._texts = dict(list(known.items())[-self.texts :])
        rows = torch.stack([known[text] for text in texts])
        return rows.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        self._texts = {}  # they may be of another dtype now
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: a reward is never trained."""
        return super().train(False)


class OpenClip(Backbone):
    """An open_clip model: features are unit vectors.

    Args:
        model: an open_clip model.
        tokenizer: its tokenizer.
        preprocess: default: as the model's configuration says.
        **execution: see `Backbone`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Preprocess | None = None,
        **execution: Any,
    ) -> None:
        super().__init__(model, preprocess or Preprocess.of_open_clip(model), **execution)
        self.tokenizer = tokenizer

    @property
    def tower(self) -> nn.Module:
        """The part of the model that sees pictures."""
        return self.model.visual  # type: ignore[return-value]

    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures -> unit vectors (n, d)."""
        return F.normalize(self.model.encode_image(x), dim=-1)  # type: ignore[operator]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> unit vectors (n, d)."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens), dim=-1)  # type: ignore[operator]


class Transformers(Backbone):
    """A two-tower model of transformers (CLIP, SigLIP): features are unit vectors.

    Args:
        model: with `get_image_features` and `get_text_features`.
        tokenizer: texts -> the arguments of `get_text_features`.
        preprocess: from pictures in [0, 1] to `pixel_values`.
        **execution: see `Backbone`.

    Attributes:
        scale: what the model was trained to multiply the cosine with, `exp(logit_scale)`.
        bias: what it was trained to add.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], dict[str, Tensor]],
        preprocess: Preprocess,
        **execution: Any,
    ) -> None:
        # read before they are rounded to another dtype
        scale, bias = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
        super().__init__(model, preprocess, **execution)
        self.tokenizer = tokenizer
        self.scale = 1.0 if scale is None else _number(scale, torch.exp)
        self.bias = 0.0 if bias is None else _number(bias)

    @property
    def tower(self) -> nn.Module:
        """The part of the model that sees pictures."""
        return self.model.vision_model  # type: ignore[return-value]

    def encode_image(self, x: Tensor) -> Tensor:
        """Encode preprocessed pictures -> unit vectors (n, d)."""
        out = self.model.get_image_features(pixel_values=x)  # type: ignore[operator]
        # since transformers 5 an object, a tensor before
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode texts -> unit vectors (n, d)."""
        tokens = {k: v.to(self.device) for k, v in self.tokenizer(list(texts)).items()}
        out = self.model.get_text_features(**tokens)  # type: ignore[operator]
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)


def _number(x: Tensor, f: Callable[[Tensor], Tensor] = torch.clone) -> float:
    return float(f(x.detach().double()))


class Cosine(Reward):
    """`scale cos(image features, text features) + bias` on a backbone.

    Attributes:
        scale: 1 unless a subclass says otherwise.
        bias: 0 likewise.
    """

    scale = 1.0
    bias = 0.0

    def __init__(self, backbone: Backbone, template: str = "{}") -> None:
        super().__init__()
        if template.count("{}") != 1:
            raise ValueError(
                f"template {template!r} must hold '{{}}' once: it stands for the prompt"
            )
        self.backbone, self.template = backbone, template

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, h, w) in [0, 1] -> unit vectors (n, d)."""
        return self.backbone.image_features(images)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts, each in the template -> unit vectors (n, d)."""
        return self.backbone.text_features([self.template.replace("{}", p) for p in prompts])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image with its own prompt, (n,)."""
        return (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] with one prompt each -> (n,).

        Raises:
            ValueError: no prompts, or not one for each image.
        """
        prompts = one_each(images, prompts, f"the reward {name_of(self).lower()!r}")
        scores = self.scale * self.similarity(images, prompts) + self.bias
        return scores.to(images.device)


B = TypeVar("B", bound=nn.Module)
_LOADED: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
_LOCK = threading.Lock()


def once(key: Hashable, make: Callable[[], B]) -> B:
    """Return what was made under this key and still lives, or make it.

    The global random state stays as it was, though modules draw weights
    before they get theirs.
    """
    with _LOCK:
        made = _LOADED.get(key)
        if made is None:
            with torch.random.fork_rng(devices=[]):
                made = _LOADED[key] = make()
        return made


def stamp(path: str | Path) -> tuple[Hashable, ...]:
    """Return what tells a file or a folder's files from those that were there before."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    parts = [(str(f.resolve()), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return tuple(parts)


def folder_of(
    model: str | Path | None, default: Source, reward: str, option: str = "model"
) -> Path:
    """Return the folder of a model: a path that was given, a hub id, or the default's.

    Raises:
        FileNotFoundError: what was given is a path, and nothing is there.
        ValueError: the hub cannot be reached: says what to download and where to put it.
    """
    if model is None:
        return fetch(default, reward, option)
    text = str(model)
    if Path(text).exists():
        return Path(text)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"no {text!r}: {reward}:{option}= takes a folder or file that exists, or a hub id "
            "org/name"
        )
    return fetch(Source(text, default.files), reward, option)


def fill(model: nn.Module, weights: Mapping[str, Tensor], where: str | Path, reward: str) -> None:
    """Put weights into a module: none missing, none left over.

    Args:
        model: the module.
        weights: by the names of its `state_dict`.
        where: where they come from, for the message.
        reward: whose they are, for the message.

    Raises:
        ValueError: they are of another layout; the message has the first keys.
    """
    own = model.state_dict()
    _refuse_misfits(
        missing=[k for k in own if k not in weights],
        unexpected=[k for k in weights if k not in own],
        shapes=[
            (k, tuple(weights[k].shape), tuple(own[k].shape))
            for k in own
            if k in weights and weights[k].shape != own[k].shape
        ],
        where=where,
        reward=reward,
    )
    model.load_state_dict(dict(weights))


def pretrained(kind: Any, folder: str | Path, reward: str) -> Any:
    """Return a model of transformers with a folder's weights: none missing, none left over.

    Args:
        kind: the model's class.
        folder: holds config.json and model.safetensors.
        reward: whose it is, for the message.

    Raises:
        ValueError: it cannot be read, or is of another layout; the message has the first keys.
    """
    try:
        model, info = kind.from_pretrained(
            str(folder),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise ValueError(
            f"cannot load the {kind.__name__} in {str(folder)!r} for {reward!r} "
            f"({type(error).__name__}: {reason(error)}). It must hold config.json and "
            "model.safetensors, as the model's page has them"
        ) from error
    _refuse_misfits(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        shapes=[(k, tuple(a), tuple(b)) for k, a, b in sorted(info["mismatched_keys"])],
        where=folder,
        reward=reward,
    )
    return model


def _refuse_misfits(
    missing: list[str],
    unexpected: list[str],
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    where: str | Path,
    reward: str,
) -> None:
    """Raise where any list has something in it; name the first three of each."""
    found = []
    for title, keys in (("missing", missing), ("not expected", unexpected)):
        if keys:
            found.append(f"{title} {len(keys)}: {', '.join(keys[:3])}")
    if shapes:
        sizes = ", ".join(f"{k} {a} for {b}" for k, a, b in shapes[:3])
        found.append(f"of another shape {len(shapes)}: {sizes}")
    if found:
        raise ValueError(
            f"the weights in {str(where)!r} are of another layout than {reward!r} expects "
            f"({'; '.join(found)}). Give the file that its page publishes, unchanged"
        )


def open_clip_backbone(
    name: str, pretrained: str | None = None, *, reward: str = "clip", **execution: Any
) -> OpenClip:
    """Return an open_clip model, loaded once per name, weights and execution.

    Args:
        name: a folder with open_clip_config.json and weights, `hf-hub:org/name`, or an
            architecture of `open_clip.list_models()`.
        pretrained: the tag or file of an architecture's weights.
        reward: whose it is, for the message.
        **execution: see `Backbone`.

    Raises:
        ValueError: it cannot be had; the message says what to download and where to put it.
    """
    files = [Path(text) for text in (name, pretrained) if text and Path(text).exists()]
    key = ("open_clip", name, pretrained, *map(stamp, files), *sorted(execution.items()))

    def make() -> OpenClip:
        import open_clip

        found, hub = name, None
        if Path(name).is_dir():
            found = f"local-dir:{name}"
        elif name.startswith("hf-hub:"):
            repo = name.removeprefix("hf-hub:")
            hub = Source(repo, ("open_clip_config.json", "open_clip_model.safetensors"))
            if (home() / repo / hub.files[0]).is_file():
                found = f"local-dir:{home() / repo}"
        try:
            model = open_clip.create_model(found, pretrained=pretrained, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(found)
        except Exception as error:
            if hub is not None:
                fetch(hub, reward)  # where files are missing, it says which and where to put them
            raise ValueError(
                f"cannot load the CLIP {name!r}: {error}. Give a folder that holds "
                "open_clip_config.json and open_clip_model.safetensors (download both from the "
                "model's page if its hub cannot be reached from here), hf-hub:org/name, or a name "
                "of open_clip.list_models() with pretrained=TAG or pretrained=FILE"
            ) from error
        return OpenClip(model, tokenizer, **execution)

    return once(key, make)


def checkpointed(tower: nn.Module) -> None:
    """Let a tower's blocks be recomputed in the backward pass, in evaluation mode as well.

    Raises:
        ValueError: it has no list of blocks.
    """
    from torch.utils.checkpoint import checkpoint

    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not lists:
        raise ValueError(
            f"{type(tower).__name__} has no list of blocks to recompute: leave checkpoint out"
        )
    for block in max(lists, key=lambda m: sum(p.numel() for p in m.parameters())):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore
