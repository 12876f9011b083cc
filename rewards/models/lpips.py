"""The perceptual distance to a given picture."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.backbone import Backbone
from rewards.models.hub import File, Source, fetch_url, state
from rewards.models.instances import once, stamp
from rewards.pixels.reading import read
from steer.reward import Reward, clamp01, unknown

__all__ = ["NEEDS", "NETS", "SOURCE", "Lpips"]

SOURCE = Source(
    "richzhang/PerceptualSimilarity",
    ("alexnet-owt-7be5be79.pth",),
    licence="heads BSD-2-Clause; trunk: see torchvision's page",
    size="233 MB (alex), 528 MB (vgg), 5 MB (squeeze)",
)
"""The default trunk is a file of torchvision; torchmetrics ships the heads of this repository."""

NETS = {
    "alex": ("alexnet", "AlexNet_Weights", 31),
    "vgg": ("vgg16", "VGG16_Weights", 16),
    "squeeze": ("squeezenet1_1", "SqueezeNet1_1_Weights", 17),
}
"""Trunk -> torchvision's model, its weights, the smallest side that it accepts."""


NEEDS = (
    File("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", SOURCE.licence, "233 MB"),
)
"""What the default options need and the package does not contain."""


class Lpips(Reward):
    """Minus the perceptual distance to a reference picture, in (-inf, 0]; 0 if they are equal.

    `-sum_l mean_hw w_l . (u_l(x) - u_l(r))^2`, with u_l the activations of layer l of a trunk that
    was trained on ImageNet, normalised to a unit vector at each place, and w_l >= 0 a learned
    weight per channel (Zhang et al. 2018, arXiv 1801.03924). The reference r is stretched to the
    picture's size. Its authors rank by "alex" and optimise by "vgg".

    Known hack: noise to which the trunk is blind at its stride. A picture that is shifted by many
    pixels counts as a different one.

    Args:
        image: the reference, a picture file; transparent parts are placed on white.
        net: the trunk: alex, vgg or squeeze.
        trunk: the file of its weights, as torchvision publishes them. Default: torch's cache,
            downloaded where it is missing.
        size: the side that both pictures are stretched to first; None: the picture's own size.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the trunk.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown trunk, one whose weights cannot be loaded (the message says what to
            download and where to put it) or do not fit, a size or picture that is too small.
    """

    def __init__(
        self,
        image: str | Path,
        net: str = "alex",
        trunk: str | Path | None = None,
        size: int | None = None,
        dtype: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if net not in NETS:
            raise unknown("net", str(net), NETS)
        smallest = NETS[net][2]
        if size is not None and size < smallest:
            raise ValueError(f"size={size} is too small for {net!r}: give {smallest} at least")
        self.net, self.size = net, size
        self.register_buffer("reference", read(image, "image"))
        self.reference: Tensor
        self.backbone = _trunk(net, trunk, {"dtype": dtype, "compile": compile})

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1] -> (n,) in (-inf, 0].

        Raises:
            ValueError: the pictures are too small for the trunk.
        """
        smallest = NETS[self.net][2]
        shape = images.shape[-2:] if self.size is None else (self.size, self.size)
        if min(shape) < smallest:
            raise ValueError(
                f"pictures of {shape[0]}x{shape[1]} are too small for {self.net!r}, which takes "
                f"{smallest}x{smallest} and more: give size=64, which stretches them first"
            )
        x = clamp01(images)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x, reference = (
            p
            if p.shape[-2:] == shape
            else F.interpolate(p, shape, mode="bilinear", antialias=True)
            for p in (x, self.reference.to(x))
        )
        return -self.backbone.distance(x, reference).to(images.device)


class _Trunk(Backbone):
    """LPIPS of torchmetrics: two sets of pictures in [0, 1] -> their distances."""

    @property
    def tower(self) -> nn.Module:
        return self.model.net  # type: ignore[return-value]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances of pictures (n, 3, h, w) and (1, 3, h, w) -> (n,)."""
        with torch.autocast(self.device.type, enabled=False):
            a, b = (2 * x.to(self.device).to(self.dtype) - 1 for x in (a, b))
            distance = self.model(a, b)[:, 0, 0, 0]
        return distance.to(torch.promote_types(distance.dtype, torch.float32))


def _trunk(net: str, trunk: str | Path | None, execution: dict[str, Any]) -> _Trunk:
    """Return the network with its weights, once per file and execution."""
    from torchvision import models

    url = getattr(models, NETS[net][1]).DEFAULT.url
    file = fetch_url(url, "lpips", "trunk") if trunk is None else Path(trunk)

    def make() -> _Trunk:
        from torchmetrics.functional.image import lpips

        found = state(file, "lpips", "trunk")
        with torch.device("meta"):  # nothing is initialised at random: all weights come from files
            model = lpips._LPIPS(pretrained=False, net=net, pnet_rand=True)
        theirs = model.net.state_dict()
        # "slice2.3.weight" is torchvision's "features.3.weight"
        names = {key: re.sub(r"^slices?\.?\d+\.", "features.", key) for key in theirs}
        for key, name in names.items():
            if name not in found or found[name].shape != theirs[key].shape:
                raise ValueError(
                    f"{str(file)!r} holds no weights of torchvision's {NETS[net][0]} ({name!r} is "
                    "missing or of another shape): lpips:trunk= takes the file that torchvision "
                    f"publishes for net={net}"
                )
        heads = state(Path(lpips.__file__).parent / "lpips_models" / f"{net}.pth", "lpips", "net")
        weights = {f"net.{key}": found[name] for key, name in names.items()}
        for key, value in heads.items():  # the model has two names for each of its layers
            weights[key] = weights[key.replace("lin", "lins.", 1)] = value
        model.load_state_dict(weights, assign=True)
        model.scaling_layer = lpips.ScalingLayer()
        return _Trunk(model, nn.Identity(), **execution)  # type: ignore[arg-type]

    there = stamp(file) if file.is_file() else ()
    return once(("lpips", net, *there, *sorted(execution.items())), make)
