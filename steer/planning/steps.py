"""The memory of a step: it is run once on tensors without values, counting live bytes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steer.flow import FlowMap, flat_prompts
from steer.guidance.potential import Lookahead, Naive
from steer.noise import Draws, noise_dtype
from steer.objectives.batch import Batch, Objective
from steer.planning.live import Live, fused, saved_bytes
from steer.planning.subject import Subject
from steer.reward import Reward, score

__all__ = [
    "Depth", "Need", "adapted", "guided_step", "longest", "need", "saved_of", "training_step",
    "tuning_need", "tuning_step",
]  # fmt: skip

T = 0.4
"""The time of the planned step: any time between 0 and 1 gives the same result."""


@dataclass(frozen=True)
class Depth:
    """How much of a step is in an autograd graph.

    Attributes:
        jumps: network calls within one graph; 0: the network is called without a gradient.
        decoder: whether the gradient passes through decoder and reward.
    """

    jumps: int = 1
    decoder: bool = True


@dataclass(frozen=True)
class Need:
    """Peak memory of a step in bytes, as a linear function of the rows per call.

    Attributes:
        base: bytes that do not depend on rows: weights, adapters, their gradients and states.
        row: bytes for each row of a call.
    """

    base: int
    row: int

    def at(self, rows: int) -> int:
        """Return the peak of a call with this many rows."""
        return self.base + rows * self.row

    def rows(self, free: float) -> int:
        """Return how many rows per call fit; 0: not even one."""
        return max(0, int((free - self.base) // max(1, self.row)))

    def more(self, constant: int) -> "Need":
        """Return the need with a constant added."""
        return replace(self, base=self.base + constant)


def need(peak: Callable[[int], int], first: int = 1) -> Need:
    """Return the line through the peaks of a call with `first` rows and of one with one more."""
    one, two = peak(first), peak(first + 1)
    row = max(0, two - one)
    return Need(one - first * row, row)


def guided_step(one: Subject, reward: Reward, rows: int, depth: Depth) -> int:
    """Return the peak of evaluating the reward of `rows` rows, with its gradient if there is one.

    Args:
        one: the model.
        reward: on pictures.
        rows: rows of the call.
        depth: what is in a graph.
    """
    flow, x = one.flow, one.start(rows)
    prompts = _prompt(reward)
    with Live().hold(flow, reward) as live, _on(one, live, x):
        if not depth.decoder:
            with torch.no_grad():
                _scored(flow, reward, flow.lookahead(x, T), prompts)
        elif depth.jumps:
            Lookahead(flow, reward, prompts, steps=depth.jumps).gradient(x, T)
        else:
            with torch.no_grad():
                clean = flow.lookahead(x, T)
            Naive(flow, reward, prompts).gradient(clean, T)
    return live.peak + one.beside


def _on(one: Subject, live: Live, x: Tensor) -> AbstractContextManager[None]:
    """Count the rows and the conditions, and use the device's kernels."""
    live.note(x)
    for bound in getattr(one.flow, "_conditions", None) or ():
        for leaf in _tensors([bound.prompt, bound.negative]):
            live.note(leaf)
    return fused(one.cuda)


