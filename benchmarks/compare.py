"""Guidance against brute force at equal network calls, by the reward and by the judge.

`fmtt` and `split` (16 steps, 4 particles) against `best-of-n` (4-step candidates, as many as the
same total NFE buys), each by its highest-reward picture per prompt, and `none` (4 steps) by its
mean. Standard errors are over prompts x seeds.

    python -m benchmarks.compare --out outputs/compare
"""

import argparse
import io
import json
import math
from pathlib import Path

import torch
from torch import Tensor

import rewards
import steer
from rewards.judge import Judge
from steer.folder import captioned_grid, write_atomically
from steer.sample import PROBES, plan

PROMPTS = """red apple; cat; panda; tropical fish; hamburger; sunflower; ghost; pizza; rooster;
elephant; strawberry; cactus; hot beverage; octopus; frog; animal; food; face; fruit; bird"""
"""Fifteen labels, which pin a picture down, and five groups, which leave it open."""


def best(result: steer.Result) -> tuple[Tensor, Tensor]:
    """Return the highest-reward pictures (p, 3, h, w) and their rewards (p,)."""
    rows = torch.arange(len(result.best))
    assert result.images is not None
    return result.images[rows, result.best], result.rewards[rows, result.best]


def run(
    flow: steer.FlowMap, reward: steer.Reward, judge: Judge, prompts: list[str], seed: int
) -> dict[str, dict[str, Tensor]]:
    """Return, for each row of the table, pictures and the reward and judge of each prompt."""
    out = {}

    def keep(name: str, images: Tensor, scores: Tensor, nfe: int) -> None:
        per = images.unsqueeze(1) if images.ndim == 4 else images
        asked = [p for p in prompts for _ in range(per.shape[1])]
        judged = judge(per.flatten(0, 1), asked).reshape(per.shape[:2]).mean(1)
        nfes = torch.full((len(prompts),), float(nfe))
        out[name] = {"images": per[:, 0], "reward": scores, "judge": judged, "nfe": nfes}

    plain = steer.sample(flow, reward, prompts, 4, 4, "none", seed=seed)
    assert plain.images is not None
    keep("none, 4 steps (mean)", plain.images, plain.rewards.mean(1), 4)
    for method in ("fmtt", "split"):
        guided = steer.sample(flow, reward, prompts, 4, 16, method, seed=seed)
        total = 4 * plan(method, 16)["nfe"] + PROBES  # setting the temperature counts too
        keep(f"{method}, 16 steps, 4 particles", *best(guided), total)
        n = total // 4
        many = steer.sample(flow, reward, prompts, n, 4, "best-of-n", seed=seed)
        keep(f"best of {n}, 4 steps", *best(many), total)
    return out


def main() -> None:
    """Print the table, and write it with a sheet of pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--reward", default="clip")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = [p.strip() for p in PROMPTS.split(";")]
    flow, reward, judge = steer.load(args.model), rewards.load(args.reward), Judge()
    runs = [run(flow, reward, judge, prompts, seed) for seed in range(args.seeds)]
    table = [
        "| method | NFE a prompt | reward | judge | reward - none | judge - none |",
        "|---|---|---|---|---|---|",
    ]
    figures = {}
    base = next(iter(runs[0]))
    for name in runs[0]:
        row = {k: torch.cat([r[name][k] for r in runs]) for k in ("reward", "judge", "nfe")}
        cells = [name, f"{float(row['nfe'].mean()):.0f}"]
        for k in ("reward", "judge"):
            cells.append(estimate(row[k]))
        for k in ("reward", "judge"):
            cells.append(estimate(row[k] - torch.cat([r[base][k] for r in runs])))
        table.append("| " + " | ".join(cells) + " |")
        figures[name] = {k: v.tolist() for k, v in row.items()}
    text = "\n".join(table)
    print(text)
    write_atomically(args.out / "table.md", text.encode())
    write_atomically(args.out / "figures.json", json.dumps(figures).encode())
    rows = [(name, r["images"], prompts) for name, r in runs[0].items()]
    sheet = io.BytesIO()
    captioned_grid(rows, size=64).save(sheet, "PNG")
    write_atomically(args.out / "sheet.png", sheet.getvalue())


def estimate(values: Tensor) -> str:
    """Return mean ± standard error."""
    return f"{float(values.mean()):.4f} ± {float(values.std()) / math.sqrt(len(values)):.4f}"


if __name__ == "__main__":
    main()
