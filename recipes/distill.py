"""`steer distill`: make a flow map of a velocity model, with adapters and a second time."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from recipes.distill_data import data_of
from recipes.fitting import begun_alike, divided, fit, place_of
from recipes.inputs import Dtype, load_model, model_name
from recipes.terminal import say
from steer.files import expanded, tidy
from steer.flow import FlowMap
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
    strategy: Literal["ddp", "fsdp"] = "ddp",
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
        device: device of the run: cuda, cpu, or one device such as cuda:1. Default: what Lightning
            chooses.
        dtype: precision of its weights; adapters are in float32.
        precision: precision of Lightning.
        devices: number of processes, one per device; they divide every batch.
        strategy: ddp, where each process holds the model; or fsdp, where its weights are sharded
            over the processes and a block is gathered when it is called. Derivatives are then
            central differences.
        model_options: options of `steer.load`.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown rule, a model without a known embedding of the time, a rule that
            must not follow the requested velocity, a folder of other settings; a batch that does
            not divide by the processes; with fsdp, a model that cannot be sharded, or forward
            derivatives.
    """
    settings = {
        k: os.fspath(v) if isinstance(v, Path) else v
        for k, v in locals().items()
        if k not in ("out", "device", "precision", "save_every", "strategy")
    }
    divided(batch_size, devices)
    settings["model"] = model_name(model)
    from steer.adapters.fingerprint import fingerprint
    from steer.adapters.inject import adapt
    from steer.adapters.store import BESIDE, WEIGHTS, save_adapters
    from steer.models.second_timed import fresh_second_time, with_second_time
    from steer.training.adapting import AdapterTraining
    from steer.training.rules import MapObjective, build
    from steer.tuning.sharding import ShardedBase, refuse_unshardable

    out = expanded(out)
    if (out / WEIGHTS).is_file():
        begun_alike(out, settings, WEIGHTS)
        say(f"{out} is finished: steer.load({model!r}, lora={os.fspath(out)!r})")
        return out
    taught = build(rule, options)
    sharded, place = strategy == "fsdp", place_of(device, devices)
    at_first = "cpu" if sharded and isinstance(model, str) else None if sharded else str(place)
    loaded = load_model(model, at_first, dtype, options=model_options)
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
        pictures = data_of(
            data, model, out, size=batch_size, seed=seed, empty=0.12 if guidance != 1 else 0.0,
            prompts=prompts, own_steps=own_steps, name=model_name(model),
        )  # fmt: skip
        if sharded:
            refuse_unshardable(tuned)
            derivative = _by_difference(derivative)
            _encode_now(tuned, pictures.captions)
        objective = MapObjective(
            taught, _teacher(tuned), guidance, pairs=pairs, weight=weight, diagonal=diagonal,
            distance=distance, derivative=derivative,
        )  # fmt: skip
        training = AdapterTraining(
            tuned, term, objective, lambda: pictures.on(_teacher(tuned)), steps=steps, seed=seed,
            rate=learning_rate, average=average,
        )  # fmt: skip
        spread = ShardedBase() if sharded else None
        fit(training, out, save_every, precision, devices=devices, strategy=spread, place=place)
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
    """Return a pipeline's velocity, without its second time and without guidance."""
    without: Any = getattr(flow, "with_second_time", None)
    return flow if without is None else without(None)


def _teacher(tuned: Any) -> Any:
    """Return the model itself, sharing the tensors of the trained flow."""
    without: Any = getattr(tuned.flow, "with_second_time", None)
    return tuned.at(0.0) if without is None else tuned.at(0.0).around(without(None))


def _by_difference(derivative: str) -> Any:
    """Return the way in which a sharded network is differentiated along the flow.

    Raises:
        ValueError: forward derivatives are requested.
    """
    if derivative == "jvp":
        raise ValueError(
            "derivative='jvp': the gathering of a sharded network's weights has no forward-mode "
            "derivatives: use difference, or strategy ddp"
        )
    return "difference"


def _encode_now(tuned: Any, captions: list[str] | None) -> None:
    """Encode all texts of the run now, while the text encoders are on the pipeline's device.

    Raises:
        ValueError: the texts are not known before the run.
    """
    if not tuned.flow.component:
        return
    if captions is None:
        raise ValueError(
            "data 'emoji' has captions that are made as they are drawn, and with strategy fsdp "
            "they are encoded before the run: give a folder of pictures, or samples"
        )
    tuned.given(list(dict.fromkeys(["", *captions])))
