"""The data of `steer distill`: pictures with captions, or the model's own samples."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.sources import source_of
from steer.flow import FlowMap, device_of
from steer.training.data import Batch, Batches

__all__ = ["Data", "data_of"]

CALL = 16
"""Rows per call when samples are generated."""

SAMPLES = 256
"""Number of its own samples on which a model is trained."""


class Data(ABC):
    """Pictures, as latents of a model, and their captions.

    Args:
        captions: all captions, if they are known before a batch is sampled.
        size: pictures per batch.
        seed: with the step, it fixes a batch.
        empty: share of empty captions.
    """

    def __init__(self, captions: list[str] | None, size: int, seed: int, empty: float) -> None:
        self.captions, self.size, self.seed, self.empty = captions, size, seed, empty

    @abstractmethod
    def on(self, base: FlowMap) -> Callable[[int], Batch]:
        """Return step -> (x_1, prompts) for a model, which must be on its device."""


class Pictures(Data):
    """Pictures of a folder, or emoji; they are encoded when they are sampled.

    Args:
        count: number of pictures.
        draw: (index, height and width, generator) -> a picture in [-1, 1] and its caption.
        captions: see `Data`.
        sizes: see `Data`.
    """

    def __init__(
        self, count: int, draw: Callable[..., tuple[Tensor, str]], captions: list[str] | None,
        **sizes: Any,
    ) -> None:  # fmt: skip
        super().__init__(captions, **sizes)
        self.count, self.draw = count, draw

    def on(self, base: FlowMap) -> Callable[[int], Batch]:
        """Return batches, each encoded by the model."""
        place = device_of(base)
        with torch.no_grad():
            side = tuple(base.decode(torch.zeros(1, *base.event_shape, device=place)).shape[-2:])

        def drawn(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
            return self.draw(i, side, generator)

        pictures = Batches(self.count, drawn, self.size, seed=self.seed, empty=self.empty)

        @torch.no_grad()
        def encoded(step: int) -> Batch:
            x, captions = pictures(step)
            return base.encode(((x + 1) / 2).to(place)), captions

        return encoded


class Samples(Data):
    """The model's own samples, generated once and kept in a file.

    Several processes generate a share each.

    Args:
        file: the file that stores them.
        captions: caption of each sample.
        steps: number of Euler steps.
        notes: values that they depend on.
        sizes: see `Data`.
    """

    def __init__(
        self, file: Path, captions: list[str], steps: int, notes: dict[str, Any], **sizes: Any
    ) -> None:
        super().__init__(captions, **sizes)
        self.file, self.steps, self.notes = file, steps, notes

    def on(self, base: FlowMap) -> Callable[[int], Batch]:
        """Return batches of the samples, generated if the file does not have them."""
        import safetensors.torch

        from steer.files import pack, read_notes, write_atomically
        from steer.training.processes import is_first

        assert self.captions is not None
        told = self.captions
        if self.file.is_file() and read_notes(self.file) == self.notes:
            x = safetensors.torch.load_file(self.file)["x"]
        else:
            x = self._made(base)
            if is_first():
                write_atomically(self.file, pack({"x": x}, self.notes))
        return Batches(
            len(x), lambda i, g: (x[i], told[i]), self.size, seed=self.seed, empty=self.empty
        )

    @torch.no_grad()
    def _made(self, base: FlowMap) -> Tensor:
        assert self.captions is not None
        rank, processes = _process()
        generator = torch.Generator().manual_seed(self.notes["seed"])
        noise = torch.randn(len(self.captions), *base.event_shape, generator=generator)
        share = -(-len(noise) // processes)  # every process makes the same number of calls
        own = [k % len(noise) for k in range(rank * share, (rank + 1) * share)]
        found = []
        for k in range(0, share, CALL):
            rows = own[k : k + CALL]
            x = noise[rows].to(device_of(base))
            few = base.given([self.captions[i] for i in rows])
            for s, t in pairwise(base.times(self.steps)):
                x = x + (t - s) * few.velocity(x, s)
            found.append(x)
        x = torch.cat(found)
        if processes > 1:
            parts = [torch.empty_like(x) for _ in range(processes)]
            torch.distributed.all_gather(parts, x.contiguous())
            x = torch.cat(parts)[: len(noise)]
        return x.cpu()


def _process() -> tuple[int, int]:
    group = torch.distributed
    together = group.is_available() and group.is_initialized()
    return (group.get_rank(), group.get_world_size()) if together else (0, 1)


def data_of(
    data: str, model: str, out: Path, *, size: int, seed: int, empty: float,
    prompts: list[str] | None, own_steps: int, name: str,
) -> Data:  # fmt: skip
    """Return the training data of a run.

    Args:
        data: "emoji", "samples" or a folder of pictures.
        model: name of the model.
        out: folder of the run, for samples.
        size: pictures per batch.
        seed: seed of batches and samples.
        empty: share of empty captions.
        prompts: prompts of samples. Default: the model's own, else the empty one.
        own_steps: number of steps of samples.
        name: name of the model, which is stored with the samples.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no pictures in it.
    """
    sizes = {"size": size, "seed": seed, "empty": empty}
    if data == "samples":
        from recipes.defaults import own

        listed = own(model).tuned
        told = prompts or ([""] if listed is None else Path(listed).read_text().splitlines())
        told = [p.strip() for p in told if p.strip()] or [""]
        told = (told * (SAMPLES // len(told) + 1))[:SAMPLES]
        notes = {"prompts": told, "model": name, "steps": own_steps, "seed": seed}
        return Samples(out / "samples.safetensors", told, own_steps, notes, **sizes)
    if data == "emoji":
        source = source_of("emoji")
        return Pictures(source.count, lambda i, _, g: source.draw(i, g), None, **sizes)
    return _folder(Path(data), sizes)


def _folder(folder: Path, sizes: dict[str, Any]) -> Pictures:
    """Return the captioned pictures of a folder, cropped to the model's shape."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.functional import center_crop, resize

    table = folder / "metadata.jsonl"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder of pictures at {folder}: data is emoji, samples, or a folder of pictures"
        )
    if table.is_file():
        rows = [json.loads(line) for line in table.read_text().splitlines() if line.strip()]
        pairs = [(folder / r["file_name"], str(r["text"])) for r in rows]
    else:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
        pairs = [(p, _beside(p)) for p in files]
    if not pairs:
        raise ValueError(f"{folder} contains no pictures ({', '.join(sorted(PICTURES))})")

    def draw(i: int, side: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, str]:
        height, width = side
        image = decode_image(os.fspath(pairs[i][0]), ImageReadMode.RGB).float() / 255
        scale = max(height / image.shape[1], width / image.shape[2])
        sides = [round(image.shape[1] * scale), round(image.shape[2] * scale)]
        image = center_crop(resize(image, sides, antialias=True), [height, width])
        return 2 * image - 1, pairs[i][1]

    return Pictures(len(pairs), draw, [text for _, text in pairs], **sizes)


PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def _beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""
