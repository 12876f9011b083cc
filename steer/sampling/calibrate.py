"""What is learnt of a reward before a run: from one-jump samples of its prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.flow import FlowMap, flat_prompts
from steer.noise import Noise, noise_dtype
from steer.reward import Reward, learners, name_of, score

__all__ = ["learn", "one_jump_scores"]


@torch.no_grad()
def one_jump_scores(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None,
    asked: Sequence[str] | None = None,
    seed: int = 0,
    most: int = 16,
) -> Tensor:
    """Score one-jump samples: 8 of each of at most `most` prompts, or 128 without prompts.

    Returns:
        The scores (p, n), in float64.
    """
    chosen = None if prompts is None else list(prompts)[:most]
    n = 128 if chosen is None else 8
    noise = Noise(seed, range(len(chosen or [""])), n, step="spread", dtype=noise_dtype(flow))
    x = noise.normal(flow.event_shape)
    some = next(iter(flow.parameters()), None)
    bound = flow if chosen is None else flow.given(chosen)
    y = bound.lookahead(x if some is None else x.to(some.device), 0.0)
    questions = asked if asked is not None else chosen
    texts = None if questions is None else flat_prompts(list(questions)[:most], len(y))
    return score(reward, flow.decode(y), texts).double().reshape(-1, n)


def learn(
    flow: FlowMap,
    reward: Reward,
    prompts: Sequence[str] | None = None,
    asked: Sequence[str] | None = None,
    seed: int = 0,
) -> int:
    """Let the parts of a reward that learn a scale learn it, where they have none yet.

    They see one-jump samples, and are left in evaluation mode: the reward then stands still.

    Args:
        flow: what draws the samples, no prompts bound.
        reward: the reward; see `steer.reward.learners`.
        prompts: what is drawn; None for a flow without prompts.
        asked: what the reward is asked for each, where that differs.
        seed: keys the noise.

    Returns:
        How many samples were drawn: 0 where there was nothing to learn.

    Raises:
        ValueError: the scores have no spread, so there is no scale.
        FloatingPointError: a score is not finite.
    """
    parts = learners(reward)
    for part in parts:
        part.forget()
        part.training = False  # not its children: what they are is not ours to say
    new = [part for part in parts if not part.learned]
    if not new:
        return 0
    count = 0
    # from the inside out: an outer scale is learnt of scores that the inner ones have normalised
    for part in reversed(new):
        part.training = True
        scores = one_jump_scores(flow, reward, prompts, asked, seed)
        bad = scores[~torch.isfinite(scores)]
        if len(bad):
            raise FloatingPointError(
                f"the reward is {float(bad[0])} for a one-jump sample: "
                "a reward must be finite for every picture; guard its logarithms and divisions"
            )
        count += scores.numel()
        part.update()
        part.training = False
        if not float(part.std) > 1e-4 * (1e-3 + abs(float(part.mean))):
            part.statistics = torch.zeros_like(part.statistics)
            raise ValueError(
                f"{name_of(part)!r} learns the scale of a reward that is the same for all "
                f"one-jump samples, {float(scores[0, 0]):g} for one: leave it out"
            )
    return count
