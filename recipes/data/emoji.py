"""The `emoji` data: about 320 concepts in four drawing styles, 32x32, with captions.

`python -m recipes.data.emoji` renders them from their npm packages (it needs npm and resvg-py)
into `emoji.npz`, which is part of the repository; loading it needs neither. See CREDITS.md.

>>> emoji = load()
>>> emoji.rgba.shape[1:], len(emoji.labels) == len(emoji)
((32, 32, 4), True)
"""

import argparse
import io
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["PACKAGES", "STYLES", "Emoji", "composite", "load", "render"]

FILE = Path(__file__).with_name("emoji.npz")

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
CAPTIONS = "emojibase-data@17.0.0"

STYLES = {
    "noto": "cartoon",
    "twemoji": "flat twemoji",
    "fluent": "glossy 3d",
    "fluent flat": "flat fluent",
}
"""Set -> the words that identify its style; "flat" alone fits two sets."""

GROUPS = {"animals-nature": "animal", "food-drink": "food", "smileys-emotion": "face"}
SUBGROUPS = {
    "animal-marine": "sea",
    "animal-bug": "insect bug",
    "plant-other": "leaf tree",
    "food-prepared": "meal",
    "food-asian": "asian meal",
    "food-sweet": "sweet dessert",
    "dishware": "tableware",
    "face-smiling": "happy",
    "face-affection": "happy love",
    "face-concerned": "sad",
    "face-negative": "angry",
    "face-unwell": "sick",
    "face-neutral-skeptical": "neutral",
    "face-tongue": "silly",
    "face-sleepy": "sleepy",
}

FACES = """ghost; alien; alien monster; skull; robot; clown face; ogre; goblin; pile of poo;
smiling face with sunglasses; smiling face with heart-eyes; crying face; loudly crying face;
angry face; enraged face; sleeping face; star-struck; partying face; cowboy hat face; nerd face;
grinning face; winking face; cold face; hot face; face with medical mask; exploding head;
face screaming in fear; nauseated face; thinking face; smiling face with halo;
smiling face with horns; zany face; money-mouth face; face with monocle; frowning face"""
DROPPED = """white flower; rosette; service dog; guide dog; front-facing baby chick; whale;
kitchen knife; spoon; fork and knife; pouring liquid; wing; paw prints; pig nose; amphora;
microbe; phoenix"""

COLOURS = {  # name -> hue interval in degrees; grey levels and brown are distinguished below
    "red": (345, 14),
    "orange": (14, 38),
    "yellow": (38, 68),
    "green": (68, 165),
    "blue": (165, 258),
    "purple": (258, 300),
    "pink": (300, 345),
}