def _tensors(tree: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _prompt(reward: Reward) -> list[str] | None:
    return [""] if "prompts" in reward.takes else None


def _scored(flow: FlowMap, reward: Reward, x: Tensor, prompts: Sequence[str] | None) -> Tensor:
    texts = None if prompts is None else flat_prompts(prompts, len(x))
    return score(reward, flow.decode(x), texts)


def saved_of(one: Subject, reward: Reward) -> dict[str, int]:
    """Return the bytes that one row's call keeps for its backward: network, decoder, reward.

    The gradient is with respect to the input, weights are frozen; parameters are not counted.
    """
    flow = one.flow
    own = [*flow.parameters(), *flow.buffers(), *reward.parameters(), *reward.buffers()]

    def fresh() -> Tensor:
        return one.start(1).requires_grad_()

    with fused(one.cuda):
        found = {"denoiser": saved_bytes(lambda: flow.lookahead(fresh(), T), own)}
        found["decoder"] = saved_bytes(lambda: flow.decode(fresh()), own)
        if reward.differentiable:
            with torch.no_grad():
                images = flow.decode(one.start(1))
            found["reward"] = saved_bytes(
                lambda: score(reward, images.requires_grad_(), _prompt(reward)), own
            )
    return found


# ------------------------------------------------------------------ tuning and training


class _Unchecked(Batch):
    """A batch whose rewards have no values and are not checked."""

    def score(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            return _scored(self.student, self.reward, x, self.asked).float() / self.temperature


def tuning_step(one: Subject, tuned: Any, reward: Reward, objective: Objective, rows: int) -> int:
    """Return the peak of an optimizer step of reward tuning, `rows` rows a call.

    It contains the adapters and their running average in float32, gradients and AdamW's two
    moments.

    Args:
        one: the model.
        tuned: the same with adapters, see `adapted`.
        reward: on pictures.
        objective: the objective; see `longest`.
        rows: rows of the call.
    """
    parameters = list(tuned.adapters().values())
    for p in parameters:
        p.requires_grad_(True)
    draws = Draws(0, 0, (0, rows), dtype=noise_dtype(one.flow))
    prompts = [""] * rows if _prompt(reward) else None
    batch = _Unchecked(
        tuned, tuned.base, tuned.at(1.0, "average"), reward, 1.0, draws, prompts, prompts,
        tuned.base,
    )  # fmt: skip
    with Live().hold(tuned, reward) as live, _on(one, live, one.start(1)), torch.enable_grad():
        with _mixed(one):
            loss = objective(batch)["loss"]
        loss.backward()
        held = live.now
    for p in parameters:
        p.grad = None
    adapter = sum(p.numel() * p.element_size() for p in parameters)
    update = held + (3 if one.cuda else 2) * adapter  # on CUDA AdamW uses lists of tensors
    return max(live.peak + 2 * adapter, update) + one.beside


def longest(objective: Objective) -> int:
    """Return the largest number of jumps in one graph that an objective may use."""
    jumps: list[int] = getattr(objective, "jumps", None) or [1]
    return max(jumps)


def tuning_need(
    one: Subject,
    reward: Reward,
    objective: Objective,
    adapters: Mapping[str, Any],
    checkpointing: bool = False,
) -> Need:
    """Return the need of a tuning step: it is linear in the rows, and in the jumps of a graph.

    Args:
        one: the model.
        reward: on pictures.
        objective: tuning objective; its longest rollout counts.
        adapters: rank, alpha and targets of the adapters.
        checkpointing: setting of the tuning run.
    """
    most, tuned = longest(objective), adapted(one, adapters)
    tuned.checkpoint = checkpointing

    def peak(rows: int, jumps: int) -> int:
        if hasattr(objective, "jumps"):
            objective.jumps = [jumps]  # type: ignore[assignment]
        return tuning_step(one, tuned, reward, objective, rows)

    if most == 1:
        return need(lambda rows: peak(rows, 1))
    one_row, two_rows, two_jumps = peak(1, 1), peak(2, 1), peak(1, 2)
    row, jump = two_rows - one_row, two_jumps - one_row
    return Need(one_row - row, row + (most - 1) * jump)


def adapted(one: Subject, adapters: Mapping[str, Any]) -> Any:
    """Put adapters without values on the flow, and their running average."""
    from steer.adapters.inject import adapt

    tuned = adapt(one.flow, **adapters)
    for module in tuned.flow.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if type(p) is torch.nn.Parameter:  # the adapters, which have values
                module._parameters[name] = torch.nn.Parameter(one.mode.from_tensor(p.data), False)
    tuned.add("average")
    return tuned


def _mixed(one: Subject) -> AbstractContextManager[Any]:
    """Return the precision of a tuning run: mixed precision for weights in half precision."""
    if one.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast("cpu", one.dtype)


def training_step(one: Subject, rows: int) -> int:
    """Return the peak of a step that trains all weights of the denoiser by regression.

    It contains weights, gradients, AdamW's two moments and the running average in float32, and the
    graph of one call of the map.
    """
    flow, network = one.flow, one.flow.denoiser
    asked = list(network.parameters())
    x = one.start(rows)
    try:
        for p in asked:
            p.requires_grad_(True)
        with Live().hold(flow) as live, _on(one, live, x), torch.enable_grad():
            loss = (flow.jump(x, T, 0.9) - x).square().mean()
            loss.backward()
    finally:
        for p in asked:
            p.requires_grad_(False)
            p.grad = None
    numbers = sum(p.numel() for p in asked)
    held = sum(p.numel() * p.element_size() for p in asked)
    return live.peak + 5 * 4 * numbers - 2 * held + one.beside
