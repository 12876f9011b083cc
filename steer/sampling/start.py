"""Where particles start: at noise, a noisy picture, or the inverted state of a picture."""

from itertools import pairwise

import torch
from torch import Tensor

from steer.flow import FlowMap
from steer.noise import Noise
from steer.path import like
from steer.sampling.request import INVERSION, PROBES, Request

__all__ = ["inverted", "starts"]


@torch.no_grad()
def inverted(flow: FlowMap, x: Tensor, t: float, steps: int = INVERSION) -> Tensor:
    """Return the state at t that the flow maps to x at 1: its ODE backwards, by Heun's method.

    From there the flow leads back to x, so only guidance causes changes: DDIM inversion (Song,
    Meng, Ermon 2021, arXiv 2010.02502) of a flow. Exact as steps grow, at second order. On a path
    whose velocity is infinite at t = 1 (variance preserving) it begins at `t = 1 - 1e-3`, with the
    noise that the denoiser estimates there.

    Args:
        flow: its velocity, prompts bound: those that describe the picture.
        x: samples, (n, *event).
        t: in [0, 1).
        steps: two calls of the velocity each.
    """
    times = torch.linspace(1, t, steps + 1, dtype=torch.float64).tolist()
    if not bool(torch.isfinite(flow.path.derivative(1.0)[0])):
        times[0] = max(1 - 1e-3, (1 + times[1]) / 2)
        beta = flow.path(times[0])[1]
        mean = like(beta, x) * x
        x = 2 * mean - like(beta, x) * flow.denoise(mean, times[0])
    for late, early in pairwise(times):
        h = early - late
        first = flow.velocity(x, late)
        x = x + h / 2 * (first + flow.velocity(x + h * first, early))
    return x


def starts(request: Request, group: range, flow: FlowMap) -> tuple[Tensor, Tensor | None]:
    """Sample the starts of the particles of a group of prompts, and its probes.

    Args:
        request: the request of the run.
        group: indices of prompts, p of them.
        flow: the flow with these prompts bound.

    Returns:
        The particles (p, n, *event), and the starts of the samples that set the temperature, (p,
        PROBES, *event); None if the temperature is given.
    """
    places = range(request.position + group.start, request.position + group.stop)
    shape, dtype, device = flow.event_shape, request.dtype, request.device

    def draw(particles: int, step: str) -> Tensor:
        noise = Noise(request.seed, places, particles, step=step, device=device, dtype=dtype)
        x_0 = noise.normal(shape).unflatten(0, (len(places), particles))
        if request.encoded is None:
            return x_0
        x_1 = request.encoded
        x_1 = x_1 if len(x_1) == 1 else x_1[group.start : group.stop]
        if request.init_by == "inversion" and step == "start":  # probes are spread around it
            x_1 = x_1.expand(len(places), *shape).to(x_0)
            begun = inverted(flow, x_1, request.start)
            return begun[:, None].expand_as(x_0).clone()
        return flow.path.interpolate(x_0, x_1.to(x_0)[:, None], request.start)

    probed = request.chosen.tempered and request.temperature is None
    return draw(request.particles, "start"), draw(PROBES, "temperature") if probed else None
