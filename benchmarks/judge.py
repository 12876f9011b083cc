"""Are CLIP and judge reliable? Retrieval under changes, calibration, and hacked pictures.

Three questions. Do they recognise a picture's caption if the picture is recoloured, shifted,
noisy, or of a pair that the CLIP was not trained on? Do they rank real, generated and broken
pictures in the same way? And is the judge fooled by pictures that fool the CLIP: pixels that
ascend its gradient from unguided samples until they score higher than half of the real pictures?

    python -m benchmarks.judge --out outputs/judge
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

import steer
from recipes.contrastive import augment, retrieval
from recipes.data import emoji as plain_data
from recipes.data import recolour
from recipes.data.recolour import plain_label
from recipes.evaluate import draw
from recipes.sheet import contact_sheet
from rewards.judge import Judge
from rewards.models.clip import Clip
from steer.files import write_atomically

Similarity = Callable[[Tensor, list[str]], Tensor]


def similarity(clip: Clip) -> Similarity:
    """Return the CLIP's cosines as a function of pictures and texts."""
    return torch.no_grad()(lambda x, texts: clip.image_features(x) @ clip.text_features(texts).T)


def changes(images: Tensor) -> dict[str, Tensor]:
    """Return the same pictures with changes that preserve their content."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=g)
    moved = 1 - torch.nn.functional.pad(1 - images, (3, 0, 2, 0))[..., :32, :32]
    return {
        "as they are": images,
        "shifted by 3 and 2 pixels": moved,
        "mirrored": images.flip(-1),
        "noise .1": (images + 0.1 * noise).clamp(0, 1),
        "noise .3": (images + 0.3 * noise).clamp(0, 1),
        "crop, turn, jitter, blur, noise": augment(
            images, g, crop=0.15, noise=0.3, colour=0.2, blur=0.3
        ),
    }


def retrievals(scorers: dict[str, Similarity], n: int) -> dict[str, Any]:
    """Return how often a picture's own label scores highest of 100, by kind of picture."""
    emoji, other = plain_data.load(), recolour.load()
    g = torch.Generator().manual_seed(0)
    index = emoji.train[torch.randperm(len(emoji.train), generator=g)[:n]]
    labels = [emoji.labels[i] for i in index]
    out: dict[str, Any] = {}
    for name, images in changes(emoji.images[index]).items():
        out[name] = {who: retrieval(f, images, labels, emoji.labels) for who, f in scorers.items()}
    held = emoji.held.tolist()
    names = [emoji.labels[i] for i in held]
    out["held-out (concept, style) pairs"] = {
        who: retrieval(f, emoji.images[held], names, emoji.labels) for who, f in scorers.items()
    }
    bare = sorted({plain_label(label) for label in emoji.labels})
    for kind in ("trained", "held out"):
        turned, asked, colours = [], [], []
        for i in index.tolist():
            allowed = other.usable[i] if kind == "trained" else other.held_out[i]
            for k in allowed.nonzero()[:1, 0].tolist():
                turned.append(other.picture(i, other.names[k]))
                asked.append(plain_label(emoji.labels[i]))
                colours.append(other.names[k])
        pictures = torch.stack(turned)
        out[f"recoloured, {kind}"] = {
            who: retrieval(f, pictures, asked, bare) for who, f in scorers.items()
        }
        texts = [
            [f"{c} {label}" for c in other.names] for label in asked
        ]  # the same concept in every colour
        out[f"recoloured, {kind}: the right colour of 7"] = {
            who: sum(
                int(f(x[None], t).argmax()) == other.names.index(c)
                for x, t, c in zip(pictures, texts, colours, strict=True)
            )
            / len(pictures)
            for who, f in scorers.items()
        }
    return out


