"""Train the held-out judge.

python -m recipes.train_judge --config recipes/configs/train_judge.yaml
"""

import json
from pathlib import Path

import torch

__all__ = ["train_judge"]


def train_judge(
    out: Path = Path("runs/judge"),
    channels: list[int] = [32, 64, 128, 192],  # noqa: B006
    blocks: list[int] = [1, 1, 2, 1],  # noqa: B006
    batch_size: int = 64,
    steps: int = 800,
    rate: float = 2e-3,
    seed: int = 77,
    save_every: int = 100,
) -> None:
    """Train the judge on all pairs, including the held-out ones, with strong augmentation.

    Args:
        out: the run's folder; `rewards.judge.Judge(out)` reads it when it is finished.
        channels: of each level of the network.
        blocks: residual blocks of each level.
        batch_size: pairs a step.
        steps: optimizer steps of the run.
        rate: learning rate.
        seed: seed of all random numbers.
        save_every: steps between checkpoints.
    """
    import safetensors.torch

    from recipes.contrastive import ContrastiveTraining, Pairs, augment, retrieval
    from recipes.data.emoji import load
    from recipes.train import fit
    from rewards.judge import Judge, JudgeNetwork
    from steer.files import write_atomically

    emoji = load()
    torch.manual_seed(seed)
    network = JudgeNetwork(channels, blocks)

    def change(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return augment(images, generator, crop=0.12, noise=0.3, colour=0.15, erase=0.2, blur=0.3)

    module = ContrastiveTraining(
        network,
        network.encode_image,
        network.encode_text,
        network.log_scale,
        Pairs(emoji, torch.arange(len(emoji)), batch_size, seed, change),
        steps=steps,
        rate=rate,
    )
    fit(module, out, save_every)
    if module.global_step < steps:
        return
    state = {k: v.half().contiguous() for k, v in network.state_dict().items()}
    write_atomically(out / "model.safetensors", safetensors.torch.save(state))
    write_atomically(out / "config.json", json.dumps(network.settings).encode())
    judge = Judge(out)
    labels = emoji.labels
    noisy = augment(
        emoji.images, torch.Generator().manual_seed(9), crop=0.15, noise=0.3, colour=0.2, blur=0.3
    )
    figures = {
        "retrieval_1_of_100_real": retrieval(judge.similarity, emoji.images, labels, labels),
        "retrieval_1_of_100_augmented": retrieval(judge.similarity, noisy, labels, labels),
    }
    write_atomically(out / "metrics.json", json.dumps(figures, indent=2).encode())
    print(figures)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(train_judge, as_positional=False)
