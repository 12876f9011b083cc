"""The embedded model's figures: `python -m recipes.evaluate --model emoji --out outputs/evaluate`.

Writes `metrics.json` and captioned sheets, and prints a table: how exact the map is, how often the
judge finds a picture's caption among 100, and how far pictures are from the training set.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.data.emoji import Emoji
from recipes.data.emoji import load as load_emoji
from recipes.sheet import contact_sheet
from steer.flow import FlowMap
from steer.folder import write_atomically
from steer.load import load
from steer.metric import composition_error, lagrangian_residual, nearest_distance, retrieval_rate

__all__ = ["draw", "evaluate"]

STEPS = (1, 2, 4, 8)
BROAD = ("animal", "mammal", "bird", "food", "fruit", "drink", "face", "plant", "")


@torch.no_grad()
def draw(flow: FlowMap, prompts: list[str], steps: int, seed: int, batch: int = 50) -> Tensor:
    """Draw one picture a prompt by `steps` equal jumps -> images (p, 3, h, w), clamped."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *flow.event_shape, generator=generator)
    images = []
    for start in range(0, len(prompts), batch):
        bound = flow.given(prompts[start : start + batch])
        x = noise[start : start + batch]
        for k in range(steps):
            x = bound.jump(x, k / steps, (k + 1) / steps)
        images.append(flow.decode(x).clamp(0, 1))
    return torch.cat(images)


def _exactness(flow: FlowMap, emoji: Emoji, n: int) -> dict[str, Any]:
    """Composition error and Lagrangian residual on the map's own path from noise."""
    generator = torch.Generator().manual_seed(1)
    labels = emoji.concepts
    chosen = torch.randperm(len(labels), generator=generator)[:n].tolist()
    bound = flow.given([labels[i] for i in chosen])
    x_0 = torch.randn(n, *flow.event_shape, generator=generator)
    triples = [(0.0, 0.25, 0.5), (0.0, 0.5, 1.0), (0.25, 0.5, 1.0), (0.5, 0.75, 1.0)]
    with torch.no_grad():
        at = {s: bound.jump(x_0, 0.0, s) if s else x_0 for s in (0.0, 0.25, 0.5)}
    return {
        "composition_error": {
            f"{s:g} -> {u:g} -> {t:g}": composition_error(bound, at[s], s, u, t)
            for s, u, t in triples
        },
        "lagrangian_residual": {
            f"from {s:g}": {
                f"{t:g}": lagrangian_residual(bound, at[s], s, t)
                for t in (0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 1.0)
                if t > s
            }
            for s in (0.0, 0.5)
        },
    }


def _retrieval(flow: FlowMap, emoji: Emoji, judge: Any, repeats: int) -> dict[str, Any]:
    """The judge's retrieval, 1 of 100 captions, for the model and for real pictures."""
    labels, hits = emoji.concepts, {str(k): [] for k in (*STEPS, "real", "real, held out")}
    styles = len(emoji) // len(labels)
    held = emoji.held.tolist()
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[:100].tolist()
        captions = [labels[i] for i in chosen]
        for k in STEPS:
            images = draw(flow, captions, k, seed)
            hits[str(k)].append(retrieval_rate(judge.similarity, images, captions)[0])
        style = torch.randint(styles, (100,), generator=generator)
        real = [i * styles + int(s) for i, s in zip(chosen, style, strict=True)]
        images = emoji.images[real]
        hits["real"].append(retrieval_rate(judge.similarity, images, captions)[0])
        some = {emoji.labels[i]: i for i in held}
        captions = [c for c in some if c in captions] + [c for c in captions if c not in some]
        shown = [some[c] for c in captions if c in some]
        scores = judge.similarity(emoji.images[shown], captions)
        hit = scores.argmax(1) == torch.arange(len(shown))
        hits["real, held out"] += hit.float().tolist()
    counts = {k: len(v) if k == "real, held out" else 100 * repeats for k, v in hits.items()}
    rates = {k: sum(v) / len(v) for k, v in hits.items()}
    return {
        "rate": rates,
        "standard_error": {k: (r * (1 - r) / counts[k]) ** 0.5 for k, r in rates.items()},
        "relative_to_real": {str(k): rates[str(k)] / rates["real"] for k in STEPS},
        "pictures": counts,
    }


def _distances(flow: FlowMap, emoji: Emoji, n: int) -> dict[str, float]:
    """Median distance to the nearest training picture, pixels in [0, 1]."""
    train = emoji.images[emoji.train]
    labels = emoji.concepts
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randint(len(labels), (n,), generator=generator).tolist()
    broad = [BROAD[i % len(BROAD)] for i in range(n)]
    real = nearest_distance(train, train, exclude_self=True)
    held = nearest_distance(emoji.images[emoji.held], train)
    return {
        "label prompts": _median(draw(flow, [labels[i] for i in chosen], 4, 3), train),
        "broad prompts": _median(draw(flow, broad, 4, 4), train),
        "real to nearest other real": float(real.median()),
        "held out to nearest training": float(held.median()),
    }


def _median(images: Tensor, train: Tensor) -> float:
    return float(nearest_distance(images, train).median())


def evaluate(
    model: str = "emoji",
    out: Path = Path("outputs/evaluate"),
    repeats: int = 3,
    pictures: int = 96,
) -> dict[str, Any]:
    """Measure a model on the emoji data, and write figures and sheets.

    Args:
        model: a name or folder for `steer.load`.
        out: folder for metrics.json and the sheets.
        repeats: draws of 100 captions for the retrieval.
        pictures: pictures for the other figures.
    """
    from rewards.judge import Judge

    flow, emoji, began = load(model), load_emoji(), time.perf_counter()
    metrics = {
        "model": str(model),
        **_exactness(flow, emoji, pictures),
        "retrieval_1_of_100": _retrieval(flow, emoji, Judge(), repeats),
        "nearest_training_distance": _distances(flow, emoji, pictures),
    }
    labels = emoji.concepts
    generator = torch.Generator().manual_seed(5)
    some = [labels[i] for i in torch.randperm(len(labels), generator=generator)[:60].tolist()]
    for k in STEPS:
        contact_sheet(draw(flow, some, k, 6), some, out / f"labels_{k}_step.png")
    broad = [p for p in BROAD for _ in range(12)]
    contact_sheet(draw(flow, broad, 4, 7), broad, out / "broad_4_step.png")
    metrics["seconds"] = time.perf_counter() - began
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    _show(metrics)
    return metrics


def _show(metrics: dict[str, Any]) -> None:
    """Print the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "at", "value", title=f"model {metrics['model']}")
    retrieval = metrics["retrieval_1_of_100"]
    for k, rate in retrieval["rate"].items():
        name = f"{k} steps" if k.isdigit() else k
        error = retrieval["standard_error"][k]
        ratio = retrieval["relative_to_real"].get(k)
        beside = f"  ({ratio:.0%} of real)" if ratio is not None else ""
        table.add_row("retrieval, 1 of 100", name, f"{rate:.3f} ± {error:.3f}{beside}")
    for at, value in metrics["composition_error"].items():
        table.add_row("composition error", at, f"{value:.3f}")
    for start, values in metrics["lagrangian_residual"].items():
        for t, value in values.items():
            table.add_row("Lagrangian residual", f"{start} at {t}", f"{value:.3f}")
    for what, value in metrics["nearest_training_distance"].items():
        table.add_row("nearest training picture", what, f"{value:.3f}")
    Console().print(table)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(evaluate)
