"""A second time input for a denoiser with one, which turns a velocity model into a flow map.

A term that depends on the noise level tau = 1 - t at the end of the jump is added to the
denoiser's embedding e of the noise level sigma = 1 - s,

    e(sigma) + (sigma - tau) W silu(V f(sigma, tau)),

with f cosines and sines of low frequencies. At sigma = tau the term is exactly zero: the velocity
is the model's own bit for bit, and so is the pipeline in plain diffusers, which ignores the term.
W is initialised to zero, so that before training every jump is one Euler step.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from steer.files import pack, write_atomically

__all__ = ["FOLDER", "SecondTime"]

FOLDER, FORMAT = "second_time", "steer.second-time/1"


class SecondTime(nn.Module):
    """The term of the second time, added to the output of a module of the denoiser.

    High frequencies would make the map rough in its times: 12 rad is the highest.

    Args:
        module: the module of the denoiser that embeds the time, (n, width), by its dotted name.
        width: of its output.
        hidden: of the layer in between.
        frequencies: how many for each of the two noise levels.
        highest: of them, in radians for a noise level of 1.
    """

    def __init__(
        self,
        module: str,
        width: int,
        hidden: int = 256,
        frequencies: int = 16,
        highest: float = 12.0,
    ) -> None:
        super().__init__()
        self.config = {
            "module": module, "width": width, "hidden": hidden, "frequencies": frequencies,
            "highest": highest,
        }  # fmt: skip
        self.module, self.frequencies, self.highest = module, frequencies, highest
        self.hidden = nn.Linear(4 * frequencies, hidden)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, now: Tensor, target: Tensor) -> Tensor:
        """Return the term, (n, width).

        Args:
            now: noise level at the start of the jump, (n,).
            target: at its end, (n,).
        """
        weight = self.out.weight
        gap = now - target
        # not a buffer: bfloat16 would change the frequencies
        count = torch.arange(1, self.frequencies + 1, device=now.device, dtype=now.dtype)
        rates = self.highest / self.frequencies * count
        angles = torch.cat([now[:, None] * rates, gap[:, None] * rates], 1)
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(weight.dtype)
        made = self.out(nn.functional.silu(self.hidden(waves)))
        return gap[:, None].to(made) * made

    @contextmanager
    def told(self, network: nn.Module, now: Tensor, target: Tensor) -> Iterator[None]:
        """Pass the second time to the denoiser's calls in this block.

        Args:
            network: the denoiser.
            now: noise level at the start of the jump, (n,).
            target: at its end, (n,).
        """

        def add(module: nn.Module, given: Any, made: Tensor) -> Tensor:
            return made + self(now, target).to(made)

        handle = network.get_submodule(self.module).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def scale_by(self, factor: float) -> None:
        """Multiply the term; at 0 every jump is an Euler step."""
        self.out.weight.data *= factor

    def check(self, network: nn.Module) -> None:
        """Raise an error if a denoiser has no module of the term's name."""
        if self.module not in dict(network.named_modules()):
            raise ValueError(
                f"{type(network).__name__} has no module {self.module!r} that embeds the time: "
                "the second time was made for another model"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> "SecondTime":
        """Make the term from a configuration and tensors, in float32, for inference."""
        made = cls(**config)
        made.load_state_dict({k: v.float() for k, v in state.items()})
        return made.eval().requires_grad_(False)

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the term beside a pipeline, in `folder`/second_time.

        Args:
            folder: what `pipe.save_pretrained` wrote.
            dtype: of the stored weights.
        """
        inside = Path(folder) / FOLDER
        inside.mkdir(parents=True, exist_ok=True)
        state = {k: v.to(dtype) for k, v in self.state_dict().items()}
        write_atomically(inside / "model.safetensors", pack(state, {}))
        text = json.dumps({"format": FORMAT, **self.config}, indent=1)
        write_atomically(inside / "config.json", text.encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SecondTime":
        """Read what `save` wrote.

        Args:
            folder: the pipeline's, or the term's own inside it.

        Raises:
            FileNotFoundError: the folder has no second time.
            ValueError: files in another format, or truncated.
        """
        inside = Path(folder)
        inside = inside / FOLDER if (inside / FOLDER).is_dir() else inside
        files = inside / "config.json", inside / "model.safetensors"
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing: a second time is config.json and model.safetensors in "
                    f"{FOLDER}/ beside a pipeline, as `python -m recipes.train_pipeline` writes it"
                )
        try:
            config = json.loads(files[0].read_text(encoding="utf-8"))
            if (found := config.pop("format")) != FORMAT:
                raise ValueError(f"format {found!r}, where {FORMAT!r} is read")
            return cls.of(config, safetensors.torch.load_file(files[1]))
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{inside} is not a second time in our format: {error}") from None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{files[1]} is truncated or corrupt ({error})") from None
