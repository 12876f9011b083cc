"""Inverse problems on emoji: measurements of pictures, and samples of the posterior.

The model's own pictures (so that the truth is one of its samples) are masked, downscaled and
blurred, with noise of a known standard deviation. `noise-smc` at temperature 1 samples Bayes'
posterior under the model, with the same prompt; it is compared with best-of-n at equal network
calls. The benchmark reports the root mean square residual of the measurement, in standard
deviations of the noise (the truth itself has 1), and the PSNR to the truth.

    python -m benchmarks.inverse --out docs/inverse.png
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import steer
from rewards.pixels.measurement import Deblurring, Inpainting, Measurement, SuperResolution
from steer.files import write_atomically
from steer.pictures import captioned_grid, save_picture

PROMPTS = ["panda", "strawberry"]
SD = 0.3


def problems(truth: Tensor, generator: torch.Generator) -> dict[str, tuple[Measurement, Tensor]]:
    """Return each problem's reward with its noisy measurement, and how that looks."""
    side = truth.shape[-1]
    mask = torch.ones(side, side)
    mask[:, side // 2 :] = 0

    def noisy(x: Tensor) -> Tensor:
        return x + SD * torch.randn(x.shape, generator=generator)

    hidden = Inpainting(noisy(truth), mask, SD)
    small = torch.nn.functional.avg_pool2d(truth[None], 4)[0]
    fewer = SuperResolution(noisy(small), 4, SD)
    blurred = Deblurring(noisy(Deblurring(truth, 2.0, SD).operator(truth[None])[0]), 2.0, SD, True)
    shown = {
        "right half hidden": (hidden, hidden.image[0] * mask),
        "4x fewer pixels": (
            fewer, torch.nn.functional.interpolate(fewer.image, (side, side))[0],
        ),
        "blurred": (blurred, blurred.image[0]),
    }  # fmt: skip
    return {name: (reward, picture.clamp(0, 1)) for name, (reward, picture) in shown.items()}


def misfit(reward: Measurement, images: Tensor) -> float:
    """Return the root mean square of `A x - y` over the noise's standard deviation."""
    miss = reward.operator(images) - reward.measured(images)
    used = (reward.operator(torch.ones_like(images[:1])) != 0).expand_as(miss)
    return float(miss[used].square().mean().sqrt()) / SD


def psnr(images: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, the mean over pictures."""
    return float((-10 * (images - truth).square().flatten(1).mean(1).log10()).mean())


@torch.no_grad()
def main() -> None:
    """Sample, measure, and write the sheet and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/inverse.png"))
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    flow = steer.load("emoji")
    rows, figures = [], {}
    for k, prompt in enumerate(PROMPTS):
        one = steer.sample(flow, lambda x: x.mean((1, 2, 3)), [prompt], 1, 1, "none", seed=100 + k)
        assert one.images is not None
        truth = one.images[0, 0].clamp(0, 1)
        found = problems(truth, torch.Generator().manual_seed(k))
        for name, (reward, shown) in found.items():
            run = {"particles": given.particles, "seed": given.seed}
            made = steer.sample(
                flow, reward, [prompt], method="noise-smc", temperature=1.0, steps=given.steps,
                **run,
            )  # fmt: skip
            assert made.images is not None
            weights = made.log_w[0].softmax(0)
            chosen = weights.multinomial(
                3, replacement=True, generator=torch.Generator().manual_seed(0)
            )
            mean = (weights[:, None, None, None] * made.images[0].clamp(0, 1)).sum(0)
            count = round(given.particles * made.nfe)
            other = steer.sample(flow, reward, [prompt], count, 1, "best-of-n", seed=given.seed)
            assert other.images is not None
            best = other.images[0, other.best[0]].clamp(0, 1)
            figures[f"{prompt}, {name}"] = {
                "misfit": misfit(reward, made.images[0][chosen].clamp(0, 1)),
                "psnr_of_mean": psnr(mean[None], truth),
                "misfit_best_of_n": misfit(reward, best[None]),
                "psnr_best_of_n": psnr(best[None], truth),
                "ess": float(made.ess[0]),
                "network_calls": given.particles * made.nfe,
            }
            print(prompt, name, figures[f"{prompt}, {name}"], flush=True)
            draws = [made.images[0][i] for i in chosen]
            captions = ["the truth", "measured", "a draw", "a draw", "a draw", "their mean"]
            images = [truth, shown, *draws, mean, best]
            rows.append((f"{prompt}, {name}", images, [*captions, f"best of {count}"]))
    save_picture(captioned_grid(rows), given.out)
    text = json.dumps(figures, indent=1)
    write_atomically(given.out.with_suffix(".json"), text.encode())


if __name__ == "__main__":
    main()
