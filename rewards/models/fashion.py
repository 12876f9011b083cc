"""The log-probability of a kind of clothes, by a small Fashion-MNIST classifier."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.classifier import Classifier

__all__ = ["EMBEDDED", "Fashion", "FashionNetwork"]

EMBEDDED = Path(__file__).parents[1] / "zoo" / "fashion"
"""The classifier of the package."""

SIDE = 28


class FashionNetwork(nn.Module):
    """Pictures (n, 3, h, w) in [0, 1] -> logits (n, classes): three convolutions on 28x28 luma.

    Args:
        classes: number of classes.
        channels: of each convolution; the grid halves after each.
    """

    def __init__(self, classes: int = 10, channels: tuple[int, ...] = (32, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for width in channels:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
            layers += [nn.AvgPool2d(2)]
            before = width
        side = SIDE // 2 ** len(channels)
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side**2, 64))
        self.head = nn.Sequential(nn.GELU(), nn.Dropout(0.3), nn.Linear(64, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (n, classes)."""
        x = images.mean(1, keepdim=True)
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.head(self.trunk(2 * x - 1))


class Fashion(Classifier):
    """`log softmax(logits(image))[target]`, the log-probability of a kind of clothes, in nats.

    By a small classifier of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747) in the
    package. Known hack: as for any single classifier, invisible adversarial patterns; the judge of
    the model `fashion` is another network, trained with noise and blur.

    Args:
        target: the class, by its name or index. None: the one that the prompt names.

    Raises:
        ValueError: there is no such class; the message has the nearest.
    """

    def __init__(self, target: int | str | None = None) -> None:
        settings = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8"))
        names = settings.pop("names")
        network = FashionNetwork(len(names))
        state = load_file(EMBEDDED / "model.safetensors")
        network.load_state_dict({k: v.float() for k, v in state.items()})
        with torch.no_grad():
            super().__init__(network.eval(), target=target, names=names)
