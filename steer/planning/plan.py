"""`steer.plan`: what a guided, a tuning and a training step need, before anything is loaded."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from steer.adapters.units import split_bytes
from steer.objectives.table import build
from steer.objectives.table import name_of as objective_name
from steer.planning.levers import levers_of
from steer.planning.live import fake_mode
from steer.planning.report import MOST_ROWS, Lever, Plan
from steer.planning.rewards import planned_reward
from steer.planning.steps import (
    Depth,
    guided_step,
    need,
    saved_of,
    training_step,
    tuning_need,
)
from steer.planning.subject import Subject, subject
from steer.reward import Reward, name_of
from steer.sampling.forecast import counts
from steer.sampling.methods import AnyMethod, default_method, method_of

__all__ = ["plan"]


def plan(
    model: Any,
    reward: Reward | Callable[..., Tensor] | str | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    rows: int | None = None,
    particles: int = 4,
    steps: int = 16,
    method: AnyMethod | None = None,
    objective: Any = "direct",
    rank: int = 16,
    targets: list[str] | None = None,
    dtype: torch.dtype | None = None,
    cuda: bool = True,
    text_tokens: int | None = None,
    tuning: bool = True,
    training: bool = False,
    devices: int = 1,
    strategy: str = "auto",
    levers: bool | Literal["stack"] = True,
    method_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """Return what a run needs: weights, activations, peaks, calls. Nothing is loaded.

    The steps themselves are run on tensors that have shapes but no values, and the live bytes are
    counted. So a plan is exact for tensors (docs/hardware.md compares it with measurements). It
    does not include memory inside kernels, and fragmentation of the allocator.

    Args:
        model: a diffusers pipeline by its folder (its JSON files are enough), by an owner/name of
            the hub that is in the cache, or by the short name of a public one (`flux-dev`, `sdxl`,
            `flux3-klein` and others, see `steer.backends.sizes.PUBLIC`), or a live one; also any
            other model that `steer.load` takes, which is then loaded.
        reward: as for `steer.sample`, or a text; sizes of published rewards are known, and their
            weights are not fetched. Default: a reward without weights.
        height: height of the pictures. Default: the model's own.
        width: width of the pictures. Default: the model's own.
        rows: rows per call. Default: the number of particles, at most 64.
        particles: particles per prompt.
        steps: steps of a run, for the number of calls.
        method: sampling method. Default: that of `steer.sample`.
        objective: tuning objective, by name or as an object.
        rank: rank of the adapters.
        targets: layers with adapters. Default: the model's own choice.
        dtype: dtype of the weights. Default: bfloat16 for a pipeline on CUDA, else float32.
        cuda: whether the device is a CUDA device; the CPU has other kernels.
        text_tokens: number of text tokens of the denoiser. Default: the pipeline's own.
        tuning: whether to plan a tuning step as well.
        training: whether to plan a step that trains all weights as well.
        devices: number of processes of a tuning run.
        strategy: strategy of a tuning run; with fsdp the denoiser is sharded over the processes,
            and the plan is for each of them.
        levers: whether to try options that save memory; "stack": only those that are tried for
            cards.
        method_options: options of the method.
        **options: options of a pipeline, as for `steer.load`: cfg, guidance, checkpointing, call
            and so on.

    Raises:
        ValueError: a model of unknown sizes (the message has the nearest names), a size that it
            does not support, or an unknown method, objective or option.
    """
    mode = fake_mode()
    with _calm():
        judge = planned_reward(reward, mode)
    chosen = method_of(method or default_method(judge.differentiable))
    found = counts(chosen, steps, judge.differentiable,
                   **dict(method_options or {}))  # fmt: skip
    depth = Depth(
        math.ceil(found.backward / found.reward_gradient) if found.reward_gradient else 0,
        bool(found.reward_gradient),
    )
    count = rows or min(particles, MOST_ROWS)

    def made(**more: Any) -> Subject:
        given = {**options, **more}
        return subject(model, height, width, dtype, text_tokens, cuda, mode, **given)

    with _calm():
        one = made()
        guided = need(lambda n: guided_step(one, judge, n, depth))
        adapters = {"rank": rank, "targets": targets}
        rule = build(objective)
        saving = bool(options.get("checkpointing")) and not hasattr(one.flow, "pipe")
        tuned = (
            tuning_need(one, judge, rule, adapters, saving)
            if tuning and _tunes(judge, rule)
            else None
        )
        split = tuned is not None and strategy == "fsdp" and devices > 1
        if tuned is not None and split:
            whole, own = split_bytes(one.flow, devices)
            tuned = tuned.more(own - whole - one.beside)
        trained = need(lambda n: training_step(one, n)) if training else None
        tried: tuple[list[Lever], list[Lever]] = ([], [])
        if levers:
            tried = levers_of(
                made, lambda which, n: guided_step(which, judge, n, depth), guided,
                options, levers != "stack",
            )  # fmt: skip
        return Plan(
            one.name, one.source, one.size, str(one.dtype).removeprefix("torch."), cuda, count,
            chosen.name, objective_name(rule), "none" if reward is None else name_of(judge),
            one.parameters, {**one.weights, **_weights(judge)}, saved_of(one, judge),
            guided, tuned, trained, *tried,
            {"nfe": found.nfe * getattr(one.flow, "evaluations", 1),
             "reward_calls": found.reward},
            [*_notes(one, judge), *([_split_note(devices)] if split else [])],
        )  # fmt: skip


@contextmanager
def _calm() -> Iterator[None]:
    """Suppress warnings that are caused by running without values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tunes(reward: Reward, objective: Any) -> bool:
    """Return whether an objective can be planned: on one row, with the gradient that it needs."""
    return reward.differentiable or not objective.differentiable


def _weights(reward: Reward) -> dict[str, int]:
    size = sum(t.numel() * t.element_size() for t in [*reward.parameters(), *reward.buffers()])
    return {"reward": size} if size else {}


def _split_note(devices: int) -> str:
    return (
        f"the tuning step is that of each of {devices} processes: one part in {devices} of the "
        "denoiser, its two largest blocks whole, and no text encoders (fsdp)"
    )


def _notes(one: Subject, reward: Reward) -> list[str]:
    notes = ["computed on tensors without values, not measured"]
    unknown = getattr(reward, "unknown", None)
    if unknown:
        notes.append(f"the weights and activations of {', '.join(unknown)} are not counted")
    return notes
