"""A base that is sharded over processes (FSDP2), with adapters that are not sharded.

Each of N processes keeps 1/N of every weight of the denoiser, and a block's weights are gathered
when it is called and dropped afterwards (Zhao et al. 2023, arXiv 2304.11277; torch's
`fully_shard`). The base is frozen, so it has no gradients or optimizer states to shard. Adapters
have about 1 % of its size and are not sharded: they are ordinary tensors, in float32 over a base
of any precision, and DDP averages their gradients as it does without sharding. So files,
checkpoints, norms and averages are the same as in any other run, and a run may resume with another
number of processes.

Every process must make every call of the network: a process that calls alone waits for the others.
"""

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from steer.adapters.compiling import is_compiled
from steer.adapters.lora import Adapted
from steer.adapters.units import units
from steer.flow import FlowMap

__all__ = ["ShardedBase", "refuse_unshardable", "shard", "shards", "units", "whole"]


class ShardedBase(DDPStrategy):
    """Lightning's DDP for the adapters of a flow, a module's `tuned`, whose base is sharded.

    Args:
        **kwargs: arguments of Lightning's `DDPStrategy`.
    """

    splits = True
    """Every process makes every call."""

    def model_to_device(self) -> None:
        """Shard the base block by block, and move other modules; no device has the whole base."""
        tuned: Any = self.lightning_module.tuned  # type: ignore[union-attr]
        shard(tuned, self.root_device)
        super().model_to_device()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap the module for the adapters' gradients; DDP ignores the base."""
        own = [*model.named_parameters(), *model.named_buffers()]
        base = [n for n, _ in own if n.startswith("tuned.") and ".lora_" not in n]
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, base)
        return super()._setup_model(model)


def refuse_unshardable(flow: FlowMap) -> None:
    """Raise an error if a base cannot be sharded over processes.

    Raises:
        ValueError: its denoiser is the flow itself, or has weights of a special class.
    """
    denoiser = flow.denoiser
    kinds = {type(p.data) for p in denoiser.parameters()} - {Tensor}
    kinds |= {type(p) for p in denoiser.parameters()} - {nn.Parameter}
    if isinstance(denoiser, FlowMap):
        raise ValueError(
            f"strategy 'fsdp' gathers weights where a module is called, and {type(flow).__name__} "
            "does not say which module its velocity and jump call: name it in its `denoiser`, or "
            "use ddp, where each process holds the base"
        )
    if is_compiled(flow):
        raise ValueError(
            "strategy 'fsdp' gathers the weights of each block as it is called, which blocks that "
            "are compiled were not tried with: leave compile out, or use ddp"
        )
    if kinds:
        raise ValueError(
            f"strategy 'fsdp' splits ordinary weights, and this denoiser has {_names(kinds)}: "
            "load it without quantisation, or use ddp"
        )


def _names(kinds: set[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def shard(tuned: Adapted, device: torch.device) -> None:
    """Shard the base's denoiser over the processes, in place; the adapters are not sharded.

    Args:
        tuned: adapters on a base; the flow that they were put on keeps its own tensors.
        device: device of this process; it holds a whole block only while that block is sharded.
    """
    denoiser = tuned.flow.denoiser
    if any(isinstance(m, FSDPModule) for m in denoiser.modules()):
        return
    adapters = {p for name, p in tuned.flow.named_parameters() if ".lora_" in name}
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in units(tuned.flow):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)


def shards(flow: Any) -> tuple[int, int]:
    """Return the bytes of a flow's denoiser without adapters: of this process, and in total."""
    held = whole = 0
    for name, p in flow.denoiser.named_parameters():
        if "lora_" not in name:
            whole += p.numel() * p.element_size()
            own = p.to_local() if isinstance(p, DTensor) else p
            held += own.numel() * own.element_size()
    return held, whole


def whole(tuned: Adapted, fresh: Adapted) -> Adapted:
    """Return the adapters of a sharded base on an unsharded base that shares its modules.

    Args:
        tuned: a view of the sharded flow, which cannot be used afterwards.
        fresh: the adapters with which the run began, on the base.
    """
    for name in fresh.configs:
        ours, theirs = fresh.adapters(name), tuned.adapters(name)
        for key, p in ours.items():
            p.data = theirs[key].detach().to(p.device, copy=True)
    return fresh
