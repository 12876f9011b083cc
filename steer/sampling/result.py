"""`steer.sample`: guided sampling in one call, by the name of a method."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

__all__ = ["Result"]


@dataclass
class Result:
    """What `sample` returns; a leading prompt axis (p,) where a list of prompts was given.

    Attributes:
        x: the particles, (n, *event) or (p, n, *event).
        images: decoded, nominally in [0, 1], (..., 3, h, w); None without pixels.
        rewards: in the reward's units, (n,) or (p, n).
        log_w: log-weights since the last resampling; 0 for `none` and `best-of-n`.
        log_z: the estimate of log E[exp(reward / temperature)], () or (p,); None where the
            method has none.
        ess: the effective sample size, () or (p,).
        nfe: network forward-equivalents per returned particle, theory (51): a forward 1, a
            gradient with respect to the input 1 more.
        temperature: what the reward was divided by, () or (p,); None where the method has none.
        best: the index of the highest reward, () or (p,).
        prompts: as given.
        method: its name.
        seed: the run's seed.
        reward_prompts: what the reward was asked, where that differs from the prompts.
        costs: what is counted beside: reward calls and gradients and network gradients per
            particle, seconds, and the NFE per prompt that setting the temperature took; where
            the reward had a scale to learn first, the NFE of that.
        trace: ESS, log Z and mean reward after each step, (steps, ...) each.
    """

    x: Tensor
    images: Tensor | None
    rewards: Tensor
    log_w: Tensor
    log_z: Tensor | None
    ess: Tensor
    nfe: float
    temperature: Tensor | None
    best: Tensor
    prompts: Sequence[str] | str | None
    method: str
    seed: int
    reward_prompts: Sequence[str] | str | None = None
    costs: dict[str, float] = field(default_factory=dict)
    trace: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write pictures, `grid.png`, `scores.jsonl` and `metrics.json` to a folder.

        It appears whole or not at all.

        Raises:
            ValueError: the samples have no pixels.
            FileExistsError: the folder exists, and `overwrite` is not set.
        """
        from steer.sampling.folder import save_result

        return save_result(self, Path(folder), overwrite)
