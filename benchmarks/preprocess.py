"""How much a score changes if tensors preprocess the picture instead of PIL.

Every picture has 8 bits per channel, like a file. It is preprocessed both by the original's own
preprocessing (open_clip's transform, or transformers' image processor on Pillow) and by
`rewards.models.preprocess.Preprocess`; the same network scores both. Contents: 100 emoji and 100
synthetic pictures, smooth, noisy and hard-edged; sides of 64, 256 and 512. Networks: the embedded
CLIP (32 pixels, trained), and ViT-B-32 (224 pixels, random weights, as no larger weights are
available offline), each with one prompt. Differences are given in units of the score's standard
deviation over the pictures of that row, and in 1/255 for the preprocessed pixels.

    python -m benchmarks.preprocess
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recipes.data import emoji
from rewards.models.clip import EMBEDDED
from rewards.models.towers import OpenClip, open_clip_backbone
from steer.pictures import to_pil

SIDES = (64, 256, 512)


def synthetic(kind: str, count: int, side: int) -> Tensor:
    """Make pictures (count, 3, side, side) in [0, 1] with 8 bits per channel."""
    g = torch.Generator().manual_seed(0)
    if kind == "smooth":
        x = F.interpolate(torch.rand(count, 3, 5, 5, generator=g), (side, side), mode="bicubic")
    elif kind == "noisy":
        x = torch.rand(count, 3, side, side, generator=g)
    else:  # discs, bars and many edges, as in letters: flat colours with borders of one pixel
        y, z = torch.meshgrid(
            torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij"
        )
        x = torch.ones(count, 3, side, side)
        for i in range(count):
            for _ in range(6):
                a, b, r, w = torch.rand(4, generator=g).tolist()
                colour = torch.rand(3, generator=g)
                disc = (y - a) ** 2 + (z - b) ** 2 < (0.3 * r) ** 2
                bar = ((y - a) * w - (z - b) * (1 - w)).abs() < 0.05 * r
                x[i][:, disc | bar] = colour[:, None]
    return (x.clamp(0, 1) * 255).round() / 255


def pictures(side: int) -> Iterator[tuple[str, Tensor]]:
    """Return each content's pictures, (n, 3, side, side)."""
    data = emoji.load().images[:: max(1, len(emoji.load().images) // 100)][:100]
    large = [to_pil(x).resize((side, side), Image.Resampling.LANCZOS) for x in data]
    yield "emoji", torch.stack([_tensor(p) for p in large])
    for kind, count in (("smooth", 34), ("noisy", 33), ("hard edges", 33)):
        yield kind, synthetic(kind, count, side)


def _tensor(picture: Image.Image) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(picture.convert("RGB")) / 255


def networks() -> Iterator[tuple[str, OpenClip, Callable[[Image.Image], Tensor]]]:
    """Return name, backbone, and the original's preprocessing of a PIL picture."""
    import open_clip

    small = open_clip_backbone(str(EMBEDDED))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-32")
    large = OpenClip(model, open_clip.get_tokenizer("ViT-B-32"))
    for name, backbone in (("embedded, 32", small), ("ViT-B-32, 224", large)):
        settings = open_clip.get_model_preprocess_cfg(backbone.model)
        original = open_clip.image_transform(
            settings["size"], is_train=False, mean=settings["mean"], std=settings["std"],
            interpolation=settings.get("interpolation"),
            resize_mode=settings.get("resize_mode"),
        )  # fmt: skip
        yield name, backbone, original


@torch.no_grad()
def deviation(
    backbone: OpenClip, original: Callable[[Image.Image], Tensor], x: Tensor
) -> tuple[float, float, float, float]:
    """Return mean and largest difference of scores, in their spread, and of pixels, in 1/255."""
    text = backbone.text_features(["a red apple"])
    theirs = torch.stack([original(to_pil(p)) for p in x])
    ours = backbone.preprocess(x)
    std = backbone.preprocess.std
    pixels = 255 * ((theirs - ours) * std).abs()
    scores = [
        torch.cat([backbone.encode_image(part) @ text.T for part in batch.split(25)])[:, 0]
        for batch in (theirs, ours)
    ]
    off = (scores[0] - scores[1]).abs() / scores[0].std()
    return float(off.mean()), float(off.max()), float(pixels.mean()), float(pixels.max())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", help="one of the networks, by the start of its name")
    chosen = parser.parse_args()
    print("| network | content | side | score: mean, max (spreads) | pixels: mean, max (1/255) |")
    print("|---|---|---|---|---|")
    for name, backbone, original in networks():
        if chosen.only and not name.startswith(chosen.only):
            continue
        for side in SIDES:
            for kind, x in pictures(side):
                a, b, c, d = deviation(backbone, original, x)
                print(
                    f"| {name} | {kind} | {side} | {a:.4f}, {b:.4f} | {c:.2f}, {d:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
