"""Train the classifier reward and the judge of the model `fashion`.

python -m recipes.train_fashion --folder /usr/share/datasets/fashion-mnist
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.contrastive import augment
from recipes.data.fashion import CLASSES, load
from recipes.fitting import fit
from rewards.judge import Judge, JudgeNetwork
from rewards.models.fashion import FashionNetwork
from steer.files import write_atomically
from steer.training.data import generator_of
from steer.training.optim import MuonAdamW, warm_cosine

__all__ = ["ClassTraining", "train_fashion"]


class ClassTraining(L.LightningModule):
    """Cross-entropy over the classes, on augmented pictures.

    Args:
        network: the network to train.
        logits: pictures (n, 3, 28, 28) in [0, 1] -> (n, classes).
        images: (n, 1, 28, 28) in [0, 1].
        classes: (n,).
        steps: optimizer steps of the run.
        rate: learning rate.
        seed: with the step, it fixes the batch.
        noise: largest standard deviation of the augmentation's noise.
        batch: pictures per step.
    """

    def __init__(
        self, network: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor,
        classes: Tensor, *, steps: int, rate: float, seed: int, noise: float, batch: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.logits, self.steps, self.rate = network, logits, steps, rate
        self.images, self.classes, self.seed = images, classes, seed
        self.noise, self.batch = noise, batch

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of the step's own batch."""
        generator = generator_of(self.seed, self.global_step)
        rows = torch.randint(len(self.images), (self.batch,), generator=generator)
        x = self.images[rows].expand(-1, 3, -1, -1)
        # their background is black, and that of the augmentation white
        x = 1 - augment(1 - x, generator, crop=0.08, noise=self.noise, colour=0.1, blur=0.3)
        return F.cross_entropy(self.logits(x.to(self.device)), self.classes[rows].to(self.device))

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        optimizer = MuonAdamW(self.network.parameters(), self.rate, self.rate / 2)
        return {"optimizer": optimizer, "lr_scheduler": warm_cosine(optimizer, self.steps)}


def train_fashion(
    out: Path = Path("runs/fashion-classes"),
    folder: Path | None = None,
    steps: int = 2000,
    rate: float = 2e-3,
    save_every: int = 200,
) -> None:
    """Train two different classifiers: the reward, and the held-out judge.

    Args:
        out: folder of the run, with `reward` and `judge`.
        folder: folder of the published files. Default: the 2,000 training pictures of the package.
        steps: length of each run.
        rate: learning rate.
        save_every: steps between checkpoints.
    """
    fashion = load(folder)
    images, classes = fashion.images[fashion.train], fashion.classes[fashion.train]
    torch.manual_seed(3)
    reward = FashionNetwork(len(CLASSES))
    judge = JudgeNetwork((24, 48, 96, 128), (1, 1, 1, 1), buckets=512, dim=64)

    def scores(x: Tensor) -> Tensor:
        x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        return judge.log_scale.exp() * judge.encode_image(x) @ judge.encode_text(CLASSES).T

    parts: list[tuple[str, nn.Module, Callable[[Tensor], Tensor], float]] = [
        ("reward", reward, reward, 0.1),
        ("judge", judge, scores, 0.3),
    ]
    found = {}
    for seed, (name, network, logits, noise) in enumerate(parts):
        module = ClassTraining(
            network, logits, images, classes, steps=steps, rate=rate, seed=seed, noise=noise
        )
        fit(module, out / name, save_every, "32-true")
        if module.global_step < steps:
            return
        network.eval()
        state = {k: v.half().contiguous() for k, v in network.state_dict().items()}
        settings = judge.settings if name == "judge" else {"names": list(CLASSES)}
        write_atomically(out / name / "model.safetensors", safetensors.torch.save(state))
        write_atomically(out / name / "config.json", json.dumps(settings).encode())
        test = fashion.images[fashion.test].expand(-1, 3, -1, -1)
        with torch.no_grad():
            picked = torch.cat([logits(x).argmax(1) for x in test.split(500)])
        found[name] = float((picked == fashion.classes[fashion.test]).float().mean())
        print(f"{name}: {found[name]:.3f} of the test pictures right")
    Judge(out / "judge")  # check that it loads
    write_atomically(out / "metrics.json", json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(train_fashion, as_positional=False)
