"""Benchmarks of the small pipeline `emoji-diffusers`: pictures, steering, a LoRA in diffusers.

    python -m benchmarks.emoji_diffusers [retrieval] [steering] [lora] [step] --out outputs/ed

- retrieval: the share of pictures whose own label scores highest among 100 by the judge, at 1, 4
  and 8 jumps, compared with the embedded map with the same labels and seeds; in plain diffusers at
  8 and 16 steps.
- steering: `fmrg-j` and `reno` against best-of-n at equal network calls, by reward and judge.
- lora: tuned by the CLIP on 200 prompts, and measured on 40 held-out prompts, by steer and by the
  pipeline's own call with the LoRA loaded by its own loader.
- step: time ratio of a guided `fmrg-j` step to its bare calls, interleaved.

Everything is seeded; for the last one the machine should be idle.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import rewards
import steer
from benchmarks.pipelines import ratio
from recipes.data.emoji import load
from recipes.defaults import EMOJI
from recipes.inputs import read_prompts
from rewards.judge import Judge
from steer.flow import composed
from steer.path import step_times
from steer.training.metric import retrieval_rate

MODEL = "emoji-diffusers"
FOLDER = Path(steer.__file__).with_name("zoo") / MODEL
REWARD = "clip"
RUN = {"num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "pt"}


def plain_pipeline() -> Any:
    """Return the pipeline as diffusers loads it, without progress bars."""
    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompts: list[str], seed: int, **more: Any) -> Tensor:
    """Return the pipeline's own pictures, one per prompt."""
    return pipe(prompts, generator=torch.Generator().manual_seed(seed), **RUN | more).images


@torch.no_grad()
def retrieval(seeds: int = 3) -> dict[str, Any]:
    """Return rates and standard errors, by model and steps."""
    concepts, judge = load().concepts, Judge()
    found: dict[str, Any] = {}
    for name in ("emoji", MODEL):
        flow = steer.load(name)
        for steps in (1, 4, 8):
            rates = []
            for seed in range(seeds):
                noise = torch.Generator().manual_seed(seed)
                order = torch.randperm(len(concepts), generator=noise)[:100].tolist()
                labels = [concepts[i] for i in order]
                x = torch.randn(100, *flow.event_shape, generator=noise)
                images = flow.decode(composed(flow.given(labels), x, step_times(steps)))
                rates.append(retrieval_rate(judge.similarity, images.clamp(0, 1), labels)[0])
            found[f"{name}, {steps} jumps"] = summary(rates, 100)
    pipe = plain_pipeline()
    for steps in (8, 16):
        rates = []
        for seed in range(seeds):
            noise = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(concepts), generator=noise)[:100].tolist()
            labels = [concepts[i] for i in order]
            images = drawn(pipe, labels, seed, num_inference_steps=steps)
            rates.append(retrieval_rate(judge.similarity, images, labels)[0])
        found[f"plain diffusers, {steps} steps"] = summary(rates, 100)
    return found


def summary(rates: list[float], each: int) -> dict[str, float]:
    """Return a rate over several hundred pictures, and its binomial standard error."""
    mean = sum(rates) / len(rates)
    return {"rate": mean, "error": (mean * (1 - mean) / (each * len(rates))) ** 0.5}


def steering(out: Path) -> dict[str, Any]:
    """Compare methods on 20 prompts x 3 seeds; best-of-n gets each one's network calls."""
    listed = read_prompts(EMOJI.compared)
    prompts = listed.prompts[:20]
    asked = None if listed.reward_prompts is None else listed.reward_prompts[:20]
    file = out / "prompts.jsonl"
    rows = [
        {"prompt": p, **({} if asked is None else {"reward_prompt": asked[i]})}
        for i, p in enumerate(prompts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = steer.compare(
        MODEL, REWARD, judge="embedded", prompts_file=file, seeds=3, out=out / "compare",
        methods=[
            "none:steps=4,particles=4", "best-of-n:steps=4", "fmrg-j:steps=8,particles=4",
            "reno:steps=12,particles=4",
        ],
    )  # fmt: skip
    return {"table": (folder / "table.md").read_text(encoding="utf-8")}


@torch.no_grad()
def read(images: Tensor, prompts: list[str]) -> dict[str, list[float]]:
    """Return the scores of pictures by the reward and the judge."""
    shown = images.clamp(0, 1).float()
    return {
        "reward": rewards.load(REWARD)(shown, prompts).tolist(),
        "judge": Judge()(shown, prompts).tolist(),
    }


def paired(before: list[float], after: list[float]) -> dict[str, float]:
    """Return means, the mean difference and its standard error."""
    gain = torch.tensor(after) - torch.tensor(before)
    return {
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "gain": float(gain.mean()),
        "error": float(gain.std() / len(gain) ** 0.5),
    }


def lora(out: Path, steps: int = 200) -> dict[str, Any]:
    """Tune, and measure on held-out prompts, with steer and in plain diffusers."""
    flow = steer.load(MODEL)
    tuned = steer.finetune(
        flow, REWARD, read_prompts(EMOJI.tuned).prompts, steps=steps, batch_size=16,
        temperature=0.003, options={"jumps": [1, 4], "anchor": 0.3}, judge=Judge(),
        out=out / "lora", sweep=[], check_prompts=read_prompts(EMOJI.held_out).prompts[:8],
        targets=TARGETS,
    )  # fmt: skip
    prompts = read_prompts(EMOJI.held_out).prompts[:40]
    found: dict[str, Any] = {}
    x = torch.randn(len(prompts), *flow.event_shape, generator=torch.Generator().manual_seed(1))
    for jumps in (1, 4):
        pictures = []
        for one in (tuned.at(0.0), tuned):
            with torch.no_grad():
                y = composed(one.given(prompts), x, step_times(jumps))
                pictures.append(read(one.decode(y), prompts))
        for who in ("reward", "judge"):
            found[f"steer, {jumps} jumps, {who}"] = paired(*(p[who] for p in pictures))
    pipe = plain_pipeline()
    before = [read(drawn(pipe, prompts, seed), prompts) for seed in range(3)]
    pipe.load_lora_weights(out / "lora")
    after = [read(drawn(pipe, prompts, seed), prompts) for seed in range(3)]
    for who in ("reward", "judge"):
        found[f"plain diffusers, 8 steps, {who}"] = paired(
            [v for part in before for v in part[who]], [v for part in after for v in part[who]]
        )
    return found


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"]
"""There is attention only in the middle, so the convolutions are tuned as well."""


def step() -> dict[str, Any]:
    """Return the ratio of a guided step to its bare calls: median and quartiles."""
    one = steer.load(MODEL)
    return {f"{n} particles": ratio(one, n, 8, 24 // n) for n in (1, 4, 12)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["retrieval", "steering", "lora", "step"])
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji_diffusers"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    parts = {
        "retrieval": retrieval, "steering": lambda: steering(asked.out),
        "lora": lambda: lora(asked.out), "step": step,
    }  # fmt: skip
    for name in asked.what:
        result = parts[name]()
        (asked.out / f"{name}.json").write_text(json.dumps(result, indent=1))
        print(name)
        for key, value in result.items():
            print(f"  {key}: {value}")
