"""Reward guidance as a block of a modular pipeline, so that it can be shared with the pipeline."""

from collections.abc import Iterator
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

__all__ = ["GuidanceBlock", "with_guidance"]

NAME = "reward_guidance"


class GuidanceBlock(ModularPipelineBlocks):
    """The last block of a denoising loop: it moves the latents as a callback would.

    Args:
        guidance: a `steer.RewardGuidance`, attached to the pipeline.
    """

    def __init__(self, guidance: Any = None) -> None:
        self.guidance = guidance
        super().__init__()

    @property
    def description(self) -> str:
        """What the block does."""
        return "moves the latents along the gradient of a reward of their lookahead"

    @property
    def inputs(self) -> list[InputParam]:
        """What the block reads."""
        return [InputParam("latents", required=True)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the block writes."""
        return [OutputParam("latents")]

    def __call__(self, components: Any, state: Any, i: int, t: Any) -> tuple[Any, Any]:
        """Move the latents of a step of the loop."""
        told = {"latents": state.latents}
        state.latents = self.guidance(components, i, t, told)["latents"]
        return components, state


def with_guidance(pipe: Any, guidance: Any) -> Any:
    """Return a modular pipeline with the block at the end of each of its denoising loops.

    Args:
        pipe: the pipeline, which is not changed; the new one has its components.
        guidance: a `steer.RewardGuidance`.

    Raises:
        ValueError: a pipeline without a loop.
    """
    blocks = pipe.blocks  # a copy
    loops = list(_loops(blocks))
    if not loops:
        raise ValueError(f"{type(pipe).__name__} has no denoising loop to put a block into")
    for loop in loops:
        loop.sub_blocks[NAME] = GuidanceBlock(guidance)
    made = type(pipe)(blocks)
    made.update_components(**{k: v for k, v in pipe.components.items() if v is not None})
    guidance.attach(made)
    return made


def _loops(blocks: Any) -> Iterator[Any]:
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        yield blocks
        return
    for inner in (getattr(blocks, "sub_blocks", None) or {}).values():
        yield from _loops(inner)
