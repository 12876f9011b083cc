"""Draw where particles start: noise, or a noisy picture."""

from torch import Tensor

from steer.flow import FlowMap
from steer.noise import Noise
from steer.sampling.request import PROBES, Request

__all__ = ["starts"]


def starts(request: Request, group: range, flow: FlowMap) -> tuple[Tensor, Tensor | None]:
    """Draw where the particles of a group of prompts start, and its probes.

    Args:
        request: the run's.
        group: indices of prompts, p of them.
        flow: the flow with these prompts bound.

    Returns:
        The particles (p, n, *event), and the samples that the temperature is set by,
        (p, PROBES, *event); None where none is to be set.
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
        return flow.path.interpolate(x_0, x_1.to(x_0)[:, None], request.start)

    probed = request.chosen.tempered and request.temperature is None
    return draw(request.particles, "start"), draw(PROBES, "temperature") if probed else None
