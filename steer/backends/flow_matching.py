"""Pipelines whose denoiser predicts a velocity at one time; each family defines its differences.

Their own samplers take Euler steps on a shifted grid of noise levels, and so does this package.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steer.backends.pipeline import Kind, PipelineFlow
from steer.path import Time, as_time

__all__ = [
    "DreamLite", "Ernie", "Flux", "Flux2Klein", "Krea2", "Prx", "QwenImage", "RectifiedUNet",
    "Sana", "SanaSprint", "StableDiffusion3", "Wan", "ZImage",
]  # fmt: skip


class Flux(PipelineFlow):
    """FLUX.1: dev takes the guidance scale as an input, schnell is a few-step student."""

    layout = "tokens"
    shared = frozenset({"img_ids", "txt_ids"})
    cfg_argument = "true_cfg_scale"
    guidance_argument = "guidance_scale"
    prompt_first = True
    time_embedding = "time_text_embed"

    def found_kind(self) -> Kind:
        """Return "velocity" for dev, "one-jump" for schnell, which embeds no guidance."""
        return "velocity" if self.network.config.guidance_embeds else "one-jump"


class StableDiffusion3(PipelineFlow):
    """Stable Diffusion 3 and 3.5."""

    time_scale = 1000.0
    time_embedding = "time_text_embed"
    adapter_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip


class RectifiedUNet(PipelineFlow):
    """Stable Diffusion's pipelines, 1.5 or XL, with a UNet that predicts a velocity.

    Their scheduler says `prediction_type="flow_prediction"` (UniPC and DPM-Solver know it). Its
    first step begins with pure noise at noise level .999, just after t = 0, and it passes integer
    training steps to the UNet.
    """

    network_name, state_argument = "unet", "sample"
    time_scale = 1000.0
    time_embedding = "time_embedding"
    first = 0.0
    told: tuple[Tensor, Tensor] | None = None
    """Times of the pipeline's own grid, and the training steps that the UNet gets at them."""

    def hear(self, grid: Sequence[float]) -> None:
        """Pass the pipeline's own training steps on this grid to the UNet.

        A copy of the scheduler is set to the grid if the scheduler itself is not. On other grids
        the UNet gets the times themselves, from t = 0 on.
        """
        scheduler, given = self.source.pipe.scheduler, torch.tensor(grid, dtype=torch.float64)
        now = 1 - scheduler.sigmas.double()
        if now.shape != given.shape or not torch.allclose(now, given, rtol=0, atol=1e-6):
            scheduler = copy.deepcopy(scheduler)
            scheduler.set_timesteps(len(grid) - 1)
            now = 1 - scheduler.sigmas.double()
        self.first, self.told = float(now[0]), (now[:-1], scheduler.timesteps.double())

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return `b_t(x)`, (n, *event)."""
        return super().velocity(x, self._begun(t))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return `X(s,t,x)`, (n, *event)."""
        return super().jump(x, self._begun(s), self._begun(t))

    def reuses(self, s: Time, t: Time) -> bool:
        """Return whether the jump begins where the schedule does, or later."""
        return super().reuses(s, t) and float(s) >= self.first

    def network_time(self, t: Tensor) -> Tensor:
        """Return the training step."""
        step = super().network_time(t)
        if self.told is None:
            return step
        times, steps = (u.to(step) for u in self.told)
        gap, place = (t[:, None] - times).abs().min(1)
        return torch.where(gap < 1e-5, steps[place], step.floor())

    def _begun(self, t: Time) -> Time:
        return as_time(t).clamp(min=self.first) if self.first else t


class Wan(PipelineFlow):
    """Wan, text to video; a state has an axis of frames, (c, frames, h, w)."""

    time_scale = 1000.0
    prompt_first = True
    output = "frames"


class Sana(PipelineFlow):
    """SANA."""

    @property
    def time_scale(self) -> float:  # type: ignore[override]
        """1000, times what the transformer's configuration says."""
        return 1000.0 * float(self.network.config.timestep_scale)


