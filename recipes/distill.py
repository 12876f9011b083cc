"""`steer distill`: a velocity model becomes a flow map, by adapters and a second time."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recipes.fitting import begun_alike, fit
from recipes.inputs import Dtype, load_model, model_name
from recipes.sources import source_of
from recipes.terminal import say
from steer.files import expanded, tidy
from steer.flow import FlowMap, device_of
from steer.lock import locked
from steer.training.processes import is_first

__all__ = ["distill"]


def distill(
    model: str = "emoji",
    rule: str = "lsd",
    rank: int = 64,
    out: Path = Path("runs/map"),
    data: str = "samples",
    options: dict[str, Any] = {},  # noqa: B006
    guidance: float | None = None,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    average: float = 0.99,
    alpha: float | None = None,
    targets: list[str] | None = None,
    module: str | None = None,
    pairs: str | None = None,
    weight: str | None = None,
    diagonal: float | None = None,
    distance: Literal["square", "huber"] = "square",
    derivative: Literal["auto", "jvp", "difference"] = "auto",
    own_steps: int = 16,
    prompts: list[str] | None = None,
    seed: int = 0,
    save_every: int = 50,
    device: str | None = None,
    dtype: Dtype | None = None,
    precision: str = "32-true",
    devices: int = 1,
    model_options: dict[str, Any] = {},  # noqa: B006
) -> Path:
    """Make a flow map of a pretrained velocity model: adapters, and a term for the jump's end.

    Before training every jump is one Euler step of the model, bit for bit. The folder holds the
    adapters with the term inside; `steer.load(MODEL, lora=OUT)` jumps from any time to any other,
    and plain diffusers reads the adapters as a LoRA of the velocity. An interrupted run resumes
    when the same command is given again.

    Args:
        model: a name that `steer models` lists, a folder, a hub id, or file.py:Name. Of a model
            that is already a map only the velocity is used.
        rule: training rule of the map, a name that `steer rules` lists. The teacher of a rule is
            the model itself, without adapters.
        rank: rank of the adapters.
        out: the run's folder.
        data: "emoji"; a folder of pictures, their captions in metadata.jsonl (file_name, text) or
            in text files of the same names; "samples": samples of the model itself, generated at
            the start.
        options: options of the rule; `velocity` is the velocity that it follows: conditional, own
            or teacher.
        guidance: scale of classifier-free guidance that is distilled into the map; 1 for a
            guidance-distilled model. Default: the scale of the pipeline, else 1.
        steps: optimizer steps of the run.
        batch_size: pictures per step.
        learning_rate: learning rate of AdamW.
        average: decay of the running average of the trained weights; the average is saved.
        alpha: the update is scaled by alpha / rank. Default: 2 rank.
        targets: names of layers, or the ends of names. Default: the model's own.
        module: the module of the denoiser that embeds the time. Default: known for the supported
            classes.
        pairs: distribution of the times (s, t). Default: the rule's own.
        weight: weighting of the errors: uniform, adaptive or learned. Default: the rule's own.
        diagonal: fraction of a batch with s = t. Default: the rule's own.
        distance: loss of an error: square or huber.
        derivative: how the network is differentiated along the flow: jvp, difference or auto.
        own_steps: steps of the model's sampler, for data "samples".
        prompts: for data "samples". Default: the model's own, else the empty one.
        seed: seed of all random numbers.
        save_every: steps between checkpoints.
        device: device on which the model is loaded.
        dtype: precision of its weights; adapters are in float32.
        precision: precision of Lightning.
        devices: number of processes, one per device.
        model_options: options of `steer.load`.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown rule, a model without a known embedding of the time, a rule that
            must not follow the velocity that was asked for, a folder of other settings.
    """
    settings = {
        k: os.fspath(v) if isinstance(v, Path) else v
        for k, v in locals().items()
        if k not in ("out", "device", "precision", "save_every")
    }
    settings["model"] = model_name(model)
    from steer.adapters.fingerprint import fingerprint
    from steer.adapters.inject import adapt
    from steer.adapters.store import BESIDE, WEIGHTS, save_adapters
    from steer.models.second_timed import fresh_second_time, with_second_time
    from steer.training.adapting import AdapterTraining
    from steer.training.rules import MapObjective, build

    out = expanded(out)
    if (out / WEIGHTS).is_file():
        begun_alike(out, settings, WEIGHTS)
        say(f"{out} is finished: steer.load({model!r}, lora={os.fspath(out)!r})")
        return out
    taught = build(rule, options)
    loaded = load_model(model, device, dtype, options=model_options)
    mixed = getattr(loaded, "cfg", None)
    guidance = (1.0 if mixed is None else mixed) if guidance is None else guidance
    base = velocity_of(loaded)
    torch.manual_seed(seed)
    term = fresh_second_time(base, module)
    timed = with_second_time(base, term)
    timed.name = base.name
    tuned = adapt(timed, rank, alpha, targets=targets, seed=seed)
    tuned.requires_grad_(False)
    first = is_first()
    with locked(out) if first else nullcontext():
        if first:
            tidy(out)
            begun_alike(out, settings, "*.ckpt", WEIGHTS)
        batches = _batches(base, model, data, batch_size, seed, guidance, prompts, own_steps, out)
        objective = MapObjective(
            taught, _teacher(tuned), guidance, pairs=pairs, weight=weight, diagonal=diagonal,
            distance=distance, derivative=derivative,
        )  # fmt: skip
        training = AdapterTraining(
            tuned, term, objective, batches, steps=steps, seed=seed, rate=learning_rate,
            average=average,
        )  # fmt: skip
        fit(training, out, save_every, precision, devices=devices)
        if training.global_step >= steps and first:
            with training.averaged() as found:
                notes = {
                    "base": model_name(model), "base_sha256": fingerprint(base),
                    "second_time": term.config, "rule": rule, "guidance": guidance,
                }  # fmt: skip
                inside = {f"{BESIDE}{k}": v for k, v in term.state_dict().items()}
                save_adapters(found, out, notes, inside)
            say(f"next: steer sample --model {model} --lora {out} --method none --steps 4")
    return out


def velocity_of(flow: FlowMap) -> FlowMap:
    """Return a pipeline's velocity: without a second time that it has, and without guidance."""
    without: Any = getattr(flow, "with_second_time", None)
    return flow if without is None else without(None)


