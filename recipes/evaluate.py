"""`steer eval`: a model's figures on the emoji data.

The figures are the exactness of the map, how often the judge recognises a picture's caption, the
binding of words that were never combined in training, the distance of the pictures' law from that
of the data, and the distance of single pictures from the training set. Figures of real pictures
are given as upper or lower bounds.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from recipes.binding import colour_binding, style_binding
from recipes.crew import Crew, crew_of
from recipes.data import fashion as fashion_data
from recipes.data.emoji import Emoji
from recipes.data.emoji import load as load_emoji
from recipes.defaults import own
from recipes.evaluate_classes import class_parts, show_classes
from recipes.evaluate_report import show
from recipes.figures import estimate, pairwise_distance, rate
from recipes.identity import fingerprints
from recipes.inputs import load_model
from recipes.measure import draw, kid
from recipes.partial import Partial
from recipes.sheet import contact_sheet
from recipes.terminal import console
from rewards.judge import Judge
from steer.files import numbers, write_atomically
from steer.flow import FlowMap
from steer.models.posterior_unet import load_posterior
from steer.training.metric import (
    composition_error,
    lagrangian_residual,
    nearest_distance,
    retrieval_rate,
)

__all__ = ["draw", "evaluate"]

STEPS = (1, 2, 4, 8)
BROAD = ("animal", "mammal", "bird", "food", "fruit", "drink", "face", "plant", "")


def _exactness(flow: FlowMap, emoji: Emoji, n: int) -> dict[str, Any]:
    """Return composition error and Lagrangian residual along the map's own path from noise."""
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


def _retrieval(
    flow: FlowMap, emoji: Emoji, judge: Judge, repeats: int, out: Path
) -> dict[str, Any]:
    """Return the judge's retrieval, 1 of 100 captions, for the model and for real pictures."""
    labels = emoji.concepts
    hits: dict[str, list[float]] = {str(k): [] for k in (*STEPS, "real", "real, held out")}
    styles = len(emoji) // len(labels)
    held = emoji.held.tolist()
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[:100].tolist()
        captions = [labels[i] for i in chosen]
        for k in STEPS:
            images = draw(flow, captions, k, seed)
            hits[str(k)].append(retrieval_rate(judge.similarity, images, captions)[0])
            if seed == 0:
                contact_sheet(images[:60], captions[:60], out / f"labels_{k}_step.png")
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


def _distances(flow: FlowMap, emoji: Emoji, n: int, out: Path) -> dict[str, Any]:
    """Return median pixel distances to the nearest training picture, and the share too near.

    A picture is too near if its distance is below the 5 % quantile of the distances between real
    pictures and their nearest other real picture.
    """
    train = emoji.images[emoji.train]
    labels = emoji.concepts
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randint(len(labels), (n,), generator=generator).tolist()
    broad = [BROAD[i % len(BROAD)] for i in range(n)]
    drawn = draw(flow, broad, 4, 4)
    order = sorted(range(n), key=lambda i: BROAD.index(broad[i]))
    contact_sheet(drawn[order], [broad[i] for i in order], out / "broad_4_step.png")
    nearest = {
        "label prompts": nearest_distance(draw(flow, [labels[i] for i in chosen], 4, 3), train),
        "broad prompts": nearest_distance(drawn, train),
        "real to nearest other real": nearest_distance(train, train, exclude_self=True),
        "held out to nearest training": nearest_distance(emoji.images[emoji.held], train),
    }
    limit = nearest["real to nearest other real"].quantile(0.05)
    return {
        "nearest_training_distance": {k: float(d.median()) for k, d in nearest.items()},
        "memorisation": {
            "limit": float(limit),
            "share_nearer": {k: rate(d < limit)._asdict() for k, d in nearest.items()},
        },
    }


def _kernel_distance(
    flow: FlowMap, emoji: Emoji, judge: Judge, real: Tensor, n: int
) -> dict[str, Any]:
    """Return KID in the judge's features: samples of training captions to training pictures.

    Args:
        flow: the model.
        emoji: the data.
        judge: the judge, which gives the features.
        real: its features of all emoji.
        n: pictures for each number of steps.
    """
    generator = torch.Generator().manual_seed(12)
    index = emoji.train[torch.randint(len(emoji.train), (n,), generator=generator)]
    captions = [emoji.captions(i, generator) for i in index.tolist()]
    train = real[emoji.train]
    first, second = train[torch.randperm(len(train), generator=generator)].chunk(2)
    values = {f"{k} steps": kid(train, judge.features(draw(flow, captions, k, 13))) for k in STEPS}
    values["real to real"] = kid(first, second)
    return {k: {"mean": mean, "spread": spread} for k, (mean, spread) in values.items()}


def _diversity(
    flow: FlowMap, emoji: Emoji, judge: Judge, real: Tensor, prompts: int, samples: int
) -> dict[str, Any]:
    """Return the mean feature distance between pictures of one prompt, by its breadth.

    "real": all real pictures of that label, subgroup or group. Subgroups have at least 4 labels.
    """
    generator = torch.Generator().manual_seed(14)

    def some(names: Sequence[str]) -> list[str]:
        distinct = list(dict.fromkeys(names))
        order = torch.randperm(len(distinct), generator=generator)[:prompts].tolist()
        return [distinct[i] for i in order]

    wide = [s for s in emoji.subgroups if emoji.subgroups.count(s) >= 4 * len({*emoji.styles})]
    families: dict[str, tuple[list[str], list[str]]] = {
        "labels": (emoji.labels, some(emoji.labels)),
        "subgroups": (emoji.subgroups, some(wide)),
        "groups": (emoji.groups, some(emoji.groups)),
        "empty prompt": ([""] * len(emoji), [""]),
    }
    made = {}
    for breadth, (words, chosen) in families.items():
        drawn = draw(flow, [p for p in chosen for _ in range(samples)], 4, 15)
        features = judge.features(drawn).unflatten(0, (len(chosen), samples))
        rows = [torch.tensor([word == p for word in words]) for p in chosen]
        made[breadth] = {
            "model": estimate(torch.tensor([pairwise_distance(f) for f in features]))._asdict(),
            "real": estimate(torch.tensor([pairwise_distance(real[r]) for r in rows]))._asdict(),
            "prompts": len(chosen),
        }
    return made


