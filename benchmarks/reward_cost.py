"""Cost of a reward relative to its bare network: a call, and a call with its gradient.

Bare: normalise, encode the pictures, multiply with known text features. Wrapped: the reward as
users call it. Both are interleaved in one process; the figure is the median of the ratios, with
the quartiles. Pictures have the network's size, so that neither resizes. Run it with the machine
otherwise idle:

    python -m benchmarks.reward_cost
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import rewards
from rewards.models.cosine import Cosine
from rewards.models.towers import OpenClip


def bare(backbone: OpenClip, texts: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the network's scores with nothing around them."""
    model, mean, std = backbone.model, backbone.preprocess.mean, backbone.preprocess.std

    def call(x: Tensor) -> Tensor:
        features = model.encode_image((x - mean) / std, normalize=True)  # type: ignore[operator]
        return (features * texts).sum(-1)

    return call


def seconds(call: Callable[[Tensor], Tensor], x: Tensor, gradient: bool) -> float:
    """Time one call."""
    start = time.perf_counter()
    if gradient:
        x = x.detach().requires_grad_()
        torch.autograd.grad(call(x).sum(), x)
    else:
        with torch.no_grad():
            call(x)
    return time.perf_counter() - start


def measure(reward: Cosine, rows: int, repeats: int, gradient: bool) -> tuple[float, float, float]:
    """Return the median of the ratios wrapped / bare, and their quartiles."""
    backbone = reward.backbone
    assert isinstance(backbone, OpenClip)
    x = torch.rand(rows, 3, *backbone.preprocess.size, generator=torch.Generator().manual_seed(0))
    prompts = ["a red apple"] * rows
    plain = bare(backbone, reward.text_features(prompts))
    assert torch.allclose(plain(x), reward(x, prompts), atol=1e-5)
    ratios = []
    for i in range(repeats + 3):
        pair = [lambda y: reward(y, prompts), plain]
        times = [seconds(call, x, gradient) for call in (pair if i % 2 else pair[::-1])]
        ratios.append(times[0] / times[1] if i % 2 else times[1] / times[0])
    low, middle, high = statistics.quantiles(ratios[3:], n=4)
    return middle, low, high


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=60)
    chosen = parser.parse_args()
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-32")
    large = Cosine(OpenClip(model, open_clip.get_tokenizer("ViT-B-32")))
    print("| network | pictures | call | call and gradient |")
    print("|---|---|---|---|")
    rows = [
        ("embedded, 32", rewards.load("clip"), 16, 1),
        ("embedded, 32", rewards.load("clip"), 64, 1),
    ]
    for name, reward, count, slower in [*rows, ("ViT-B-32, 224", large, 4, 4)]:
        cells = []
        for gradient in (False, True):
            middle, low, high = measure(reward, count, chosen.repeats // slower, gradient)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        print(f"| {name} | {count} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
