"""The temperature of a run, set by the reward's own spread over one-jump samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.batches import Batched
from steer.flow import FlowMap, flat_prompts
from steer.guidance.population import Rows
from steer.reward import Reward, score
from steer.sampling.request import Request

__all__ = ["PROBES", "temperatures"]

PROBES = 32
"""How many one-jump samples a prompt's temperature is set by."""


@torch.no_grad()
def temperatures(
    request: Request, flow: FlowMap, reward: Reward, asked: Sequence[str] | None, group: range
) -> Tensor:
    """Return one temperature a prompt, (p,): as given, else theory (16).

    That is the standard deviation of the reward over `PROBES` one-jump samples, over the strength.

    Args:
        request: the run's.
        flow: bound to the group's prompts.
        reward: what is probed.
        asked: what it is asked, one for each prompt of the group.
        group: indices of prompts.

    Raises:
        ValueError: the reward is the same for all samples of a prompt.
        FloatingPointError: a reward that is not finite.
    """
    p = len(group)
    x = request.draw(group, PROBES, "temperature").flatten(0, 1)
    if request.temperature is not None:
        return torch.full((p,), request.temperature, device=x.device)
    batched = Batched(flow, request.rows, p)
    images = batched.decode(batched.jump(x, request.start, 1.0))
    texts = None if asked is None else flat_prompts(asked, len(images))
    parts = []
    for a in range(0, len(images), request.rows):
        rows = slice(a, a + request.rows)
        parts.append(score(reward, images[rows], None if texts is None else texts[rows]))
    rewards = torch.cat(parts).float().to(images.device)
    position = request.position + group.start
    Rows((p, PROBES), position, asked).refuse_not_finite("reward", rewards, "a one-jump sample")
    spread = rewards.reshape(p, PROBES).std(1)
    flat = (spread <= 1e-6 * rewards.reshape(p, PROBES).abs().amax(1)).nonzero().flatten().tolist()
    if flat:
        name = f" ({asked[flat[0]]!r})" if asked else ""
        raise ValueError(
            f"the reward has no spread over {PROBES} one-jump samples of prompt "
            f"{position + flat[0]}{name}, so no temperature can be set from it: give "
            "temperature=..., or a reward that tells these samples apart"
        )
    return spread / (request.strength or 3.0)
