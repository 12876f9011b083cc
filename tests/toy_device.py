"""A device that is not there: its tensors live on the CPU, and what would stall it is counted.

`python -m tests.toy_device` runs samplers and tuning on it; torch takes a device's name for the
whole process, so the tests start one of their own. A device runs behind its host. The host waits
for it where a number is read (`item`, `tolist`, a mask that picks rows, `nonzero`), and where
ordinary memory is copied to it or from it. Two tensors of two devices in one operation are
refused, as on a card.
"""

import json
import sys
import traceback
from collections import Counter
from contextlib import suppress

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "toy"
READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero",
    "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::bincount", "aten::histc",
    "aten::repeat_interleave.Tensor",
}  # fmt: skip
"""Operations whose result, or its shape, the host must know."""

INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPIES = {"aten::_to_copy", "aten::copy_"}


class Enough(Exception):
    """The steps that are counted were made."""


class Module:
    """What torch asks of a device's module."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def device_count(self):
        return 1

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class OnToy(torch.Tensor):
    """A tensor on the device, around one on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnToy({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Watch(TorchDispatchMode):
    """Give operations on the device what they ask for, and count what the host waits for."""

    now = None

    def __init__(self):
        super().__init__()
        self.waits, self.places = 0, Counter()

    def __enter__(self):
        Watch.now = self
        return super().__enter__()

    def __exit__(self, *error):
        Watch.now = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def wait(self, why):
        self.waits += 1
        ours = [
            f for f in traceback.extract_stack()
            if "/steer/" in f.filename or "/rewards/" in f.filename or "/recipes/" in f.filename
        ]  # fmt: skip
        place = f"{'/'.join(ours[-1].filename.split('/')[-3:])}:{ours[-1].lineno}" if ours else "?"
        self.places[f"{why}, {place}"] += 1


def waits(why):
    if Watch.now is not None:
        Watch.now.wait(why)


def inside(value):
    return value.held if isinstance(value, OnToy) else value


def on_toy(device):
    return device is not None and torch.device(device).type == NAME


def run(func, args, kwargs):
    name, device = func._schema.name, kwargs.get("device")
    leaves = tree_leaves((args, kwargs))
    own = [t for t in leaves if isinstance(t, OnToy)]
    hosts = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, OnToy)]
    if name in COPIES:
        return copied(func, name, args, kwargs)
    if own and (name in READS or f"{name}.{func._schema.overload_name}" in READS):
        waits("a number is read")
    if own and name in INDEXING:
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                waits("rows are picked by a mask")
            elif isinstance(index, torch.Tensor) and not isinstance(index, OnToy):
                waits("an index is copied")
    elif own and any(t.ndim for t in hosts):
        raise RuntimeError(
            f"{name}: expected all tensors on one device, found {NAME} and the host's "
            f"{[tuple(t.shape) for t in hosts]}"
        )
    told = {k: torch.device("cpu") if k == "device" and on_toy(v) else inside(v)
            for k, v in kwargs.items()}  # fmt: skip
    made = func(*tree_map(inside, args), **tree_map(inside, told))
    if not (own or on_toy(device)) or name == "aten::_local_scalar_dense":
        return made
    same = {id(t.held): t for t in own}

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return same[id(value)] if id(value) in same else OnToy(value)

    return tree_map(wrapped, made)


def copied(func, name, args, kwargs):
    """Copy to the device or from it; the host waits unless it was told not to."""
    if name == "aten::copy_":
        there, here = isinstance(args[0], OnToy), isinstance(args[1], OnToy)
        goes_on = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        here, device = isinstance(args[0], OnToy), kwargs.get("device")
        there = here if device is None else on_toy(device)
        goes_on = kwargs.get("non_blocking", False)
    if here != there and (here or not goes_on):
        waits("a copy to the host" if here else "a copy to the device")
    told = {k: torch.device("cpu") if k == "device" and v is not None else v
            for k, v in kwargs.items()}  # fmt: skip
    made = func(*tree_map(inside, args), **told)
    if name == "aten::copy_":
        return args[0]
    return OnToy(made) if there else made