class SanaSprint(PipelineFlow):
    """SANA-Sprint, a few-step student of SANA.

    With tau = sin s / (cos s + sin s) the pipeline's TrigFlow state is our x at t = 1 - tau, and
    its output transform of the raw prediction F gives `x - tau F` (Chen et al. 2025, 2503.09641).
    It has no velocity of its own: F replaces it, or that of SANA in a `steer.Pair`.
    """

    cfg_argument = None
    guidance_argument = "guidance_scale"

    def found_kind(self) -> Kind:
        """Return "one-jump"."""
        return "one-jump"

    def found_churn(self) -> float:
        """Return 1: it jumps to data and re-noises."""
        return 1.0

    def arguments_of_call(self, prompt: str, steps: int) -> dict[str, Any]:
        """Return the call's arguments; the pipeline's intermediate time is for two steps only."""
        known = super().arguments_of_call(prompt, steps)
        return known if steps in (0, 2) else {"intermediate_timesteps": None, **known}

    def grid(self) -> list[float]:
        """Return cos s / (cos s + sin s) of the pipeline's angles s."""
        s = self.source.pipe.scheduler.timesteps.double()
        return [float(t) for t in s.cos() / (s.cos() + s.sin())]


class QwenImage(PipelineFlow):
    """Qwen-Image; guided predictions are rescaled to the norm of the prompt's own."""

    layout = "tokens"
    cfg_argument = "true_cfg_scale"
    prompt_first = True

    def mix(self, c: Tensor, u: Tensor) -> Tensor:
        """Return the guided prediction at the norm of c, token by token."""
        mixed = super().mix(c, u)
        return mixed * (c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))


class ZImage(PipelineFlow):
    """Z-Image; its time has our direction, and its transformer takes lists of pictures."""

    sign = 1.0
    state_argument, time_argument = "x", "t"
    no_cfg = 0.0
    prompt_first = from_prompt = True
    adapter_targets = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")

    def found_kind(self) -> Kind:
        """Return "one-jump" for Turbo, by its name."""
        return "one-jump" if "turbo" in self.source.name.lower() else "velocity"

    def state_of(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the pictures of the list, without their axis of frames."""
        return torch.stack([one[:, 0] for one in arguments[self.state_argument]])

    def network_time(self, t: Tensor) -> Tensor:
        """Return t itself."""
        return t

    def evaluate(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Call the transformer with a list of pictures (c, 1, h, w)."""
        made = self.network(x=list(x.unsqueeze(2)), **arguments, return_dict=False)[0]
        return torch.stack([one[:, 0] for one in made])


class Flux2Klein(PipelineFlow):
    """FLUX.2 klein; the latent's patches are normalised by the autoencoder's BatchNorm."""

    layout = "tokens"
    adapter_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
    prompt_first = True

    def found_kind(self) -> Kind:
        """Return "one-jump" for the distilled one."""
        return "one-jump" if self.source.pipe.config.get("is_distilled") else "velocity"


class Prx(PipelineFlow):
    """PRX; the LoRA loader of its pipeline fails in diffusers 0.42."""

    lora_loader = ""
    adapter_targets = ("img_qkv_proj", "txt_kv_proj", "attn_out")


class Ernie(PipelineFlow):
    """ERNIE-Image; its BatchNorm's epsilon is 1e-5, whatever the configuration says."""

    layout = "patches"
    time_scale = 1000.0
    epsilon = 1e-5


class Krea2(PipelineFlow):
    """Krea 2."""

    layout = "tokens"
    no_cfg = 0.0
    prompt_first = from_prompt = True


class DreamLite(PipelineFlow):
    """DreamLite-mobile; its UNet takes and returns the state next to a picture's latent."""

    network_name, state_argument = "unet", "sample"
    time_scale = 1000.0
    cfg_argument = None

    def found_kind(self) -> Kind:
        """Return "one-jump": the mobile model is a student of four steps."""
        return "one-jump"

    def state_of(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the left half."""
        return arguments[self.state_argument].chunk(2, -1)[0]

    def kept(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments, the right half among them."""
        beside = arguments[self.state_argument].chunk(2, -1)[1]
        return {**super().kept(arguments), "beside": beside}

    def evaluate(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Call the UNet on both halves, and return the left one."""
        rest = {k: v for k, v in arguments.items() if k != "beside"}
        both = torch.cat([x, arguments["beside"].to(x)], -1)
        return super().evaluate(both, rest).chunk(2, -1)[0]
