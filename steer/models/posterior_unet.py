"""The U-Net of a posterior map, `v(u, r, s, x, t, text)`, and its files."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.flow import per_row
from steer.models.folder import folder_of, read_network, write_network
from steer.models.posterior import Preconditioned
from steer.models.two_time import TwoTimeUNet, Waves
from steer.models.words import Encoded
from steer.path import Linear
from steer.posterior import PosteriorMap

__all__ = ["PosteriorUNet", "load_posterior", "save_posterior"]

FORMAT = "steer.posterior-unet/1"

FOLDER = "posterior"
"""The folder of the posterior map in a model's folder."""


class PosteriorUNet(TwoTimeUNet):
    """A `TwoTimeUNet` in the inner times r and s that also sees the state x at the outer time t.

    The inner state u and x are stacked as channels; t has an embedding of its own.

    Args:
        *args: as of `TwoTimeUNet`.
        **options: the same.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        channels = self.config["channels"][0]
        self.stem = nn.Conv2d(2 * self.colours, channels, 3, padding=1)
        self.outer = Waves(self.config["highest"][0], self.config["width"])
        self._encoded = Encoded(torch.zeros(1, 1, dtype=torch.long))

    def given(self, prompts: Sequence[str]) -> "PosteriorUNet":
        """Bind p prompts; the result shares the parameters and takes p * n rows, prompt-major."""
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        bound._encoded = self.text.bind(prompts, stacklevel=4)
        return bound

    def forward(  # type: ignore[override]
        self, u: Tensor, r: Tensor, s: Tensor, x: Tensor, t: Tensor
    ) -> Tensor:
        """Return v, (n, c, h, w), for inner states u, states x, (n, c, h, w), and times (n,)."""
        kind = self.stem.weight.dtype
        text = per_row(self._encoded(self.text, u.device), len(u), "prompts")
        told = self.start(r) + self.gap(s - r) + self.outer(t) + text
        return self.carry(torch.cat([u, x], 1).to(kind), told).to(u.dtype)


def load_posterior(name: str | os.PathLike[str]) -> PosteriorMap:
    """Load the posterior map of a model: `steer.load_posterior("fashion").given(["boot"])`.

    Args:
        name: an embedded model that has one, or a folder that holds `posterior`, as `steer train`
            writes it.

    Raises:
        FileNotFoundError: the model has no posterior map.
        ValueError: an unknown name, or files that do not contain a posterior map.
    """
    folder = folder_of(name) / FOLDER
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{os.fspath(name)!r} has no posterior map, no folder {folder}: train one with "
            "`steer train --stages '[posterior]'`, or take steer.Glass, which needs none"
        )
    network = read_network(folder, PosteriorUNet, FORMAT)
    found = PosteriorMap(Preconditioned(network, Linear()))
    return found.eval().requires_grad_(False)


def save_posterior(
    posterior: PosteriorMap, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write a posterior map's config.json and model.safetensors; each written atomically.

    Raises:
        TypeError: its network is not a `PosteriorUNet` in `Preconditioned`.
    """
    network = getattr(posterior.network, "network", None)
    if not isinstance(network, PosteriorUNet):
        raise TypeError(
            f"a posterior map of {type(network or posterior.network).__name__} has no folder "
            "format: save its state_dict yourself"
        )
    write_network(network, Path(folder), FORMAT, dtype)
