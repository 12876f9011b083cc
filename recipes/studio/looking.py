"""Scores of pictures by a reward, and maps of its gradient."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from rewards.checking import check
from steer.devices import differentiating
from steer.pictures import to_pil
from steer.reward import Reward, score

__all__ = ["heat", "looked_at", "report_of"]


def heat(image: Tensor, gradient: Tensor) -> Image.Image:
    """Return a picture (3, h, w) overlaid with the size of its gradient, in orange.

    The strength is the norm over channels, divided by its 99th percentile.
    """
    size = gradient.norm(dim=0)
    share = (size / size.flatten().quantile(0.99).clamp(min=1e-30)).clamp(0, 1)
    grey = image.mean(0, keepdim=True).expand(3, -1, -1)
    colour = torch.tensor([0.9, 0.45, 0.0]).reshape(3, 1, 1)
    return to_pil(torch.lerp(grey, colour.expand_as(grey), 0.85 * share))


def looked_at(
    reward: Reward, files: Sequence[str], prompt: str, device: torch.device | None = None
) -> list[tuple[str, float, Image.Image, Image.Image | None]]:
    """Score pictures -> (name, score, picture, its gradient as a heat map or None) of each.

    Args:
        reward: the reward.
        files: files of pictures.
        prompt: the reward's prompt, if it needs one.
        device: device of the reward.

    Raises:
        ValueError: no pictures, or a file that is not a picture.
    """
    if not files:
        raise ValueError("drop in some pictures first")
    found = []
    for name in files:
        try:
            image = Image.open(name).convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{Path(name).name} is no picture that can be read") from error
        x = (pil_to_tensor(image).float() / 255)[None].to(device)
        asked = [prompt] if prompt.strip() else None
        if not reward.differentiable:
            with torch.no_grad():
                value = score(reward, x, asked)
            found.append((Path(name).name, float(value), image, None))
            continue
        x.requires_grad_()
        with differentiating():
            value = score(reward, x, asked)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        picture = heat(x[0].detach().cpu(), gradient[0].cpu())
        found.append((Path(name).name, float(value.detach()), image, picture))
    return found


def report_of(reward: Reward) -> str:
    """Return the findings of `steer check-reward` as a Markdown table."""
    report = check(reward)
    mark = {"pass": "ok", "warn": "note", "fail": "**FAILED**", "skip": "skipped"}
    rows = "".join(
        f"| {mark[f.verdict]} | {f.name} | {f.line.replace('|', chr(92) + '|')} |\n"
        for f in report.findings
    )
    return f"| | check | what was seen |\n|---|---|---|\n{rows}"
