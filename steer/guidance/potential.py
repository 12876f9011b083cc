"""Potentials: the reward as evaluated at time t.

`r_t(x) = g(t) R(view_t(x))`, theory (17), with `R = reward(decode(.)) / temperature`, a ramp with
g(0) = 0 and g(1) = 1, and a view of the clean sample: the flow map's lookahead, the denoiser, or x
itself (Sabour et al. 2025, arXiv 2511.22688). Guidance samples `rho_t e^{r_t}`, theory (18), hence
the tilt at t = 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from steer.devices import differentiating
from steer.flow import FlowMap, composed, flat_prompts, log_dtype, per_row
from steer.onto import onto, row_times
from steer.path import Time, as_time, like
from steer.ranges import count
from steer.reward import Reward, score, wrap

__all__ = [
    "Denoised", "Evaluation", "Lookahead", "Naive", "Potential", "Ramp", "Terminal", "Viewed",
    "inverse_temperature",
]  # fmt: skip

Ramp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """The values of a potential for some rows at one (x, t).

    Attributes:
        value: `r_t(x)`, (n,), in `log_dtype`.
        reward: the reward of the view, in its own units, (n,); NaN if it was not evaluated.
        gradient: `∇r_t(x)`, (n, *event), if it was requested.
        partial: `∂_t r_t(x)`, (n,), beside the gradient.
        total: `(∂_t + b·∇) r_t`, (n,), if it is known without the gradient.
        images: the decoded images that the reward scored, at t = 1.
        clean: the view of the rows as clean samples, (n, *event), if there is one.
    """

    value: Tensor
    reward: Tensor
    gradient: Tensor | None = None
    partial: Tensor | None = None
    total: Tensor | None = None
    images: Tensor | None = None
    clean: Tensor | None = None

    def rate(self, b: Tensor) -> Tensor:
        """Return `(∂_t + b·∇) r_t`, theory (22), (n,)."""
        if self.total is not None:
            return self.total
        if self.gradient is None or self.partial is None:
            raise ValueError("this evaluation has no derivatives: call it with derivatives=True")
        return self.partial + (b * self.gradient).flatten(1).sum(1)

    def map(self, f: Callable[..., Tensor], *others: "Evaluation") -> "Evaluation":
        """Apply `f` to each field that all of these evaluations hold."""

        def column(name: str) -> Any:
            values = [getattr(e, name) for e in (self, *others)]
            return None if any(v is None for v in values) else f(*values)

        return replace(self, **{field.name: column(field.name) for field in fields(self)})


class Potential(ABC):
    """`r_t(x)`, its gradient and its rate, all from `evaluate`.

    Attributes:
        temperature: what the reward is divided by: a float, or one per row, (n,), or per prompt.
        prompts: the reward's prompts, one per prompt; None if it takes none.
        differentiable: whether there is a gradient.
    """

    temperature: float | Tensor = 1.0
    prompts: Sequence[str] | None = None
    differentiable: bool = True

    @property
    def asked(self) -> tuple[nn.Module, ...]:
        """The modules that it calls, which a run keeps in evaluation mode. Default: none."""
        return ()

    def predicts(self, flow: FlowMap, t: float) -> bool:
        """Return whether `clean` at t is this flow's one prediction, see `FlowMap.reuses`."""
        return False

    @abstractmethod
    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Evaluate `r_t` at x (n, *event), with its gradient if `derivatives`.

        Raises:
            ValueError: derivatives of a reward that is not differentiable, or a reward that
                returns something else than one number per sample.
        """

    @final
    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """Return `r_t(x)`, (n,), in the reward's precision."""
        seen = self.evaluate(x, t)
        return seen.value.to(seen.reward.dtype)

    @final
    def gradient(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Return `r_t(x)` (n,) and `∇r_t(x)` (n, *event)."""
        seen = self.evaluate(x, t, derivatives=True)
        assert seen.gradient is not None
        return seen.value.to(seen.reward.dtype), seen.gradient

    @final
    def rate(self, x: Tensor, t: Time, b: Tensor) -> Tensor:
        """Return `(∂_t + b·∇) r_t(x)`, (n,), for the velocity b (n, *event) at (x, t)."""
        return self.evaluate(x, t, derivatives=True).rate(b)


def inverse_temperature(temperature: float | Tensor, x: Tensor) -> Tensor:
    """Return one over a temperature: () on the host for one, or (n,) where x is.

    Args:
        temperature: a float, or one per prompt or per row.
        x: rows (n, *event), prompt-major.
    """
    given = torch.as_tensor(temperature)
    if given.ndim == 0:
        return 1 / given
    return 1 / per_row(onto(given, x.device), len(x), "temperatures")


def _arrived(t: Tensor) -> bool:
    """Return whether all rows are at t = 1, where every view is x itself."""
    return t.ndim == 0 and float(t) == 1


class Viewed(Potential):
    """`g(t) R(view_t(x))`: everything except the view.

    Args:
        flow: the flow map, prompts already bound.
        reward: a Reward or any callable on images.
        prompts: the reward's prompts, one per prompt.
        temperature: in the reward's units, > 0: a float, or one per prompt or per row.
        steps: number of jumps of a view that uses jumps.
        ramp: g, with g(0) = 0 and g(1) = 1. Default: g(t) = t.
    """

    def __init__(
        self,
        flow: FlowMap,
        reward: Reward | Callable[..., Tensor],
        prompts: Sequence[str] | None = None,
        temperature: float | Tensor = 1.0,
        steps: int = 1,
        ramp: Ramp | None = None,
    ) -> None:
        if isinstance(prompts, str):
            prompts = [prompts]
        warm = torch.as_tensor(temperature)
        if not bool(((warm > 0) & torch.isfinite(warm)).all()):
            raise ValueError(f"temperature must be above zero and finite, got {temperature}")
        count("the lookahead's number of jumps", steps)
        self.flow, self.reward, self.prompts = flow, wrap(reward), prompts
        self.temperature, self.steps, self.ramp = temperature, steps, ramp or (lambda t: t)
        self.differentiable = self.reward.differentiable

    @property
    def asked(self) -> tuple[nn.Module, ...]:
        """Flow and reward."""
        return self.flow, self.reward

    @abstractmethod
    def _view(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the view of x as a clean sample, (n, *event)."""

    def _views(self, flow: FlowMap, kind: type["Viewed"]) -> bool:
        """Return whether `clean` is this flow's view as a kind has it, not a subclass's own."""
        own = type(self)
        return flow is self.flow and (own._view, own._score) == (kind._view, Viewed._score)

    def _score(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reward of the view, (n,), the view decoded, and the view, (n, *event)."""
        clean = x if _arrived(t) else self._view(x, t)
        scores, images = self._asked(clean)
        return scores, images, clean.detach()

    def _asked(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward of clean samples, (n,), at least in float32, and their pictures."""
        images = self.flow.decode(clean)
        prompts = None if self.prompts is None else flat_prompts(self.prompts, len(clean))
        scores = score(self.reward, images, prompts)
        kind = torch.promote_types(scores.dtype, torch.float32)
        return scores.to(clean.device, kind), images

    def _inverse_temperature(self, x: Tensor) -> Tensor:
        return inverse_temperature(self.temperature, x)

    def _ramp(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return g(t) and g'(t)."""
        with torch.enable_grad():
            time = as_time(t).detach().clone().requires_grad_()
            g = self.ramp(time)
            slope = torch.autograd.grad(g.sum(), time)[0] if g.requires_grad else g * 0
        return g.detach(), slope

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Return the reward of the view, ramped and divided by the temperature."""
        g, g_dot = self._ramp(t)
        k = self._inverse_temperature(x)
        if not derivatives or (g.ndim == 0 and float(g) == 0):
            reward, images, clean = self._score(x, as_time(t))
            gradient = torch.zeros_like(x) if derivatives else None
            partial = None
        else:
            self._need_gradient()
            reward, images, clean, gradient, partial = self._differentiate(x, as_time(t))
            rate = g * k.to(log_dtype(k.device))
            partial = like(rate, reward) * partial
            gradient = like(rate, x) * gradient
        wide = reward.to(log_dtype(reward.device))
        k = k.to(wide.dtype)
        slope = like(g_dot, wide) * wide * k
        return Evaluation(
            value=like(g, wide) * wide * k,
            reward=reward,
            gradient=gradient,
            partial=slope if partial is None else slope + partial,
            total=self._total(slope),
            images=images.detach() if _arrived(as_time(t)) else None,
            clean=clean,
        )

    def _total(self, slope: Tensor) -> Tensor | None:
        """Return the total derivative if it is just `g'(t) R`: theory (22)."""
        return None

    def _need_gradient(self) -> None:
        if not self.differentiable:
            raise ValueError(
                "this needs the reward's gradient, and the reward is declared not differentiable: "
                "take a method without gradients ('none', 'best-of-n', 'split', or scale=0 with "
                "steer.Ratio()), or a reward that is"
            )

    def _differentiate(
        self, x: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the results of `_score`, and gradients in x (n, *event) and in t (n,)."""
        with differentiating():
            x = x.detach().requires_grad_()
            time = self._time_to_differentiate(t, x)
            scores, images, clean = self._score(x, time)
            if not scores.requires_grad:
                raise ValueError(
                    "the reward is declared differentiable, but its scores carry no gradient to "
                    "the images: compute them with tensor operations outside torch.no_grad(), or "
                    "declare it with rewards.wrap(f, differentiable=False)"
                )
            inputs = [x, time] if time.requires_grad else [x]
            grads = torch.autograd.grad(scores.sum(), inputs, allow_unused=True)
        partial = grads[1] if len(grads) == 2 else None
        return (
            scores.detach(),
            images.detach(),
            clean,
            torch.zeros_like(x) if grads[0] is None else grads[0],
            torch.zeros_like(scores) if partial is None else partial,
        )

    def _time_to_differentiate(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the time for the view: a leaf (n,) if its derivative is needed."""
        return t


class Lookahead(Viewed):
    """`r_t(x) = g(t) R(X(t,1,x))`, theory (17), through `steps` composed jumps.

    Its rate is the published `g'(t) R(X(t,1,x))`, theory (22): along the flow of an exact map the
    lookahead does not change, theory (9) (Sabour et al. 2025, arXiv 2511.22688, proposition 2.2).

    Args:
        flow: the flow map, prompts already bound.
        reward: a Reward or any callable on images.
        prompts: the reward's prompts, one per prompt.
        temperature: in the reward's units, > 0: a float, or one per prompt or per row.
        steps: number of jumps of the lookahead, on the model's own grid from t on.
        ramp: g, with g(0) = 0 and g(1) = 1. Default: g(t) = t.
    """

    def _view(self, x: Tensor, t: Tensor) -> Tensor:
        if self.steps == 1:
            return self.flow.lookahead(x, t)
        if t.ndim == 0 and t.device.type == "cpu":  # the model's own grid
            return composed(self.flow, x, [t, *self.flow.times(self.steps, float(t))[1:]])
        shares = [i / self.steps for i in range(self.steps + 1)]
        return composed(self.flow, x, [t + (1 - t) * share for share in shares])

    def _total(self, slope: Tensor) -> Tensor | None:
        return slope

    def predicts(self, flow: FlowMap, t: float) -> bool:
        """Return whether the lookahead is one step of one prediction of this flow."""
        return self._views(flow, Lookahead) and self.steps == 1 and flow.reuses(t, 1.0)


class Denoised(Viewed):
    """`r_t(x) = g(t) R(E[x_1 | x_t = x])`, theory (4, 17).

    It is blurred at early times, and its rate needs the gradient.
    """

    def _view(self, x: Tensor, t: Tensor) -> Tensor:
        return self.flow.denoise(x, t)

    def predicts(self, flow: FlowMap, t: float) -> bool:
        """Return whether the view is of this flow: its denoiser is the prediction."""
        return self._views(flow, Denoised)

    def _time_to_differentiate(self, t: Tensor, x: Tensor) -> Tensor:
        return row_times(t.detach(), x, x.dtype).clone().requires_grad_()


class Naive(Viewed):
    """`r_t(x) = g(t) R(x)`, theory (17): the reward of the noisy state itself."""

    def _view(self, x: Tensor, t: Tensor) -> Tensor:
        return x


class Terminal(Viewed):
    """`r_t = 0` before t = 1, and `R(x)` there, theory (17): plain importance sampling."""

    def _view(self, x: Tensor, t: Tensor) -> Tensor:
        return x

    def evaluate(self, x: Tensor, t: Time, derivatives: bool = False) -> Evaluation:
        """Return zeros before t = 1, without calling the reward."""
        if float(as_time(t).max()) < 1:
            zero = torch.zeros(len(x), dtype=log_dtype(x.device), device=x.device)
            unseen = zero.to(torch.promote_types(x.dtype, torch.float32)) + torch.nan
            gradient = torch.zeros_like(x) if derivatives else None
            return Evaluation(zero, unseen, gradient, zero)
        return super().evaluate(x, t, derivatives)