def evaluate(
    model: str = "emoji",
    out: Path = Path("outputs/evaluate"),
    repeats: int = 3,
    pictures: int = 96,
    paths: int = 32,
    bindings: int = 200,
    kernel: int = 200,
    breadth: int = 8,
    samples: int = 16,
    overwrite: bool = False,
    devices: int = 1,
    num_nodes: int = 1,
) -> dict[str, Any]:
    """Measure a model on the data that it was trained on, and write figures and sheets.

    The emoji, or Fashion-MNIST for the model `fashion` and ones of its shape. Some minutes on one
    core. Figures of an earlier time in the folder are replaced.

    Args:
        model: a name that `steer models` lists, a folder, or file.py:Name.
        out: folder for metrics.json and the sheets.
        repeats: random sets of 100 captions for the retrieval.
        pictures: pictures for the distances to the training set.
        paths: paths for the errors of the map.
        bindings: prompts with a colour, and at most as many with a style.
        kernel: pictures for the kernel inception distance (KID), for each number of steps.
        breadth: prompts of each kind (from specific to broad) for the diversity.
        samples: pictures of each.
        overwrite: delete what an interrupted run with other settings has finished.
        devices: processes on this machine, on the CPU; they divide the figures among them.
        num_nodes: number of machines, with a shared file system; SLURM or torchrun starts the
            processes.
    """
    sizes = {
        "repeats": repeats, "pictures": pictures, "paths": paths, "bindings": bindings,
        "kernel": kernel, "breadth": breadth, "samples": samples,
    }  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    crew = crew_of(devices, num_nodes, "cpu")
    flow = load_model(model)
    with torch.no_grad():
        shape = flow.decode(torch.zeros(1, *flow.event_shape)).shape[1:]
    if flow.event_shape == (1, 28, 28):
        return _evaluate_classes(model, flow, sizes, out, overwrite, crew)
    emoji, judge = load_emoji(), Judge()
    if shape != emoji.images.shape[1:]:
        raise ValueError(
            f"model {model!r} decodes to shape {tuple(shape)}: the emoji, which it is measured "
            f"on, have {tuple(emoji.images.shape[1:])}"
        )
    out.mkdir(parents=True, exist_ok=True)
    real = judge.features(emoji.images)
    parts: list[Callable[[], dict[str, Any]]] = [
        lambda: _exactness(flow, emoji, paths),
        lambda: {"retrieval_1_of_100": _retrieval(flow, emoji, judge, repeats, out)},
        lambda: {"style_binding": style_binding(flow, emoji, judge, bindings)},
        lambda: {"colour_binding": colour_binding(flow, emoji, judge, bindings)},
        lambda: {"kernel_distance": _kernel_distance(flow, emoji, judge, real, kernel)},
        lambda: {"diversity": _diversity(flow, emoji, judge, real, breadth, samples)},
        lambda: _distances(flow, emoji, pictures, out),
    ]
    metrics = _metrics(parts, {"model": str(model), "sizes": sizes}, out, overwrite, crew)
    if crew.first:
        show(metrics)
    return metrics


def _evaluate_classes(
    model: str, flow: FlowMap, sizes: dict[str, int], out: Path, overwrite: bool, crew: Crew
) -> dict[str, Any]:
    """Measure a model of Fashion-MNIST, and its posterior map where it has one."""
    out.mkdir(parents=True, exist_ok=True)
    folder, posterior = own("fashion").judge, None
    with suppress(ValueError, FileNotFoundError):  # a model without a posterior map
        posterior = load_posterior(model)
    kernel = max(5 * sizes["kernel"], sizes["paths"])  # the pictures are small
    parts = class_parts(
        flow, posterior, fashion_data.load(), Judge(folder), kernel, sizes["paths"], out
    )
    head = {
        "model": str(model), "pictures": kernel, "paths": sizes["paths"], "data": "fashion",
    }  # fmt: skip
    metrics = _metrics(parts, head, out, overwrite, crew)
    if crew.first:
        show_classes(metrics)
    return metrics


def _metrics(
    parts: Sequence[Callable[[], dict[str, Any]]],
    metrics: dict[str, Any],
    out: Path,
    overwrite: bool,
    crew: Crew,
) -> dict[str, Any]:
    """Measure all parts, and write the figures to metrics.json.

    Parts that an interrupted evaluation with the same settings has finished are read. Each of
    several processes measures its share, and the first one joins the figures; the others return
    `metrics` unchanged.
    """
    began = time.perf_counter()
    names = [f"{i:03d}" for i in range(len(parts))]
    identity = {**metrics, "files": fingerprints(metrics["model"])}
    with Partial(out, identity, overwrite, console(), crew) as partial:
        left = crew.told(lambda: [name for name in names if not partial.has(name)])
        for name in track(crew.share(left), "measuring", console=console()):
            partial.add(name, {}, numbers(parts[int(name)]()))
        if not crew.first:
            return metrics
        crew.wait(lambda: all(partial.has(name) for name in names))
        for name in names:
            metrics |= partial.read(name)[1]
        metrics["seconds"] = time.perf_counter() - began
        write_atomically(out / "metrics.json", json.dumps(numbers(metrics), indent=1).encode())
        partial.drop()
    return metrics


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(evaluate)
