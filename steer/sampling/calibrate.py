"""Estimates of a reward before a run, from one-jump samples: its scale and its spread."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.batches import in_batches, join_rows
from steer.flow import FlowMap, device_of, flat_prompts
from steer.guidance.population import Rows
from steer.noise import Noise, noise_dtype
from steer.onto import onto
from steer.reward import Reward, learners, name_of, score

__all__ = ["learn", "one_jump_scores", "spread"]

ROWS = 64
"""Default number of rows per call."""


@torch.no_grad()
def one_jump_scores(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    asked: Sequence[str] | None = None,
    seed: int = 0,
    most: int = 16,
    batch_size: int = ROWS,
) -> Tensor:
    """Score one-jump samples: 8 of each of at most `most` prompts, or 128 without prompts.

    Args:
        flow: the flow that is sampled; no prompts bound.
        reward: the reward, on the flow's device.
        prompts: what is drawn; None for a flow without prompts.
        asked: the reward's prompt for each, if it differs.
        seed: keys the noise.
        most: maximum number of prompts that are sampled.
        batch_size: maximum number of rows per call.

    Returns:
        The scores (p, n), in float64.

    Raises:
        FloatingPointError: a score is not finite; names prompt and sample.
    """
    chosen = None if prompts is None else list(prompts)[:most]
    p, n = (1, 128) if chosen is None else (len(chosen), 8)
    noise = Noise(seed, range(p), n, step="spread", dtype=noise_dtype(flow))
    questions = chosen if asked is None else list(asked)[:most]
    group = max(1, batch_size // n)  # prompts per call
    parts: list[Tensor] = []
    x: Tensor | None = None
    for a in range(0, p, group):
        some = slice(a, min(a + group, p))
        bound = flow if chosen is None else flow.given(chosen[some])
        texts = None if questions is None else questions[some]

        def scores(x: Tensor, bound: FlowMap = bound, texts: list[str] | None = texts) -> Tensor:
            asked = None if texts is None else flat_prompts(texts, len(x))
            return score(reward, bound.decode(bound.lookahead(x, 0.0)), asked)

        if x is None:  # the shape of a state may be known only when prompts are bound
            x = onto(noise.normal(bound.event_shape), device_of(flow))
        rows = x[a * n : some.stop * n]
        parts.append(join_rows(in_batches(scores, rows, batch_size, some.stop - a), some.stop - a))
    found = torch.cat(parts).double()
    Rows((p, n), 0, questions).refuse_not_finite("reward", found, "a one-jump sample")
    return found.reshape(p, n)


def spread(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    asked: Sequence[str] | None = None,
    seed: int = 0,
    *,
    most: int = 16,
    batch_size: int = ROWS,
) -> float:
    """Return the reward's standard deviation over one-jump samples of the same prompt.

    Root mean square over at most `most` prompts, 8 samples each; 128 samples without prompts. The
    arguments are those of `one_jump_scores`.

    Raises:
        ValueError: the reward is the same for all samples.
        FloatingPointError: a score is not finite; names prompt and sample.
    """
    values = one_jump_scores(flow, reward, prompts, asked, seed, most, batch_size)
    deviation = float(values.var(1).mean().sqrt())
    if not deviation > 1e-8:
        raise ValueError(
            f"reward {name_of(reward)!r} is the same, {float(values[0, 0]):g}, for all one-jump "
            "samples of a prompt: no temperature can be computed from a standard deviation of "
            "zero, so give temperature, in the reward's units, or check the reward"
        )
    return deviation


def learn(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None = None,
    asked: Sequence[str] | None = None,
    seed: int = 0,
    *,
    batch_size: int = ROWS,
) -> int:
    """Estimate the scales of those parts of a reward that learn a scale and have none yet.

    They are estimated from one-jump samples. The parts are left in evaluation mode, so that the
    reward does not change afterwards.

    Args:
        flow: the flow that is sampled, no prompts bound.
        reward: the reward; see `steer.reward.learners`.
        prompts: what is drawn; None for a flow without prompts.
        asked: the reward's prompt for each, if it differs.
        seed: keys the noise.
        batch_size: maximum number of rows per call.

    Returns:
        Number of samples: 0 if there was nothing to estimate.

    Raises:
        ValueError: the scores have a standard deviation of zero, so there is no scale.
        FloatingPointError: a score is not finite.
    """
    parts = learners(reward)
    for part in parts:
        part.forget()
        part.training = False  # not its children, whose mode must not change
    new = [part for part in parts if not part.learned]
    if not new:
        return 0
    count = 0
    # from the inside out: an outer scale is estimated from scores that inner parts have normalised
    for part in reversed(new):
        part.training = True
        scores = one_jump_scores(flow, reward, prompts, asked, seed, batch_size=batch_size)
        count += scores.numel()
        part.update()
        part.training = False
        if not float(part.std) > 1e-4 * (1e-3 + abs(float(part.mean))):
            part.statistics = torch.zeros_like(part.statistics)
            raise ValueError(
                f"{name_of(part)!r} estimates the standard deviation of a reward that is the same "
                f"for all one-jump samples, {float(scores[0, 0]):g} for one: leave it out"
            )
    return count