def composite(rgba: np.ndarray) -> Tensor:
    """Composite RGBA pictures (n, h, w, 4) uint8 on white -> (n, 3, h, w) float32 in [0, 1]."""
    x = torch.from_numpy(rgba).float() / 255
    return (x[..., :3] * x[..., 3:] + 1 - x[..., 3:]).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Emoji:
    """Pictures and their words, by concept: picture i is concept i // 4 in style i % 4.

    Attributes:
        rgba: uint8 (n, 32, 32, 4), alpha not premultiplied.
        labels: the concept's name, one per picture.
        styles: style words, one per picture.
        groups: animal, plant, food, drink or face.
        subgroups: one or two words for a subgroup ("mammal", "fruit").
        tags: further words, one list per picture.
        held_out: bool (n,), the pairs that only the judge is trained on.
    """

    rgba: np.ndarray
    labels: list[str]
    styles: list[str]
    groups: list[str]
    subgroups: list[str]
    tags: list[list[str]]
    held_out: Tensor

    def __len__(self) -> int:
        return len(self.rgba)

    @cached_property
    def images(self) -> Tensor:
        """The pictures on white, float32 (n, 3, 32, 32) in [0, 1]."""
        return composite(self.rgba)

    @property
    def concepts(self) -> list[str]:
        """The distinct labels, in order."""
        return list(dict.fromkeys(self.labels))

    @property
    def train(self) -> Tensor:
        """Indices of the training pictures."""
        return (~self.held_out).nonzero()[:, 0]

    @property
    def held(self) -> Tensor:
        """Indices of the held-out pictures."""
        return self.held_out.nonzero()[:, 0]

    @cached_property
    def colours(self) -> list[list[str]]:
        """The colour words that cover at least 30 % of each picture's ink, strongest first."""
        return [_colours(picture) for picture in self.rgba]

    def captions(self, i: int, generator: torch.Generator) -> str:
        """Sample a true caption of picture i, of random specificity; never empty.

        It ranges from the label with its style (which identifies the picture) to only a group or a
        colour.
        """

        def pick(words: list[str]) -> str:
            return words[int(torch.randint(len(words), (), generator=generator))] if words else ""

        def chance() -> float:
            return float(torch.rand((), generator=generator))

        label, group, subgroup = self.labels[i], self.groups[i], self.subgroups[i]
        style = self.styles[i]
        style = pick(style.split()) if chance() < 0.3 else style
        colour, tag = pick(self.colours[i]), pick(self.tags[i])
        forms = [
            (0.31, [label]),
            (0.20, [style, label]),
            (0.09, [colour, label]),
            (0.03, [label, group]),
            (0.03, [label, tag]),
            (0.06, [group]),
            (0.05, [subgroup]),
            (0.04, [group, subgroup]),
            (0.04, [tag, subgroup]),
            (0.02, [tag]),
            (0.04, [style, group]),
            (0.02, [style, subgroup]),
            (0.03, [colour, group]),
            (0.02, [colour, subgroup]),
            (0.01, [style]),
            (0.01, [colour]),
        ]
        u = chance()
        words = [label]
        for weight, form in forms:
            words = form
            u -= weight
            if u < 0:
                break
        return " ".join(dict.fromkeys(w for w in words if w)) or label


def _colours(rgba: np.ndarray) -> list[str]:
    """Name the colours of one picture (h, w, 4) uint8."""
    x = rgba[..., :3][rgba[..., 3] > 127].astype(float) / 255
    if not len(x):
        return []
    high, low = x.max(-1), x.min(-1)
    chroma = high - low
    with np.errstate(invalid="ignore", divide="ignore"):
        r, g, b = x.T
        hue = np.where(
            high == r,
            (g - b) / chroma % 6,
            np.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4),
        )
    hue = np.nan_to_num(hue * 60)
    names = np.full(len(x), "grey", dtype=object)
    names[high < 0.25] = "black"
    names[(low > 0.85)] = "white"
    vivid = (chroma > 0.18) & (high >= 0.25)
    for name, (start, end) in COLOURS.items():
        inside = (hue >= start) & (hue < end) if start < end else (hue >= start) | (hue < end)
        names[vivid & inside] = name
    names[vivid & (hue < 45) & (high < 0.72)] = "brown"
    found, counts = np.unique(names.astype(str), return_counts=True)
    order = np.argsort(-counts)
    return [str(found[i]) for i in order if counts[i] >= 0.3 * len(x)]


@cache
def load(file: str | Path = FILE) -> Emoji:
    """Load the data of the repository."""
    with np.load(file, allow_pickle=False) as data:
        meta = json.loads(data["meta"].tobytes())
        rgba, held_out = data["rgba"], torch.from_numpy(data["held_out"])
    rows = [(c, s) for c in meta["concepts"] for s in meta["styles"]]
    return Emoji(
        rgba=rgba,
        labels=[c["label"] for c, _ in rows],
        styles=[s for _, s in rows],
        groups=[c["group"] for c, _ in rows],
        subgroups=[c["subgroup"] for c, _ in rows],
        tags=[c["tags"] for c, _ in rows],
        held_out=held_out,
    )


