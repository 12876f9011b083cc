"""The temperature of a run, from the reward's standard deviation over one-jump samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.batches import Batched, in_slices
from steer.flow import FlowMap, flat_prompts, log_dtype
from steer.guidance.population import Rows
from steer.reward import Reward, score
from steer.sampling.request import Request

__all__ = ["temperatures"]


@torch.no_grad()
def temperatures(
    flow: FlowMap,
    reward: Reward,
    asked: Sequence[str] | None,
    probes: Tensor,
    request: Request,
    position: int,
) -> Tensor:
    """Return one temperature per prompt, theory (16), (p,).

    It is the standard deviation of the reward over one-jump samples, divided by the strength.

    Args:
        flow: bound to p prompts.
        reward: the reward.
        asked: the reward's prompts, one for each prompt.
        probes: starts of the samples, (p, n, *event).
        request: the request of the run.
        position: index of the first prompt in the caller's whole list.

    Raises:
        ValueError: the reward is the same for all samples of a prompt.
        FloatingPointError: a reward that is not finite.
    """
    lead = p, n = probes.shape[:2]
    batched = Batched(flow, request.rows, p)
    images = batched.decode(batched.jump(probes.flatten(0, 1), request.start, 1.0))
    texts = None if asked is None else flat_prompts(asked, len(images))

    def scores(rows: slice) -> Tensor:
        return score(reward, images[rows], None if texts is None else texts[rows])

    rewards = torch.cat(in_slices(scores, len(images), request.rows)).to(
        images.device, log_dtype(images.device)
    )
    Rows(lead, position, asked).refuse_not_finite("reward", rewards, "a one-jump sample")
    spread = rewards.reshape(lead).std(1)
    flat = (spread <= 1e-6 * rewards.reshape(lead).abs().amax(1)).nonzero().flatten().tolist()
    if flat:
        name = f" ({asked[flat[0]]!r})" if asked else ""
        raise ValueError(
            f"the reward has a standard deviation of zero over {n} one-jump samples of prompt "
            f"{position + flat[0]}{name}, so no temperature can be set from it: give "
            "temperature=..., or a reward that differs between these samples"
        )
    return spread.float() / (request.strength or 3.0)