def _teacher(tuned: Any) -> Any:
    """Return the model itself, on the tensors of the flow that is trained."""
    without: Any = getattr(tuned.flow, "with_second_time", None)
    return tuned.at(0.0) if without is None else tuned.at(0.0).around(without(None))


def _batches(
    base: FlowMap, model: str, data: str, size: int, seed: int, guidance: float,
    prompts: list[str] | None, own_steps: int, out: Path,
) -> Callable[[int], tuple[Tensor, list[str]]]:  # fmt: skip
    """Return step -> (x_1, prompts): latents of the data's pictures."""
    from steer.training.data import Batches

    empty = 0.12 if guidance != 1 else 0.0
    if data == "samples":
        x, captions = _samples(base, model, prompts, own_steps, out, seed)
        return Batches(len(x), lambda i, g: (x[i], captions[i]), size, seed=seed, empty=empty)
    if data == "emoji":
        source = source_of("emoji")
        count, draw = source.count, source.draw
    else:
        count, draw = _folder(Path(data), base)
    pictures = Batches(count, draw, size, seed=seed, empty=empty)

    @torch.no_grad()
    def encoded(step: int) -> tuple[Tensor, list[str]]:
        x, captions = pictures(step)
        return base.encode(((x + 1) / 2).to(device_of(base))), captions

    return encoded


@torch.no_grad()
def _samples(
    base: FlowMap, model: str, prompts: list[str] | None, steps: int, out: Path, seed: int
) -> tuple[Tensor, list[str]]:
    """Return the model's own samples, drawn once and kept in the run's folder."""
    import safetensors.torch

    from recipes.defaults import own
    from steer.files import pack, read_notes, write_atomically

    listed = own(model).tuned
    told = prompts or ([""] if listed is None else Path(listed).read_text().splitlines())
    told = [p.strip() for p in told if p.strip()] or [""]
    told = (told * (256 // len(told) + 1))[:256]
    file = out / "samples.safetensors"
    notes = {"prompts": told, "model": model_name(model), "steps": steps, "seed": seed}
    if file.is_file() and read_notes(file) == notes:
        return safetensors.torch.load_file(file)["x"], told
    found = []
    generator = torch.Generator().manual_seed(seed)
    for k in range(0, len(told), 16):
        few = told[k : k + 16]
        x = torch.randn(len(few), *base.event_shape, generator=generator).to(device_of(base))
        found.append(_euler(base.given(few), x, steps).cpu())
    x = torch.cat(found)
    write_atomically(file, pack({"x": x}, notes))
    return x, told


def _euler(flow: FlowMap, x: Tensor, steps: int) -> Tensor:
    times = flow.times(steps)
    for s, t in pairwise(times):
        x = x + (t - s) * flow.velocity(x, s)
    return x


def _folder(folder: Path, base: FlowMap) -> tuple[int, Callable[..., tuple[Tensor, str]]]:
    """Return how many captioned pictures a folder has, and how one is read, in [-1, 1]."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.functional import center_crop, resize

    table = folder / "metadata.jsonl"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder of pictures at {folder}: data is emoji, samples, or a folder of pictures"
        )
    if table.is_file():
        rows = [json.loads(line) for line in table.read_text().splitlines() if line.strip()]
        pairs = [(folder / r["file_name"], str(r["text"])) for r in rows]
    else:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
        pairs = [(p, _beside(p)) for p in files]
    if not pairs:
        raise ValueError(f"{folder} contains no pictures ({', '.join(sorted(PICTURES))})")
    height, width = base.decode(torch.zeros(1, *base.event_shape).to(device_of(base))).shape[-2:]

    def draw(i: int, generator: torch.Generator) -> tuple[Tensor, str]:
        image = decode_image(os.fspath(pairs[i][0]), ImageReadMode.RGB).float() / 255
        scale = max(height / image.shape[1], width / image.shape[2])
        sides = [round(image.shape[1] * scale), round(image.shape[2] * scale)]
        image = center_crop(resize(image, sides, antialias=True), [height, width])
        return 2 * image - 1, pairs[i][1]

    return len(pairs), draw


PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def _beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else ""
