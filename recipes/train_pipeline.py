"""Train a small Stable Diffusion pipeline on the emoji: autoencoder, velocity, flow map.

    python -m recipes.train_pipeline --config recipes/configs/train_emoji_diffusers.yaml

The result is an ordinary diffusers folder, OUT/pipeline, with the second time beside it: for
`steer.load`, and for diffusers' own `from_pretrained`. An interrupted run resumes when the same
command is given again.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import safetensors.torch
import torch
from torch import Tensor

from recipes.data.emoji import load
from recipes.data.recolour import NAMED
from recipes.emoji_pipeline import PipelineTraining, autoencoder, tokenizer, untrained
from recipes.fitting import begun_alike, fit, module_of, sheet_of
from recipes.sources import source_of
from steer.files import expanded, pack, read_notes, tidy, write_atomically
from steer.lock import locked
from steer.training.data import Batches, Prefetched, generator_of
from steer.training.module import Rule
from steer.training.optim import warm_cosine
from steer.training.rules import FlowMatching, MapObjective, build

__all__ = ["train_pipeline"]

Stage = Literal["autoencoder", "velocity", "map"]


def train_pipeline(
    out: Path = Path("runs/emoji-diffusers"),
    stages: list[Stage] = ["autoencoder", "velocity", "map"],  # noqa: B006
    vae_channels: list[int] = [24, 48],  # noqa: B006
    latent: int = 4,
    channels: list[int] = [48, 96, 160],  # noqa: B006
    blocks: int = 1,
    text_width: int = 128,
    batch_size: int = 64,
    autoencoder_steps: int = 3000,
    velocity_steps: int = 3000,
    map_steps: int = 1000,
    autoencoder_rate: float = 2e-3,
    muon: float = 2e-3,
    adamw: float = 1e-3,
    average: float = 0.998,
    map_rate: float = 0.5,
    map_average: float = 0.99,
    guidance: float = 3.0,
    empty: float = 0.12,
    recoloured: float = 0.3,
    shift: int = 2,
    start: Path | None = None,
    seed: int = 0,
    save_every: int = 50,
    workers: int = 0,
    precision: str = "auto",
) -> None:
    """Train the autoencoder, then the velocity of its latents, then the map of that velocity.

    Args:
        out: the run's folder.
        stages: which to run; each takes what the one before left in the run's folder.
        vae_channels: of each level of the autoencoder, which halves the sides between them.
        latent: channels of the latent.
        channels: of each level of the UNet.
        blocks: residual blocks of each level, on the way down.
        text_width: of the text encoder.
        batch_size: pictures per step.
        autoencoder_steps: length of the first stage.
        velocity_steps: length of the second.
        map_steps: length of the third.
        autoencoder_rate: AdamW's learning rate in the first stage.
        muon: learning rate of the matrices in the others.
        adamw: learning rate of the other parameters there.
        average: decay of the running average of the weights.
        map_rate: both learning rates are scaled by this in the third stage.
        map_average: decay of the running average there.
        guidance: scale of classifier-free guidance that the map has built in; 1 for none.
        empty: fraction of empty prompts.
        recoloured: fraction of pictures that are recoloured, with the new colour in their caption.
        shift: largest random shift of a picture, in pixels.
        start: a run's folder whose velocity the second stage begins with. Default: from scratch.
        seed: seed of all random numbers.
        save_every: steps between checkpoints.
        workers: processes that draw batches ahead; 0: none, they are drawn when they are needed.
        precision: precision of Lightning; "auto" is bf16-mixed if the hardware has bf16, else
            32-true.
    """
    settings = {
        k: os.fspath(v) if isinstance(v, Path) else v
        for k, v in locals().items()
        if k not in ("out", "stages", "precision", "workers")
    }
    out = expanded(out)
    source = source_of("emoji", recoloured, shift)
    lengths = {
        "autoencoder": autoencoder_steps, "velocity": velocity_steps, "map": map_steps,
    }  # fmt: skip
    folders = {stage: out / stage for stage in lengths}
    tokens = tokenizer(caption_texts())

    def fresh() -> PipelineTraining:
        """Return the untrained flow on the trained autoencoder."""
        vae = autoencoder(vae_channels, latent)
        normalised(vae, *_load(vae, folders["autoencoder"]))
        return untrained(tokens, vae, channels=channels, blocks=blocks, text_width=text_width)

    with locked(out):
        tidy(out)
        begun_alike(out, settings)
        for stage in stages:
            folder, steps = folders[stage], lengths[stage]
            if (folder / WEIGHTS).exists():
                print(f"{folder} is finished")
                continue
            drawn = Batches(source.count, source.draw, batch_size, seed=seed, empty=empty)
            batches: Any = Prefetched(drawn, steps, workers) if workers else drawn
            torch.manual_seed(seed)
            if stage == "autoencoder":
                vae = autoencoder(vae_channels, latent)
                first = AutoencoderTraining(vae, batches, steps, autoencoder_rate, seed)
                fit(first, folder, save_every, "32-true")
                if first.global_step >= steps:
                    _save(vae, folder, latent_scale(vae, drawn))
                continue
            flow = fresh()
            rule: Rule = FlowMatching()
            if stage == "map":
                _load(flow, folders["velocity"])
                teacher = copy.deepcopy(flow)
                flow.encoder.requires_grad_(False)
                rule = MapObjective(build("heun"), teacher, guidance)
            elif start is not None:
                _load(flow, expanded(start) / "velocity")
            module = module_of(stage, flow, Encoded(rule), batches, settings)
            scale = guidance if stage == "velocity" else None
            sheet = sheet_of(folder / "sheets", source.sheet, scale)
            fit(module, folder, save_every, precision)
            if module.global_step >= steps:
                sheet(module.average, steps)
                _save(module.average, folder)
        if (folders["map"] / WEIGHTS).exists():
            flow = fresh()
            _load(flow, folders["map"])
            finished(flow, out / "pipeline")


WEIGHTS = "weights.safetensors"


def caption_texts() -> list[str]:
    """Return the words of all emoji captions, repeated by frequency."""
    emoji = load()
    tags = [tag for tags in emoji.tags for tag in tags]
    return [
        *emoji.labels, *emoji.styles, *emoji.groups, *emoji.subgroups, *tags,
        *sorted(NAMED) * 100,
    ]  # fmt: skip


def finished(flow: PipelineTraining, folder: Path) -> None:
    """Write the pipeline as diffusers does, in float16, and the second time beside it.

    Args:
        flow: the trained map.
        folder: the folder to write; an existing one is replaced when the new one is complete.
    """
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    flow.to(torch.float16).assembled().save_pretrained(fresh, safe_serialization=True)
    # transformers loads the configured dtype, diffusers float32: both should load float32
    config = fresh / "text_encoder" / "config.json"
    text = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**text, "dtype": "float32"}, indent=2), encoding="utf-8")
    flow.second_time.save(fresh, torch.float16)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
    print(f"{folder} is finished: steer.load({os.fspath(folder)!r})")


class Encoded:
    """A rule on latents for batches of pictures, which are encoded first.

    Args:
        rule: a rule of `steer.training.rules`.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __call__(
        self,
        flow: Any,
        average: Any,
        x_1: Tensor,
        prompts: Any,
        generator: torch.Generator,
        progress: float = 0.0,
    ) -> dict[str, Tensor]:
        """Return the rule's terms of pictures x_1 in [-1, 1]."""
        with torch.no_grad():
            latents = flow.encode((x_1 + 1) / 2)
        return self.rule(flow, average, latents, prompts, generator, progress)


