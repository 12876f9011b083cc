"""Keyed randomness: a particle's noise is a function of (seed, prompt, particle, step, draw).

Generators are seeded by a hash of the key, on the CPU. So micro-batches, the number of particles,
the other prompts and the device do not change the noise of a particle.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.onto import onto

__all__ = ["Draws", "Noise", "generator", "noise_dtype", "whole"]


def whole(seed: Any) -> int:
    """Return a seed as an int; numpy numbers, tensors, True and 1.0 are accepted.

    >>> whole(1.0), whole(torch.tensor(1)), whole(True)
    (1, 1, 1)

    Raises:
        ValueError: it is not a whole number.
    """
    try:
        found = seed.item() if hasattr(seed, "item") else seed
        if isinstance(found, float) and found.is_integer():
            return int(found)
        return int(operator.index(found))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"a seed must be a whole number, got {seed!r}") from None


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the key.

    >>> a, b = (torch.rand(1, generator=generator(0, "start")) for _ in range(2))
    >>> bool(a == b)
    True
    """
    plain = tuple(part if isinstance(part, str) else whole(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Noise:
    """Normals and uniforms for p * n prompt-major rows.

    Particles share a generator in blocks whose size depends only on the event, and a block is
    always generated completely: an additional particle does not change the noise of the others.

    Args:
        seed: the run's seed.
        prompts: the positions of the prompts in the caller's whole list.
        particles: n, the particles of each prompt.
        step: the step of these random numbers; `at` gives the same rows at another step.
        device: device of the random numbers.
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
        """Return the noise of the same rows at another step, with a new count of draws."""
        return Noise(
            self.seed,
            self.prompts,
            self.particles,
            step=step,
            device=self.device,
            dtype=self.dtype,
        )

    def normal(self, event_shape: Sequence[int]) -> Tensor:
        """Sample standard normals, (p * n, *event)."""
        return self._draw(torch.randn, tuple(event_shape))

    def uniform(self) -> Tensor:
        """Sample uniform numbers in [0, 1), (p * n,)."""
        return self._draw(torch.rand, ())

    def generator(self, prompt: int) -> torch.Generator:
        """Return a generator for operations on all particles of a prompt (resampling).

        Args:
            prompt: an index into `prompts`.
        """
        return generator(self.seed, self.prompts[prompt], self.step, "prompt")

    def _draw(self, kind: Callable[..., Tensor], event: tuple[int, ...]) -> Tensor:
        draw, self._draws = self._draws, self._draws + 1
        rows = [
            _rows(
                kind, event, (self.seed, prompt, self.step, draw), (0, self.particles), self.dtype
            )
            for prompt in self.prompts
        ]
        return onto(torch.cat(rows), self.device)


def noise_dtype(flow: nn.Module) -> torch.dtype:
    """Return the dtype of the noise: that of the network, else torch's default.

    float64 for a network of doubles, float32 for any other; torch's default without parameters.
    """
    kinds = {p.dtype for name, p in flow.named_parameters() if "lora_" not in name}
    if not kinds:
        return torch.get_default_dtype()
    return torch.float64 if kinds == {torch.float64} else torch.float32


class Draws:
    """Normals and uniforms for some rows of a training step's batch.

    The random numbers of a row are a function of (seed, step, row, draw). They do not depend on
    the other rows of the call, so micro-batches and processes never change them.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        rows: the first of these rows in the step's whole batch, and one past the last.
        device: device of the random numbers.
        dtype: their dtype. Default: torch's default.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        rows: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.seed, self.step, self.rows, self.device = seed, step, rows, device
        self.dtype = dtype or torch.get_default_dtype()
        self._draws = 0

    def __len__(self) -> int:
        return self.rows[1] - self.rows[0]

    def normal(self, event_shape: Sequence[int]) -> Tensor:
        """Sample standard normals, (n, *event)."""
        return self._draw(torch.randn, tuple(event_shape))

    def uniform(self, shape: Sequence[int] = (), host: bool = False) -> Tensor:
        """Sample uniform numbers in [0, 1), (n, *shape), on the host."""
        return self._draw(torch.rand, tuple(shape), host)

    def choice(self, count: int) -> int:
        """Sample one of `count` numbers, the same for all rows of the step."""
        self._draws += 1
        source = generator(self.seed, self.step, self._draws, "choice")
        return int(torch.randint(count, (), generator=source))

    def _draw(
        self, kind: Callable[..., Tensor], event: tuple[int, ...], host: bool = False
    ) -> Tensor:
        self._draws += 1
        key = (self.seed, self.step, self._draws, "rows")
        made = _rows(kind, event, key, self.rows, self.dtype)
        return made if host else onto(made, self.device)


def _rows(
    kind: Callable[..., Tensor],
    event: tuple[int, ...],
    key: tuple[int | str, ...],
    rows: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return rows first to last of an infinite table of random numbers, (last - first, *event)."""
    block = max(1, 1024 // math.prod(event))
    first, last = rows[0] // block, math.ceil(rows[1] / block)
    blocks = [
        kind((block, *event), generator=generator(*key, b), dtype=dtype)
        for b in range(first, last)
    ]
    return torch.cat(blocks)[rows[0] - first * block : rows[1] - first * block]