def broken(images: Tensor) -> dict[str, Tensor]:
    """Return pictures that no longer show their concept."""
    g = torch.Generator().manual_seed(2)
    tiles = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # (n, 3, 16, 8, 8)
    order = torch.stack([torch.randperm(16, generator=g) for _ in range(len(images))])
    mixed = torch.gather(tiles, 2, order[:, None, :, None, None].expand_as(tiles))
    mixed = mixed.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    noise = torch.randn(images.shape, generator=g)
    return {
        "tiles shuffled": mixed,
        "mean colour": flat,
        "noise .8": (images + 0.8 * noise).clamp(0, 1),
        "another concept": images.roll(len(images) // 2, 0),
    }


def calibration(
    flow: steer.FlowMap, clip: Clip, judge: Judge, n: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return mean scores by kind of picture, and the rank correlation of the two scorers."""
    emoji = plain_data.load()
    g = torch.Generator().manual_seed(3)
    index = emoji.train[torch.randperm(len(emoji.train), generator=g)[:n]].tolist()
    labels = [emoji.labels[i] for i in index]
    real = emoji.images[index]
    kinds = {"real": real}
    kinds |= {f"generated, {k} steps": draw(flow, labels, k, 5) for k in (1, 4)}
    kinds |= broken(real)
    out: dict[str, Any] = {}
    scores: dict[str, list[Tensor]] = {"clip": [], "judge": []}
    with torch.no_grad():
        for name, images in kinds.items():
            a, b = clip(images, labels), judge(images, labels)
            scores["clip"].append(a)
            scores["judge"].append(b)
            out[name] = {
                "clip": float(a.mean()),
                "judge": float(b.mean()),
                "rank correlation": float(spearman_corrcoef(a, b)),
            }
    both = [torch.cat(v) for v in scores.values()]
    out["all"] = {
        "clip": float(both[0].mean()),
        "judge": float(both[1].mean()),
        "rank correlation": float(spearman_corrcoef(*both)),
    }
    return out, {name: images[:12] for name, images in kinds.items()}


def climb(
    clip: Clip, images: Tensor, prompts: list[str], height: float, length: float, most: int
) -> tuple[Tensor, Tensor]:
    """Let pixels ascend the CLIP's gradient up to a score -> pictures, number of steps."""
    x, steps = images.clone(), torch.zeros(len(images))
    low = torch.arange(len(images))  # the rows that are still below the score
    for _ in range(most):
        here = x[low].requires_grad_()
        score = clip(here, [prompts[i] for i in low.tolist()])
        (g,) = torch.autograd.grad(score.sum(), here)
        norm = g.flatten(1).norm(dim=1)[:, None, None, None]
        still = score.detach() < height
        moved = (here.detach() + length * g / (norm + 1e-12)).clamp(0, 1)
        low, moved = low[still], moved[still]
        if not len(low):
            break
        x[low] = moved
        steps[low] += 1
    return x, steps


def hacks(
    flow: steer.FlowMap, clip: Clip, judge: Judge, n: int
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return the scores of hacked pictures by CLIP and judge."""
    emoji = plain_data.load()
    g = torch.Generator().manual_seed(4)
    names = emoji.concepts
    targets = [names[i] for i in torch.randint(len(names), (n,), generator=g).tolist()]
    with torch.no_grad():
        labels = [emoji.labels[i] for i in emoji.train]
        height = float(clip(emoji.images[emoji.train], labels).median())
    starts = {
        "unguided samples": draw(flow, [""] * n, 4, 9),
        "samples of another concept": draw(flow, targets[1:] + targets[:1], 4, 9),
    }
    out: dict[str, Any] = {"the real pictures' median CLIP": height}
    shown = {}
    for name, start in starts.items():
        for length in (0.1, 0.4):
            x, steps = climb(clip, start, targets, height, length, 60)
            with torch.no_grad():
                out[f"{name}, steps of {length}"] = {
                    "reached the height": float((clip(x, targets) >= height).float().mean()),
                    "steps": float(steps.mean()),
                    "pixels changed (rms)": float((x - start).square().mean().sqrt()),
                    "clip before": float(clip(start, targets).mean()),
                    "clip after": float(clip(x, targets).mean()),
                    "judge before": float(judge(start, targets).mean()),
                    "judge after": float(judge(x, targets).mean()),
                    "clip top-1": retrieval(similarity(clip), x, targets, names),
                    "judge top-1 before": retrieval(judge.similarity, start, targets, names),
                    "judge top-1": retrieval(judge.similarity, x, targets, names),
                }
            shown[f"{name}, {length}"] = x[:12]
    return out, shown, targets


def main() -> None:
    """Print the tables, and write them together with a sheet of the hacked pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clip", default=None)
    parser.add_argument("--judge", default=None)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("outputs/judge"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flow, clip, judge = steer.load(args.model), Clip(args.clip), Judge(args.judge)
    scorers = {"clip": similarity(clip), "judge": judge.similarity}
    figures: dict[str, Any] = {"retrieval, 1 of 100": retrievals(scorers, 5 * args.pictures)}
    figures["calibration"], kinds = calibration(flow, clip, judge, 2 * args.pictures)
    figures["hacked pictures"], shown, targets = hacks(flow, clip, judge, args.pictures)
    for title, rows in figures.items():
        print(f"\n{title}")
        for name, row in rows.items():
            cells = row.items() if isinstance(row, dict) else [("", row)]
            print(f"  {name}: " + ", ".join(f"{k} {v:.3f}".strip() for k, v in cells))
    write_atomically(args.out / "figures.json", json.dumps(figures, indent=1).encode())
    contact_sheet(
        torch.cat(list(shown.values())), targets[:12] * len(shown), args.out / "hacked.png"
    )
    contact_sheet(
        torch.cat(list(kinds.values())),
        [name for name, x in kinds.items() for _ in x],
        args.out / "kinds.png",
    )


if __name__ == "__main__":
    main()