class AutoencoderTraining(L.LightningModule):
    """Reconstruction in mean absolute and mean square error, with a little of the KL divergence.

    Args:
        vae: the autoencoder, trained in place.
        batches: step -> (pictures in [-1, 1], captions).
        steps: optimizer steps of the run.
        rate: learning rate of AdamW.
        seed: with the step, it fixes the latents' noise.
    """

    def __init__(
        self, vae: Any, batches: Callable[[int], Any], steps: int, rate: float, seed: int
    ) -> None:
        super().__init__()
        self.vae, self.batches = vae, batches
        self.steps, self.rate, self.seed = steps, rate, seed

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of the batch that belongs to the global step."""
        x = self.batches(self.global_step)[0].to(self.device)
        law = self.vae.encode(x).latent_dist
        generator = generator_of(self.seed, self.global_step, 3)
        noise = torch.randn(law.mean.shape, generator=generator).to(x)
        error = self.vae.decode(law.mean + law.std * noise).sample - x
        square = error.square().mean()
        kl = 0.5 * (law.mean.square() + law.var - 1 - law.logvar).mean()
        loss = square + 0.5 * error.abs().mean() + 5e-4 * kl
        terms = {"loss": loss, "square": square.detach(), "kl": kl.detach()}
        self.log_dict(terms, prog_bar=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with 50 steps of warm-up, then a cosine to zero."""
        optimizer = torch.optim.AdamW(
            self.vae.parameters(), self.rate, betas=(0.9, 0.99), weight_decay=1e-3
        )
        return {"optimizer": optimizer, "lr_scheduler": warm_cosine(optimizer, self.steps)}


@torch.no_grad()
def latent_scale(vae: Any, batches: Callable[[int], Any], count: int = 8) -> tuple[float, float]:
    """Return the mean and the inverse standard deviation of the entries of latents.

    Args:
        vae: the autoencoder.
        batches: step -> (pictures in [-1, 1], captions).
        count: number of batches.
    """
    device = next(vae.parameters()).device
    found = [vae.encode(batches(k)[0].to(device)).latent_dist.mean for k in range(count)]
    latents = torch.cat(found)
    return float(latents.mean()), float(1 / latents.std())


def normalised(vae: Any, shift: float, scale: float) -> None:
    """Store the shift and scale of the latents in an autoencoder's configuration."""
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    vae.eval().requires_grad_(False)


def _save(module: torch.nn.Module, folder: Path, scale: tuple[float, float] = (0.0, 1.0)) -> None:
    """Write a stage's weights in float16, atomically, which marks the stage as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        k: v.half() if v.is_floating_point() else v
        for k, v in module.state_dict().items()
        if not k.startswith("vae.")
    }
    write_atomically(folder / WEIGHTS, pack(half, {"scale": scale}))


def _load(module: torch.nn.Module, folder: Path) -> tuple[float, float]:
    """Read a stage's weights; return the latents' shift and scale that the first stage stored."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: run the stage {folder.name!r} first")
    state = safetensors.torch.load_file(file)
    shift, scale = read_notes(file)["scale"]
    own = {k: v for k, v in module.state_dict().items() if k.startswith("vae.")}
    module.load_state_dict({**own, **state})
    return shift, scale


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(train_pipeline, as_positional=False)
