"""Low-rank adapters (LoRA) on a flow map: one network that is both the base and the tuned flow.

Every adapted layer computes `W x + scale alpha / r B A x` (Hu et al. 2021, arXiv 2106.09685), with
B zero at first: at step 0, and at scale 0 always, the tuned flow is the base bit for bit. There is
no second copy of the network. peft does the layers; `import steer` does not load it.
"""

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from steer.flow import FlowMap
from steer.noise import generator
from steer.path import Time

__all__ = [
    "Adapted",
    "adapt",
    "fingerprint",
    "load_adapters",
    "merged",
    "read_metadata",
    "save_adapters",
]

DEFAULT = "default"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of the parameters in its files."""


class Adapted(FlowMap):
    """A flow with adapters, seen at one scale: 0 is the base, 1 the tuned flow.

    A view: `at` and `given` return others on the same tensors. Each call switches the adapters and
    switches them back, and a checkpointed call does so again when it is recomputed in the
    backward pass, so that views of different scales can share one graph.

    Args:
        flow: a flow whose layers have adapters, see `adapt`.
        layers: those layers.
        adapter: which adapters of the layers.
        scale: what their update is multiplied by.
        checkpoint: whether to recompute each call in the backward pass instead of keeping its
            activations (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(
        self,
        flow: FlowMap,
        layers: Sequence[Any],
        *,
        adapter: str = DEFAULT,
        scale: float = 1.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.flow, self.layers = flow, tuple(layers)
        self.adapter, self.scale, self.checkpoint = adapter, scale, checkpoint
        self.path, self.event_shape = flow.path, flow.event_shape
        self.evaluations, self.name = flow.evaluations, flow.name

    def _view(self, **changes: Any) -> "Adapted":
        view = copy.copy(self)
        view._modules = dict(self._modules)
        for name, value in changes.items():
            setattr(view, name, value)
        return view

    def at(self, scale: float = 1.0, adapter: str | None = None) -> "Adapted":
        """Return the same flow at another scale, or with another of its adapters."""
        return self._view(scale=scale, adapter=self.adapter if adapter is None else adapter)

    @property
    def base(self) -> "Adapted":
        """The flow without its adapters."""
        return self.at(0.0)

    def adapters(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Return the adapters' parameters by their name in the flow."""
        mark = f".{self.adapter if adapter is None else adapter}."
        return {
            name: p for name, p in self.flow.named_parameters() if "lora_" in name and mark in name
        }

    def add(self, adapter: str, trainable: bool = False) -> None:
        """Add a second set of adapters, a copy of this view's: an average, or an old policy."""
        from peft import inject_adapter_in_model

        config = self.flow.peft_config[self.adapter]  # type: ignore[index]
        own = self.adapters()
        trained = {name: p.requires_grad for name, p in own.items()}
        with warnings.catch_warnings():  # a second set is what we want
            warnings.simplefilter("ignore")
            with torch.random.fork_rng(devices=[]):
                inject_adapter_in_model(config, self.flow, adapter)  # type: ignore[arg-type]
        new = list(self.adapters(adapter).values())
        with torch.no_grad():
            for p, q in zip(new, own.values(), strict=True):
                p.data = q.detach().clone()
                p.requires_grad_(trainable)
        for name, p in own.items():
            p.requires_grad_(trained[name])

    @contextmanager
    def _switched(self) -> Iterator[None]:
        before = [(layer._disable_adapters, layer._active_adapter) for layer in self.layers]
        scaling = [layer.scaling.get(self.adapter) for layer in self.layers]
        try:
            for layer, own in zip(self.layers, scaling, strict=True):
                layer._disable_adapters = self.scale == 0
                layer._active_adapter = [self.adapter]
                layer.scaling[self.adapter] = self.scale * own
            yield
        finally:
            for layer, state, own in zip(self.layers, before, scaling, strict=True):
                layer._disable_adapters, layer._active_adapter = state
                layer.scaling[self.adapter] = own

    def _call(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with self._switched():
                return function(x)

        if not (self.checkpoint and torch.is_grad_enabled()):
            return run(x)
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the velocity at this scale, (n, *event)."""
        return self._call(lambda x: self.flow.velocity(x, t), x)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Return the jump at this scale, (n, *event)."""
        return self._call(lambda x: self.flow.jump(x, s, t), x)

    def given(self, prompts: Sequence[str]) -> "Adapted":
        """Bind prompts."""
        return self._view(flow=self.flow.given(prompts))

    def decode(self, x: Tensor) -> Tensor:
        """Return the flow's images."""
        return self.flow.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return what decodes to the images."""
        return self.flow.encode(images)


def _sharing(flow: FlowMap) -> FlowMap:
    """Return new modules on the same storage, so that nothing done to them touches the flow."""
    tensors = [*flow.parameters(), *flow.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        same = tensor.detach()
        memo[id(tensor)] = (
            nn.Parameter(same, requires_grad=False) if isinstance(tensor, nn.Parameter) else same
        )
    return copy.deepcopy(flow, memo)


def _targets(flow: nn.Module) -> list[str]:
    """Name the linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return [name for name, m in flow.named_modules() if isinstance(m, kinds)]


def _inject(flow: FlowMap, config: Any, targets: Sequence[str]) -> Adapted:
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    twin = _sharing(flow)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        inject_adapter_in_model(config, twin, DEFAULT)
    layers = [m for m in twin.modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError(
            f"no layer of {type(flow).__name__} is named by {list(targets)}: give some of "
            f"{', '.join(_targets(flow)[:12])} ..."
        )
    twin.requires_grad_(False)
    tuned = Adapted(twin, layers)
    for p in tuned.adapters().values():  # the adapters' own precision, whatever the base has
        p.data = p.data.float()
    tuned.train(flow.training)
    return tuned


def adapt(
    flow: FlowMap,
    rank: int = 16,
    alpha: float | None = None,
    *,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Adapted:
    """Put new adapters on a flow; the result shares the flow's tensors, and not its modules.

    Args:
        flow: any flow with linear layers or convolutions; it stays as it is.
        rank: r.
        alpha: the update is scaled by alpha / r. Default: 2 r.
        targets: names of layers, or the ends of their names. Default: every linear layer and
            convolution.
        dropout: share of the inputs of the adapters that is dropped in training.
        seed: fixes A; B is zero.

    Raises:
        ValueError: the flow has no such layer, or a rank below one.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    known = _targets(flow)
    if not known:
        raise ValueError(
            f"{type(flow).__name__} has no linear layer or convolution to put adapters on: tune a "
            "flow that is a network"
        )
    chosen = known if targets is None else list(targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=chosen,
        lora_dropout=dropout,
        base_model_name_or_path=flow.name or None,
    )
    try:
        tuned = _inject(flow, config, chosen)
    except ValueError as error:
        raise ValueError(
            f"{error}: the layers of {type(flow).__name__} that can have adapters are "
            f"{', '.join(known[:12])}{' ...' if len(known) > 12 else ''}"
        ) from None
    for name, p in tuned.adapters().items():  # as peft draws them, but from our own seed
        if "lora_A" in name:
            source = generator(seed, name)
            bound = p[0].numel() ** -0.5
            p.data = (2 * torch.rand(p.shape, generator=source) - 1).mul_(bound).to(p.device)
    return tuned


def fingerprint(flow: FlowMap) -> str:
    """Return a hash of a flow's weights, its adapters left out, rounded to bfloat16.

    So it is the same in float32 and in bfloat16, on any device.
    """
    inner = flow.flow if isinstance(flow, Adapted) else flow
    digest = hashlib.sha256()
    for name, p in sorted(inner.state_dict().items()):
        if "lora_" in name:
            continue
        digest.update(f"{name.replace('base_layer.', '')} {tuple(p.shape)}".encode())
        values = p.detach().to("cpu")
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_adapters(
    tuned: Adapted, folder: str | os.PathLike[str], metadata: dict[str, Any] | None = None
) -> None:
    """Write a folder that `steer.load(base, lora=folder)` and peft read: adapters alone.

    The file's metadata say which base it is for: its name, the version of this package, and the
    hash of its weights. Each file appears whole or not at all.

    Args:
        tuned: the flow; the adapters of its view are written.
        folder: made where it is missing.
        metadata: more to keep in the file: JSON values.
    """
    import steer
    from steer.folder import write_atomically

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark = f".{tuned.adapter}."
    state = {
        PREFIX + name.replace(mark, "."): p.detach().to("cpu").contiguous()
        for name, p in tuned.adapters().items()
    }
    notes = {
        "base": tuned.name,
        "base_sha256": fingerprint(tuned),
        "flowsteer": steer.__version__,
        **(metadata or {}),
    }
    texts = {"format": "pt"} | {
        k: v if isinstance(v, str) else json.dumps(v) for k, v in notes.items()
    }
    config = tuned.flow.peft_config[tuned.adapter].to_dict()  # type: ignore[index,union-attr]
    config["inference_mode"] = True
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    write_atomically(folder / WEIGHTS, safetensors.torch.save(state, texts))
    write_atomically(folder / CONFIG, json.dumps(plain, indent=1, default=str).encode())


def read_metadata(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a folder of adapters says of itself; empty where peft alone wrote it."""
    try:
        with safetensors.safe_open(_present(Path(folder) / WEIGHTS), "pt") as file:
            texts = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{Path(folder) / WEIGHTS} is truncated or corrupt ({error}): copy it again"
        ) from None
    notes: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            notes[name] = json.loads(text)
        except json.JSONDecodeError:
            notes[name] = text
    return notes


def load_adapters(
    flow: FlowMap, folder: str | os.PathLike[str], scale: float = 1.0, *, check: bool = True
) -> Adapted:
    """Put the adapters of a folder on a flow.

    Args:
        flow: the base that they were made for.
        folder: what `save_adapters` or peft wrote.
        scale: what their update is multiplied by: 0 is the base.
        check: refuse adapters that were made for other weights.

    Raises:
        FileNotFoundError: the folder lacks one of its two files.
        ValueError: the adapters are for another base, do not fit it, or are not whole.
    """
    from peft import LoraConfig

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder of adapters at {folder}: give the one that holds {CONFIG} and {WEIGHTS}"
        )
    notes = read_metadata(folder)
    theirs, own = notes.get("base_sha256"), fingerprint(flow) if check else None
    if check and theirs is None:
        warnings.warn(
            f"{folder} does not say which weights its adapters were made for: whether they are "
            "this base's cannot be checked",
            stacklevel=2,
        )
    elif check and theirs != own:
        raise ValueError(
            f"the adapters in {folder} were made for {notes.get('base') or 'another base'!r} with "
            f"weights {str(theirs)[:12]}, and this is {flow.name or type(flow).__name__!r} with "
            f"weights {str(own)[:12]}: load the base that they were made for, or tune again on "
            "this one"
        )
    text = _present(folder / CONFIG).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        if found.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {found.get('peft_type')!r}, and LORA is what we read")
        known = LoraConfig.__dataclass_fields__
        config = LoraConfig(**{k: v for k, v in found.items() if k in known and k != "peft_type"})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is no LoRA's configuration: {error}") from None
    state = {
        name.removeprefix(PREFIX): p
        for name, p in safetensors.torch.load_file(folder / WEIGHTS).items()
    }
    try:
        tuned = _inject(flow, config, sorted(config.target_modules or []))
    except ValueError as error:
        raise ValueError(f"the adapters in {folder} do not fit this base: {error}") from None
    mark = f".{DEFAULT}."
    own_state = {name.replace(mark, "."): p for name, p in tuned.adapters().items()}
    missing, unknown = own_state.keys() - state.keys(), state.keys() - own_state.keys()
    wrong = [n for n in own_state.keys() & state.keys() if own_state[n].shape != state[n].shape]
    if missing or unknown or wrong:
        example = next(iter([*unknown, *missing, *wrong]))
        raise ValueError(
            f"the adapters in {folder} do not fit this base: {len(unknown)} are for layers that "
            f"it does not have, {len(missing)} of its own are missing, {len(wrong)} have another "
            f"shape (for instance {example}): they were made for another model, or the file "
            f"and {CONFIG} are not from the same save"
        )
    with torch.no_grad():
        for name, p in own_state.items():
            p.copy_(state[name])
    return tuned.at(scale)


def merged(tuned: Adapted) -> FlowMap:
    """Return a plain flow with the adapters added to its weights, at the view's scale: a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    flow = copy.deepcopy(tuned.flow)
    named: list[tuple[str, Any]] = list(flow.named_modules())
    for name, layer in named:
        if isinstance(layer, BaseTunerLayer):
            plain: Any = layer.get_base_layer()
            with torch.no_grad():
                update = layer.get_delta_weight(tuned.adapter)  # type: ignore[attr-defined]
                plain.weight.add_((tuned.scale * update).to(plain.weight))
            parent, _, leaf = name.rpartition(".")
            setattr(flow.get_submodule(parent), leaf, plain)
    if hasattr(flow, "peft_config"):
        del flow.peft_config
    return flow


def _present(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: a folder of adapters holds {CONFIG} and {WEIGHTS}"
        )
    return file
