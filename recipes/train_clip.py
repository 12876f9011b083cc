"""Train the small CLIP of the reward `clip`, on open_clip's own classes.

python -m recipes.train_clip --config recipes/configs/train_clip.yaml
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["train_clip"]


def train_clip(
    out: Path = Path("runs/clip"),
    vision_width: int = 128,
    vision_layers: int = 4,
    patch_size: int = 4,
    text_width: int = 96,
    text_layers: int = 2,
    embed_dim: int = 128,
    batch_size: int = 64,
    steps: int = 500,
    rate: float = 2e-3,
    seed: int = 1,
    save_every: int = 100,
) -> None:
    """Train a small open_clip model on the emoji captions, held-out pairs left out.

    Pictures are augmented with random crops, rotations, flips, colour jitter, blur and noise;
    otherwise the gradient would be adversarial noise. An interrupted run resumes from its last
    checkpoint. The finished model is a folder that `rewards.load("clip:model=OUT")` reads, as it
    reads any open_clip checkpoint.

    Args:
        out: the run's folder.
        vision_width: of the vision transformer.
        vision_layers: of the vision transformer.
        patch_size: in pixels of 32.
        text_width: of the text transformer.
        text_layers: of the text transformer.
        embed_dim: of the joint space.
        batch_size: pairs a step.
        steps: optimizer steps of the run.
        rate: learning rate.
        seed: seed of all random numbers.
        save_every: steps between checkpoints.
    """
    import open_clip
    import safetensors.torch
    from open_clip.tokenizer import SimpleTokenizer

    from recipes.contrastive import ContrastiveTraining, Pairs, augment, retrieval
    from recipes.data.emoji import load
    from recipes.train import fit
    from rewards.models.clip import Clip
    from steer.files import write_atomically

    config: dict[str, Any] = {
        "embed_dim": embed_dim,
        "vision_cfg": {
            "image_size": 32,
            "layers": vision_layers,
            "width": vision_width,
            "head_width": 32,
            "patch_size": patch_size,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": text_width,
            "heads": text_width // 32,
            "layers": text_layers,
        },
    }
    emoji = load()
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**config)
    tokenizer = SimpleTokenizer(context_length=16)
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def change(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return augment(images, generator, crop=0.12, noise=0.25, colour=0.1, blur=0.3)

    module = ContrastiveTraining(
        model,
        lambda x: model.encode_image((x - mean[0]) / std[0], normalize=True),
        lambda texts: model.encode_text(
            tokenizer(list(texts)).to(model.logit_scale.device), normalize=True
        ),
        model.logit_scale,
        Pairs(emoji, emoji.train, batch_size, seed, change),
        steps=steps,
        rate=rate,
    )
    fit(module, out, save_every)
    if module.global_step < steps:
        return
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "squash"}
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    state = {k: v for k, v in state.items() if k != "attn_mask"}
    write_atomically(out / "open_clip_model.safetensors", safetensors.torch.save(state))
    text = json.dumps(described, indent=2)
    write_atomically(out / "open_clip_config.json", text.encode())
    clip = Clip(os.fspath(out))

    def similarity(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return clip.image_features(images) @ clip.text_features(prompts).T

    figures = {}
    for name, index in (("train", emoji.train), ("held_out", emoji.held)):
        labels = [emoji.labels[i] for i in index]
        figures[f"retrieval_1_of_100_{name}"] = retrieval(
            similarity, emoji.images[index], labels, emoji.labels
        )
    figures |= _gradient(clip, emoji)
    write_atomically(out / "metrics.json", json.dumps(figures, indent=2).encode())
    print(figures)


def _gradient(clip: Any, emoji: Any, n: int = 128, noise: float = 0.2) -> dict[str, float]:
    """Ascend the reward from noisy real pictures, and score the results by the held-out judge."""
    from recipes.contrastive import ascend
    from rewards.judge import EMBEDDED, Judge

    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(emoji), generator=generator)[:n]
    images, labels = emoji.images[rows], [emoji.labels[i] for i in rows]
    noisy = images + noise * torch.randn(images.shape, generator=generator)
    views = {"clean": images, "noisy": noisy.clamp(0, 1)}
    views["climbed"] = ascend(clip, views["noisy"], labels)
    scorers = {"clip": clip} | ({"judge": Judge()} if EMBEDDED.exists() else {})
    with torch.no_grad():
        return {
            f"{who}_{name}": float(scorer(x, labels).mean())
            for who, scorer in scorers.items()
            for name, x in views.items()
        }


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(train_clip, as_positional=False)