# ------------------------------------------------------------------------------- the builder
def _fetch(package: str, folder: Path, files: list[str]) -> dict[str, Any]:
    """Read JSON files from an npm package, which is downloaded but not installed."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True
    )
    archive = folder / done.stdout.decode().split()[-1]
    with tarfile.open(archive) as tar:
        return {f: json.load(tar.extractfile(f"package/{f}")) for f in files}  # type: ignore[arg-type]


def _key(hexcode: str) -> str:
    """Return codepoints in upper case, without the variation selector that some sets lack."""
    return "-".join(c for c in hexcode.upper().split("-") if c != "FE0F")


def _concepts(data: list[dict[str, Any]], messages: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Choose concepts and their words: codepoints -> {label, group, subgroup, tags}."""
    faces = {w.strip() for w in FACES.replace("\n", " ").split(";")}
    dropped = {w.strip() for w in DROPPED.replace("\n", " ").split(";")}
    subgroups = {s["order"]: s["key"] for s in messages["subgroups"]}  # one is outdated
    chosen = {}
    for entry in data:
        if "group" not in entry:
            continue
        group = messages["groups"][entry["group"]]["key"]
        subgroup = subgroups[entry["subgroup"]]
        label = entry["label"]
        wanted = label in faces if group == "smileys-emotion" else group in GROUPS
        if not wanted or label in dropped:
            continue
        kind = {"drink": "drink"}.get(subgroup, GROUPS[group])
        kind = "plant" if subgroup.startswith("plant") else kind
        chosen[_key(entry["hexcode"])] = {
            "label": label.lower(),
            "group": kind,
            "subgroup": SUBGROUPS.get(subgroup, subgroup.split("-")[-1]),
            "tags": [t.lower() for t in entry.get("tags", [])],
        }
    return chosen


def _draw(icons: dict[str, Any], name: str, size: int) -> np.ndarray:
    """Render one icon at 4 x `size` and downscale it by averaging premultiplied colours."""
    import resvg_py
    from PIL import Image

    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    side = max(width, height)  # a few icons are not square: centre them
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{left} {top} {side} {side}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * size, height=4 * size)
    x = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")).astype(np.float64)
    x[..., :3] *= x[..., 3:] / 255
    x = x.reshape(size, 4, size, 4, 4).mean((1, 3))
    x[..., :3] /= np.maximum(x[..., 3:] / 255, 1e-6)
    return np.round(x).clip(0, 255).astype(np.uint8)


def render(out: Path = FILE, size: int = 32, held_out: float = 0.1, seed: int = 0) -> None:
    """Render every concept that all four sets have, and write the file atomically.

    Args:
        out: the npz to write.
        size: side in pixels.
        held_out: fraction of the (concept, style) pairs that are held out of all training except
            the judge's.
        seed: seed for choosing those pairs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = _fetch(CAPTIONS, folder, ["package.json", "en/data.json", "en/messages.json"])
        sets = {n: _fetch(p, folder, ["icons.json", "chars.json"]) for n, p in PACKAGES.items()}
    concepts = _concepts(words["en/data.json"], words["en/messages.json"])
    # the two Fluent sets have the same names, and only one of them has the codepoints
    sets["fluent"]["chars.json"] = sets["fluent flat"]["chars.json"]
    names = {n: {_key(k): v for k, v in s["chars.json"].items()} for n, s in sets.items()}

    def has(set_name: str, key: str) -> bool:
        icons = sets[set_name]["icons.json"]
        name = names[set_name].get(key)
        return name in icons["icons"] or name in icons.get("aliases", {})

    keys = [k for k in concepts if all(has(n, k) for n in PACKAGES)]
    rgba = np.stack(
        [_draw(sets[n]["icons.json"], names[n][k], size) for k in keys for n in PACKAGES]
    )
    held = np.zeros(len(rgba), dtype=bool)
    rng = np.random.default_rng(seed)
    held[rng.permutation(len(rgba))[: round(held_out * len(rgba))]] = True
    meta = {
        "styles": [STYLES[n] for n in PACKAGES],
        "concepts": [{"codepoints": k, **concepts[k]} for k in keys],
    }
    text = np.frombuffer(json.dumps(meta, ensure_ascii=False).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, rgba=rgba, held_out=held, meta=text)
    partial = out.with_suffix(".partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, out)
    print(f"{out}: {len(keys)} concepts, {len(rgba)} pictures, {held.sum()} held out")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render the emoji data from its npm packages.")
    parser.add_argument("--out", type=Path, default=FILE)
    render(parser.parse_args().out)
