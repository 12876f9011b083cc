"""Keyed randomness: a particle's noise is a function of (seed, prompt, particle, step, draw).

Generators are seeded by a hash of the key, on the CPU, so neither micro-batches, nor the number of
particles, nor the other prompts, nor the device change what a particle receives.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Noise", "generator"]


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the key.

    >>> a, b = (torch.rand(1, generator=generator(0, "start")) for _ in range(2))
    >>> bool(a == b)
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Noise:
    """Normals and uniforms for p * n prompt-major rows.

    Particles share a generator in blocks whose size depends on the event alone, and a block is
    always drawn whole: one more particle leaves the others' noise as it was.

    Args:
        seed: the run's seed.
        prompts: the positions of the prompts in the caller's whole list.
        particles: n, the particles of each prompt.
        step: what these draws are for; `at` gives the same rows at another step.
        device: where the draws are moved to.
        dtype: their dtype. Default: torch's default.
    """

    def __init__(
        self,
        seed: int,
        prompts: Sequence[int] = (0,),
        particles: int = 1,
        *,
        step: int | str = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.seed, self.prompts, self.particles = seed, tuple(prompts), particles
        self.step, self.device = step, device
        self.dtype = dtype or torch.get_default_dtype()
        self._draws = 0

    def at(self, step: int | str) -> "Noise":
        """Return the noise of the same rows at another step, with its draws counted anew."""
        return Noise(
            self.seed,
            self.prompts,
            self.particles,
            step=step,
            device=self.device,
            dtype=self.dtype,
        )

    def normal(self, event_shape: Sequence[int]) -> Tensor:
        """Draw standard normals, (p * n, *event)."""
        return self._draw(torch.randn, tuple(event_shape))

    def uniform(self) -> Tensor:
        """Draw uniforms on [0, 1), (p * n,)."""
        return self._draw(torch.rand, ())

    def generator(self, prompt: int) -> torch.Generator:
        """Return a generator for what concerns all particles of a prompt (resampling).

        Args:
            prompt: an index into `prompts`.
        """
        return generator(self.seed, self.prompts[prompt], self.step, "prompt")

    def _draw(self, kind: Callable[..., Tensor], event: tuple[int, ...]) -> Tensor:
        draw, self._draws = self._draws, self._draws + 1
        block = max(1, 1024 // math.prod(event))
        blocks = range(math.ceil(self.particles / block))
        rows = [
            torch.cat(
                [
                    kind(
                        (block, *event),
                        generator=generator(self.seed, prompt, self.step, draw, b),
                        dtype=self.dtype,
                    )
                    for b in blocks
                ]
            )[: self.particles]
            for prompt in self.prompts
        ]
        return torch.cat(rows).to(self.device)