def sampled(method, flow, reward, particles=4, steps=4, **options):
    """Return how often the host waits in each step, and where in the last but one."""
    import steer

    with Watch() as watch:
        counts, before, places = [], watch.waits, {}
        stream = steer.stream(
            flow, reward, ["a fox", "an owl"], particles=particles, steps=steps, method=method,
            **options,
        )  # fmt: skip
        for _ in stream:
            counts.append(watch.waits - before)
            before, places = watch.waits, dict(watch.places)
            watch.places.clear()
    return counts[1:], places  # the first has the start in it


def tuned(objective, steps=4):
    """Return how often the host waits in each optimizer step, and where in the last."""
    from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
    from lightning.fabric.strategies import STRATEGY_REGISTRY
    from lightning.fabric.strategies import SingleDeviceStrategy as OneDevice
    from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
    from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

    import steer
    from steer.tuning import module
    from steer.tuning.module import RewardTuning
    from tests.test_tuning import tiny

    class Toy(Accelerator):
        """The device, as Lightning knows it."""

        def setup_device(self, device):
            pass

        def teardown(self):
            pass

        def get_device_stats(self, device):
            return {}

        @staticmethod
        def parse_devices(devices):
            return 1

        @staticmethod
        def get_parallel_devices(devices):
            return [torch.device(NAME, 0)]

        @staticmethod
        def auto_device_count():
            return 1

        @staticmethod
        def is_available():
            return True

        @staticmethod
        def name():
            return NAME

    if NAME not in AcceleratorRegistry:
        AcceleratorRegistry.register(NAME, Toy)
        ACCELERATOR_REGISTRY.register(NAME, Toy)
        place = {"device": torch.device(NAME, 0), "override": True}
        StrategyRegistry.register(NAME, SingleDeviceStrategy, **place)
        STRATEGY_REGISTRY.register(NAME, OneDevice, **place)
    counts, places, before = [], {}, 0

    class Counting(RewardTuning):
        def on_train_batch_start(self, batch, index):
            nonlocal before
            before = Watch.now.waits
            Watch.now.places.clear()

        def on_train_batch_end(self, outputs, batch, index):
            nonlocal places
            counts.append(Watch.now.waits - before)
            places = dict(Watch.now.places)
            if len(counts) == steps:  # what comes after moves tensors off a device for good
                raise Enough

    module.RewardTuning = Counting
    with Watch(), suppress(Enough):
        flow = steer.load("emoji") if objective == "direct" else tiny()
        steer.finetune(
            flow.to(NAME), bright, ["fox", "owl"], objective=objective, steps=steps, batch_size=8,
            accelerator=NAME, strategy=NAME, progress=False,
        )  # fmt: skip
    return counts[1:], places


def placed(make):
    """Return `torch.tensor` for the device, where it is a copy from the host's memory."""

    def tensor(data, *args, device=None, **kwargs):
        made = make(data, *args, device="cpu" if on_toy(device) else device, **kwargs)
        return made.to(device) if on_toy(device) else made

    return tensor


def bright(images):
    return images[:, 0].mean((1, 2))


def main(what):
    import warnings

    warnings.simplefilter("ignore")
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.tensor = placed(torch.tensor)  # it goes past dispatch modes
    import steer
    from steer.sampling.methods import TABLE
    from tests.test_tuning import tiny

    found = {}
    if what == "sample":
        with Watch():
            flow, small = steer.load("emoji").to(NAME), tiny().to(NAME)
        for name in steer.METHODS:
            more = {"temperature": 0.05} if TABLE[name].weighted else {}
            found[name] = sampled(name, small, bright, **more)
        found["split, least"] = sampled("split", flow, bright, temperature=0.05, least=0.5)
        found["renoise, clip"] = sampled("renoise", flow, "clip", temperature=0.05)
    else:
        from steer.objectives.table import TABLE as OBJECTIVES

        for name in OBJECTIVES:
            found[name] = tuned(name)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
