"""All embedded rewards: unguided and guided pictures from the same noise, and the gain.

Four broad prompts with eight seeds each, 8 jumps unguided against `fmrg-j` in as many steps
(`split` for a reward without gradient). The judge measures how well the picture still shows the
prompt.

    python -m benchmarks.gallery --out docs/gallery
"""

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import rewards
import steer
from recipes.data import emoji
from rewards.judge import Judge
from steer.files import write_atomically
from steer.pictures import captioned_grid, save_picture, to_pil

PROMPTS = ["animal", "food", "face", "plant"]
SEEDS = 8
SPECS = [
    "clip",
    "colour:name=royalblue",
    "brightness",
    "-1*brightness",
    "contrast",
    "saturation",
    "sharpness",
    "smoothness",
    "symmetry",
    "symmetry:axis=horizontal",
    "antisymmetry",
    "layout:region=left",
    "similarity:image={reference}",
    "jpeg",
    "0.7*clip+0.3*colour:name=red",
]
REFERENCE = "butterfly"


def measure(
    flow: steer.FlowMap, judge: Judge, spec: str, steps: int
) -> tuple[dict[str, Any], steer.Result, steer.Result]:
    """Return the gain of a reward, and the pictures without and with guidance."""
    reward = rewards.load(spec)
    plain = steer.sample(flow, reward, PROMPTS, SEEDS, steps, "none")
    method = "fmrg-j" if reward.differentiable else "split"
    began = time.perf_counter()
    guided = steer.sample(flow, reward, PROMPTS, SEEDS, steps, method)
    gain = (guided.rewards - plain.rewards).flatten()
    error = float(gain.std()) / math.sqrt(len(gain))
    asked = [p for p in PROMPTS for _ in range(SEEDS)]
    assert plain.images is not None
    assert guided.images is not None
    figures = {
        "method": method,
        "unguided": float(plain.rewards.mean()),
        "guided": float(guided.rewards.mean()),
        "gain": float(gain.mean()),
        "standard error": error,
        "gain in standard errors": float(gain.mean()) / error,
        "judge unguided": float(judge(plain.images.flatten(0, 1), asked).mean()),
        "judge guided": float(judge(guided.images.flatten(0, 1), asked).mean()),
        "seconds": time.perf_counter() - began,
    }
    return figures, plain, guided


def main() -> None:
    """Write one sheet per reward, the table, and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("outputs/gallery"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    flow, judge, data = steer.load(args.model), Judge(), emoji.load()
    reference = args.out / "reference.png"
    to_pil(data.images[data.labels.index(REFERENCE)]).save(reference)
    lines = [
        "| reward | method | unguided | guided | gain ± SE | in SE | judge before, after |",
        "|---|---|---|---|---|---|---|",
    ]
    figures = {}
    for text in SPECS:
        spec = text.format(reference=reference)
        row, plain, guided = measure(flow, judge, spec, args.steps)
        title = text.format(reference="reference.png")
        figures[title] = row
        lines.append(
            f"| `{title}` | {row['method']} | {row['unguided']:.3f} | {row['guided']:.3f} | "
            f"{row['gain']:.3f} ± {row['standard error']:.3f} | "
            f"{row['gain in standard errors']:.1f} | "
            f"{row['judge unguided']:.2f}, {row['judge guided']:.2f} |"
        )
        print(lines[-1], flush=True)
        rows = []
        for name, result in (("unguided", plain), (title, guided)):
            assert result.images is not None
            shown = result.images[:, :3].flatten(0, 1)
            scores = [f"{r:.3g}" for r in result.rewards[:, :3].flatten().tolist()]
            rows.append((name, shown, scores))
        name = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")
        save_picture(captioned_grid(rows, size=64), args.out / f"{name}.png")
    write_atomically(args.out / "table.md", ("\n".join(lines) + "\n").encode())
    write_atomically(args.out / "figures.json", json.dumps(figures, indent=1).encode())


if __name__ == "__main__":
    main()
