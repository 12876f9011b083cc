"""A diffusers pipeline as a flow map: velocity, jump, decode and encode of `PipelineFlow`.

With x_t = (1-t) x_0 + t x_1, t = 0 noise and t = 1 data, a denoiser that predicts the velocity of
the noise level sigma = 1 - t gives

    v(x,t) = sign * net(x, scale (1-t)),      X(s,t,x) = x + (t-s) v,

and a denoiser with a target time, `net(x, scale (1-s), target = scale (1-t))`, gives the map
itself. A family is a subclass with the few lines in which its pipelines differ.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from steer.backends.checks import dtype_of
from steer.backends.conditioned import Conditioned, Kind
from steer.backends.conditions import Rows, rows_of
from steer.backends.latents import Codec
from steer.backends.recomputing import again, by_block, has_blocks
from steer.onto import row_times
from steer.path import Time, as_time, like

__all__ = ["Kind", "PipelineFlow", "rows_time"]


class PipelineFlow(Conditioned):
    """The flow of a pipeline's denoiser, at a resolution and a guidance scale.

    `given` encodes each prompt once, by the pipeline itself. The state is the denoiser's input
    (for FLUX, packed tokens), so `event_shape` depends on the resolution. States are float32 (or
    float64) for any precision of the denoiser. The pipeline is not changed: its modules are kept
    in evaluation mode, without gradients of their weights, while they are used.

    Args:
        pipe: the pipeline; this flow and it share all modules.
        height: height of the pictures in pixels. Default: the pipeline's own.
        width: width of the pictures in pixels. Default: the pipeline's own.
        cfg: scale of classifier-free guidance, mixed at run time with two evaluations per call, in
            the pipeline's convention. Default: the pipeline's own for a velocity model; off for a
            map or a student.
        guidance: guidance scale that a guidance-distilled model takes as an input. Default: the
            pipeline's own.
        negative_prompt: the negative prompt of classifier-free guidance. Default: the pipeline's
            own.
        kind: kind of the model, see `FlowMap.kind`, if its files do not specify it.
        frame: the frame of a clip that `decode` returns; None: the middle one.
        second_time: a second time input for a denoiser with one time, see
            `steer.backends.second_time`, or its folder; the model is then a map.
        checkpointing: whether activations of denoiser and decoder are recomputed in the backward
            pass instead of being kept (Chen et al. 2016, arXiv 1604.06174), block by block if they
            have blocks, else call by call.
        guide_vae: an autoencoder that decodes if a gradient is needed, see
            `steer.backends.glimpse`: a tiny one (TAESD, TAEF1), as an object, its folder or its
            hub id. Returned pictures are decoded by the pipeline's own.
        guide_size: if a gradient is needed: height and width as a fraction of the whole: 1, 0.5 or
            0.25.
        guide_crop: if a gradient is needed: decode only the middle, with this height and width in
            pixels.
        decode_rows: if a gradient is needed: maximum number of rows in a decoder call.
        call: further arguments of the pipeline's call, such as max_sequence_length and num_frames.

    Raises:
        ValueError: a size that the model does not take, guidance that it does not have, an unknown
            argument of the pipeline, a precision that the device does not have.
        TypeError: a denoiser without the arguments that this family of pipelines has.
    """

    patches_told: tuple[int, int] | None = None
    """Rows and columns of patches, if they are known; else they follow from the size."""

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x)`, (n, *event); of a map its diagonal, where both times are equal."""
        return self.sign * self.predict(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x) = x + (t-s) v`: the map's, or one Euler step; exactly x where s = t."""
        gap = like(as_time(t) - as_time(s), x)
        return x + gap * (self.sign * self.predict(x, s, t))

    def reuses(self, s: Time, t: Time) -> bool:
        """Return whether the denoiser is not told where a jump ends."""
        told = self.target_argument is not None or self.second_time is not None
        return self.kind != "two-time" and not told

    def mean_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `v(x,s,t)`, the denoiser's, (n, *event); of a velocity model `b_s(x)`."""
        return self.sign * self.predict(x, s, t)

    def along(self, times: Sequence[float]) -> Self:
        """Return this flow as the pipeline itself samples on this grid, if the grid is its own."""
        grid = self.source.grid_like(times) if type(self).hear is not PipelineFlow.hear else None
        if grid is None:
            return self
        view = self._view()
        view.hear(grid)
        return view

    def hear(self, grid: Sequence[float]) -> None:
        """Prepare for a grid of the pipeline's own. Default: do nothing.

        Args:
            grid: its times, as `grid` returns them.
        """

    def predict(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the denoiser's output, with guidance if it is set, in the dtype of x.

        Args:
            x: states (n, *event).
            s: their time.
            t: the target time, for a map.
        """
        now, target = self.network_time(rows_time(s, x)), self.network_time(rows_time(t, x))
        return self.by_rows(x, now, target)

    def by_rows(self, x: Tensor, now: Tensor, target: Tensor) -> Tensor:
        """Return the denoiser's output at its own times, with one call per length of prompts."""
        parts = self._arguments(len(x), x.device)
        if len(parts) == 1:
            return self._mixed(x, now, target, parts[0])
        found = [self._mixed(x[p.index], now[p.index], target[p.index], p) for p in parts]
        order = torch.cat([p.index for p in parts if p.index is not None]).argsort()
        return torch.cat(found)[order]

    def _mixed(self, x: Tensor, now: Tensor, target: Tensor, rows: Rows) -> Tensor:
        c = self._call(x, now, target, rows.prompt)
        if rows.negative is None or self.cfg is None:
            return c
        return self.mix(c, self._call(x, now, target, rows.negative))

    def _call(self, x: Tensor, now: Tensor, target: Tensor, arguments: dict[str, Any]) -> Tensor:
        timed = {**arguments, self.time_argument: now}
        if self.target_argument is not None:
            timed[self.target_argument] = target

        def run(x: Tensor) -> Tensor:
            with self._told(now, target):
                return self.evaluate(x.to(dtype_of(self.network)), timed).to(x)

        if not (self.checkpointing and torch.is_grad_enabled()):
            return run(x)
        if not has_blocks(self.network):
            return again(run, self.network, x)
        with by_block(self.network):
            return run(x)

    def _told(self, now: Tensor, target: Tensor) -> AbstractContextManager[None]:
        """Pass the target time to the denoiser, if it enters through an added term."""
        if self.second_time is None:
            return nullcontext()
        scale = self.time_scale
        return self.second_time.told(self.network, now / scale, target / scale)

    def evaluate(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Call the denoiser."""
        return self.network(**{self.state_argument: x}, **arguments, return_dict=False)[0]

    def mix(self, c: Tensor, u: Tensor) -> Tensor:
        """Return the guided prediction from those of the prompt (c) and negative prompt (u)."""
        assert self.cfg is not None
        return (c if self.from_prompt else u) + self.cfg * (c - u)

    def network_time(self, t: Tensor) -> Tensor:
        """Convert our times (n,) to the denoiser's."""
        return (1 - t) * self.time_scale

    def _arguments(self, rows: int, device: torch.device) -> list[Rows]:
        bound, dtype = self._bound(), dtype_of(self.network)
        if rows % len(bound):
            raise ValueError(
                f"{rows} rows do not split evenly over {len(bound)} prompts: give p * n rows, "
                "prompt-major (row i belongs to prompt i // n)"
            )
        key = rows, device, dtype, id(bound)
        if self._rows is None or self._rows[0] != key:
            self._rows = key, rows_of(bound, rows, self.shared, device, dtype)
        return self._rows[1]

    # ------------------------------------------------------------ pictures

    @property
    def codec(self) -> Codec:
        """The codec between states and pictures at this resolution."""
        return Codec(self.vae, self.layout, self._patches(), self.epsilon)

    def decode(self, x: Tensor) -> Tensor:
        """Return pictures (n, 3, h, w), not clamped; of a clip one frame, see `frame`."""
        if self.glimpse is not None and torch.is_grad_enabled() and x.requires_grad:
            made = self.glimpse.decode(self.codec, x, self.checkpointing)
        else:
            made = self.frames(x)
        if made.ndim == 5:
            made = made[:, :, made.shape[2] // 2 if self.frame is None else self.frame]
        return made

    def frames(self, x: Tensor) -> Tensor:
        """Return pictures (n, 3, h, w), or whole clips (n, 3, frames, h, w), not clamped."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self.codec.decode(x)
        if not has_blocks(self.vae):
            return again(self.codec.decode, self.vae, x)
        with by_block(self.vae):
            return self.codec.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return the states of pictures (n, 3, h, w) in [0, 1], (n, *event).

        Raises:
            NotImplementedError: a model of clips.
        """
        still = len(self.event_shape) < 4
        if not still and self.event_shape[self._frames_axis()] > 1:
            raise NotImplementedError(
                f"{self!r} makes clips, and one picture has no frames: leave the init image out"
            )
        return self.codec.encode(images, still)

    def _frames_axis(self) -> int:
        return 0 if self.layout == "frames" else 1

    def _patches(self) -> tuple[int, int]:
        """Return rows and columns of a state's patches."""
        if self.layout != "tokens":
            return 0, 0
        if self.patches_told is not None:
            return self.patches_told
        count = self.event_shape[0]
        if self.height is None or self.width is None:
            side = round(count**0.5)
            return side, count // side
        columns = max(1, round((count * self.width / self.height) ** 0.5))
        return count // columns, columns


def rows_time(t: Time, x: Tensor) -> Tensor:
    """Return times (n,) on the device of x, in float32, or in float64 for float64 states."""
    return row_times(t, x, torch.float64 if x.dtype == torch.float64 else torch.float32)
