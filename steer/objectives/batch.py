"""The interface of an objective of reward tuning, and its argument, a batch.

An objective returns a loss and numbers to log. `R` is the reward divided by the temperature.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from steer.flow import FlowMap, flat_prompts
from steer.noise import Draws
from steer.reward import Reward, name_of, score

__all__ = ["Batch", "Objective", "refuse_not_finite"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the flows with its prompts bound, the reward, and its rows' randomness.

    Rows are prompt-major: row i belongs to prompt `i // group`.

    Attributes:
        student: the flow that is tuned, with gradients to its adapters.
        base: the same without adapters.
        average: the same with the running average of the adapters.
        reward: the reward, in its own units.
        temperature: what it is divided by.
        draws: normals and uniforms for the rows.
        prompts: p prompts, or None.
        asked: the reward's prompts, p texts, if they differ.
        unbound: the base without prompts, for objectives that bind the prompts themselves.
        epochs: how often each of these prompts has been seen before, p numbers.
    """

    student: FlowMap
    base: FlowMap
    average: FlowMap
    reward: Reward
    temperature: float
    draws: Draws
    prompts: Sequence[str] | None = None
    asked: Sequence[str] | None = None
    unbound: FlowMap | None = None
    epochs: Sequence[int] | None = None
    seen: list[tuple[Tensor, Sequence[str] | None]] = field(default_factory=list)
    """Scores of this batch, and the prompts that they belong to."""

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def group(self) -> int:
        """Rows of each prompt."""
        return len(self) // (1 if self.prompts is None else len(self.prompts))

    def noise(self) -> Tensor:
        """Draw `x_0` for all rows, (n, *event)."""
        return self.draws.normal(self.student.event_shape)

    def zeros(self) -> Tensor:
        """Return a zero for each row, (n,): the time of noise."""
        return torch.zeros(len(self), dtype=self.draws.dtype, device=self.draws.device)

    def score(self, x: Tensor) -> Tensor:
        """Return `R(x_1) = reward(decode(x_1)) / temperature`, (n,), in float32.

        Rows may be a multiple of the batch's, prompt-major as they are.

        Whether all are finite is checked once per optimizer step, see `refuse_not_finite`, because
        a check here would make the host wait for the device.

        Raises:
            ValueError: a reward without the gradient that it declares.
        """
        asked = self.prompts if self.asked is None else self.asked
        texts = None if asked is None else flat_prompts(asked, len(x))
        with torch.autocast(x.device.type, enabled=False):  # decoding and reward in full precision
            x = x if x.dtype == torch.float64 else x.float()
            values = score(self.reward, self.student.decode(x), texts)
        asked_gradient = torch.is_grad_enabled() and x.requires_grad
        if asked_gradient and self.reward.differentiable and not values.requires_grad:
            raise ValueError(
                f"reward {name_of(self.reward)!r} says that it is differentiable, and its scores "
                "carry no gradient to the images: keep to tensor operations (no PIL, numpy, "
                "detach or no_grad), or declare it with rewards.wrap(f, differentiable=False) and "
                "take an objective that needs none, nft or grpo"
            )
        self.seen.append((values.detach(), texts))
        return (values if values.dtype == torch.float64 else values.float()) / self.temperature


def refuse_not_finite(values: Tensor, texts: Sequence[str] | None) -> None:
    """Raise an error if a reward is not finite.

    Args:
        values: of a call, (n,).
        texts: the reward's prompts, one per row.

    Raises:
        FloatingPointError: a reward is not finite; the message names the first such row and its
            prompt.
    """
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        row = int(bad[0])
        whose = "" if texts is None else f" of prompt {texts[row]!r}"
        raise FloatingPointError(
            f"the reward is {float(values[row])} in row {row}{whose}: a reward must be finite for "
            "every picture that the model can generate; check the reward, and the last sheet of "
            "the run for the pictures"
        )


class Objective(nn.Module):
    """A rule by which a reward moves the adapters: `objective(batch) -> {"loss", ...}`.

    A subclass defines whether it needs the reward's gradient, and how many rows of one prompt it
    needs in a group. What it remembers between steps are buffers: checkpoints keep them.

    Attributes:
        differentiable: whether it needs the reward's gradient.
        group: rows of each prompt in a batch.
        uneven: whether processes make different numbers of network calls, depending on their
            prompts: then the base cannot be split over them.
        per_call: whether the loss depends, a little, on which rows are in one call. False: it is
            a mean over rows (or groups), so that a call for which the memory is too small may be
            made in parts. None: the objective does not say, and its calls are not made in parts.
    """

    differentiable: bool = True
    group: int = 1
    uneven: bool = False
    per_call: bool | None = None

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, (), and other numbers by name."""
