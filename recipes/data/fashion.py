"""The `fashion` data: Fashion-MNIST, grey pictures of ten kinds of clothes, 28x28.

Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747. All 70,000 pictures are in Debian's package
`dataset-fashion-mnist`; `python -m recipes.data.fashion` writes a part of them to `fashion.npz`,
which is part of the repository: 2,000 of the training and 2,000 of the test pictures. See
CREDITS.md.

>>> fashion = load()
>>> tuple(fashion.images.shape[1:]), len(fashion.train), len(fashion.test)
((1, 28, 28), 2000, 2000)
"""

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["CLASSES", "PACKAGE", "Fashion", "load"]

FILE = Path(__file__).with_name("fashion.npz")

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
"""The folder of the files of Debian's package."""

CLASSES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
"""The caption of each class, by its number."""

PARTS = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Fashion:
    """Pictures and their classes.

    Attributes:
        images: (n, 1, 28, 28) in [0, 1], the training pictures first.
        classes: (n,), indices of `CLASSES`.
        train: indices of the training pictures.
        test: indices of the test pictures.
    """

    images: Tensor
    classes: Tensor
    train: Tensor
    test: Tensor

    def captions(self, index: Tensor) -> list[str]:
        """Return the captions of pictures."""
        return [CLASSES[k] for k in self.classes[index].tolist()]


@cache
def load(folder: Path | None = None) -> Fashion:
    """Load the part in the repository, or all pictures from the published files.

    Args:
        folder: folder with the four `*-ubyte.gz` files, as in Debian's package (`PACKAGE`).

    Raises:
        FileNotFoundError: the folder lacks one of them; the message says how to get it.
    """
    if folder is None:
        with np.load(FILE) as file:
            parts = [(file[f"{name} images"], file[f"{name} classes"]) for name in PARTS]
    else:
        parts = [_read(folder, name) for name in PARTS]
    images = torch.cat([torch.from_numpy(x) for x, _ in parts])[:, None].float() / 255
    classes = torch.cat([torch.from_numpy(k) for _, k in parts]).long()
    train = len(parts[0][0])
    return Fashion(images, classes, torch.arange(train), torch.arange(train, len(images)))


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a part's pictures (n, 28, 28) and classes (n,), uint8, from its IDX files."""
    found = []
    for kind, start in (("images-idx3", 16), ("labels-idx1", 8)):
        file = folder / f"{PARTS[part]}-{kind}-ubyte.gz"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: apt-get install dataset-fashion-mnist puts it in {PACKAGE}; "
                "or give the folder that has the published files"
            )
        data = gzip.decompress(file.read_bytes())
        found.append(np.frombuffer(data, np.uint8, offset=start).copy())
    return found[0].reshape(-1, 28, 28), found[1]


def _draw(folder: Path = PACKAGE, count: int = 200) -> None:
    """Write `fashion.npz`: the first `count` pictures of each class in each part."""
    kept = {}
    for part in PARTS:
        images, classes = _read(folder, part)
        first = [np.flatnonzero(classes == k)[:count] for k in range(len(CLASSES))]
        index = np.sort(np.concatenate(first))
        kept[f"{part} images"], kept[f"{part} classes"] = images[index], classes[index]
    np.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(_draw, as_positional=False)
