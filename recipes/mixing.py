"""The flow that a run samples: classifier-free guidance, and the size of its pictures."""

import torch

import steer
from steer.flow import device_of

__all__ = ["mixed", "pixels"]


def mixed(
    flow: steer.FlowMap, cfg: float | None, negative: str | None, prompts: list[str] | None
) -> steer.FlowMap:
    """Mix the flow with itself under the negative prompt, if cfg is given."""
    if cfg is None:
        if negative is not None:
            raise ValueError("negative_prompt has no effect without cfg: give cfg, for instance 2")
        return flow
    if prompts is None:
        raise ValueError("cfg needs a prompt, and there is none: give one, or leave cfg out")
    inner = flow.flow if isinstance(flow, steer.Adapted) else flow
    if not (inner.component or getattr(inner, "takes_guidance", False)):
        return steer.ClassifierFree(flow, cfg, negative or "")
    guided = inner.guided(cfg, negative)  # type: ignore[operator]  # a pipeline's own, or an input
    return flow.around(guided) if isinstance(flow, steer.Adapted) else guided


@torch.no_grad()
def pixels(flow: steer.FlowMap, model: str) -> torch.Size:
    """Return the height and width of a flow's pictures."""
    shape = flow.decode(torch.zeros(1, *flow.event_shape, device=device_of(flow))).shape
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(
            f"model {model!r} decodes to shape {tuple(shape)}, which is not a picture (1, 3, h, "
            "w): call steer.sample from Python, and use result.x"
        )
    return shape[-2:]
