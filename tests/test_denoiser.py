"""Adapters belong to the denoiser: the decoder and the text encoder stay the base's, and one."""

import copy
import pickle

import pytest
import torch
from torch import nn

import steer
from steer.adapters.inject import adapt, rejoin
from steer.adapters.merge import merged
from steer.adapters.store import load_adapters, save_adapters
from steer.adapters.targets import targets
from steer.flow import FlowMap

D = 4


class Parts(FlowMap):
    """A network with a linear decoder and a linear text encoder beside it."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.text = nn.ModuleDict({"proj": nn.Linear(2, D)})
            self.network = nn.ModuleDict({"proj": nn.Linear(D, D), "out": nn.Linear(D, D)})
            self.decoder = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.BatchNorm1d(D))
        self.path, self.event_shape, self.name = steer.Linear(), (D,), "parts"
        self.condition = torch.zeros(1, D)
        self.eval()

    def velocity(self, x, t):
        return self.network["out"](torch.tanh(self.network["proj"](x) + self.condition))

    def jump(self, x, s, t):
        return x + (t - s) * self.velocity(x, s)

    def given(self, prompts):
        bound = copy.copy(self)
        bound._modules = dict(self._modules)
        lengths = torch.tensor([[len(p), p.count("a")] for p in prompts], dtype=torch.float32)
        bound.condition = self.text["proj"](lengths)
        return bound

    def decode(self, x):
        return self.decoder(x)

    def encode(self, images):
        return self.decoder[0](images)


class Said(Parts):
    @property
    def denoiser(self):
        return self.network


X = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
LAYERS = {"network.proj", "network.out"}


def adapted_layers(tuned):
    return {name.split(".lora_")[0] for name in tuned.adapters()}


def drawn(flow):
    bound = flow.given(["a cat"])
    with torch.no_grad():
        return [bound.decode(bound.jump(X, 0.0, 1.0)), bound.encode(X), bound.velocity(X, 0.3)]


def tuning(tuned, steps=20):
    own = list(tuned.adapters().values())
    for p in own:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(own, 1e-2)
    for _ in range(steps):
        bound = tuned.given(["a cat"])
        loss = -bound.decode(bound.jump(X, 0.0, 1.0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuned


@pytest.mark.parametrize("kind", [Said, Parts], ids=["said", "seen"])
@pytest.mark.parametrize("wanted", [None, ["proj", "out"]], ids=str)
def test_the_base_draws_its_own_pictures_after_tuning(kind, wanted):
    flow, untouched = kind(), drawn(kind())
    weights = {n: p.clone() for n, p in flow.state_dict().items()}
    tuned = adapt(flow, rank=2, targets=wanted)
    assert adapted_layers(tuned) == LAYERS
    tuning(tuned.train()).eval()
    for view in (flow, tuned.base, tuned.at(0.0), tuned.base.given(["b"])):
        for a, b in zip(drawn(view), untouched, strict=True):
            assert torch.equal(a, b)
    moved = drawn(tuned)
    assert float((moved[0] - untouched[0]).abs().max()) > 0.1
    assert torch.equal(moved[1], untouched[1])  # encode has no adapters
    assert all(torch.equal(p, weights[n]) for n, p in flow.state_dict().items())


def test_what_is_beside_is_one_object_and_left_as_it_is():
    flow = Said()
    modes = [m.training for m in flow.modules()]
    tuned = adapt(flow, rank=2)
    assert tuned.flow.decoder is flow.decoder
    assert tuned.flow.text is flow.text
    assert tuned.flow.network is not flow.network
    tuning(tuned.train())
    assert [m.training for m in flow.modules()] == modes
    assert tuned.flow.network.training
    assert all(p.requires_grad and p.grad is None for p in flow.parameters())
    assert merged(tuned).decoder is flow.decoder


def test_what_is_not_registered_is_not_copied_either():
    class Hidden(Said):
        def __init__(self):
            super().__init__()
            self.pipe = type("Pipe", (), {})()
            self.pipe.vae, self._frozen = nn.Linear(2, 2), [nn.Linear(3, 3)]
            self.pipe.transformer = self.network

    flow = Hidden()
    tuned = adapt(flow)
    assert tuned.flow.pipe.vae is flow.pipe.vae
    assert tuned.flow._frozen[0] is flow._frozen[0]
    assert tuned.flow.pipe.transformer is tuned.flow.network is not flow.network


def test_moves_are_one_for_what_is_beside_and_rejoin_brings_it_back():
    flow = Said()
    tuned = adapt(flow)
    tuned.to(torch.float64)
    assert flow.network["proj"].weight.dtype == torch.float32
    assert flow.decoder[0].weight.dtype == torch.float64
    flow = Said()
    tuned = adapt(flow)
    for p in tuned.flow.network.parameters():  # as a trainer does that takes it to the CPU
        p.data = p.data.clone()
    rejoin(tuned, flow)
    own = dict(flow.named_parameters())
    for name, p in tuned.flow.named_parameters():
        if ".lora_" not in name:
            assert p.data_ptr() == own[name.replace("base_layer.", "")].data_ptr()


def test_a_denoiser_by_its_name_and_one_that_is_none():
    class Named(FlowMap):
        def __init__(self):
            super().__init__()
            self.path, self.event_shape = steer.Linear(), (D,)
            self.denoiser, self.decoder = nn.Linear(D, D), nn.Linear(D, D)

        def velocity(self, x, t):
            return self.denoiser(x)

        def jump(self, x, s, t):
            return x + (t - s) * self.velocity(x, s)

    assert adapted_layers(adapt(Named())) == {"denoiser"}

    class Elsewhere(Said):
        @property
        def denoiser(self):
            return nn.Linear(2, 2)

    with pytest.raises(
        ValueError, match=r"denoiser of Elsewhere is not a submodule .*self\.network"
    ):
        adapt(Elsewhere())


def test_a_flow_that_cannot_be_asked_has_adapters_everywhere_and_its_base_is_exact():
    class Shy(Parts):
        def velocity(self, x, t):
            if len(x) == 1:
                raise RuntimeError("no single rows")
            return super().velocity(x, t)

    flow = Shy()
    tuned = tuning(adapt(flow, rank=2))
    assert adapted_layers(tuned) == LAYERS | {"text.proj", "decoder.0"}
    for a, b in zip(drawn(tuned.base), drawn(flow), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tuned.decode(X), flow.decode(X))  # always without


def test_asking_changes_nothing():
    flow = Parts().train()
    state = torch.get_rng_state()
    before = copy.deepcopy(flow.state_dict())
    targets(flow)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in flow.modules())
    assert all(torch.equal(p, before[n]) for n, p in flow.state_dict().items())


def test_targets_beside_the_denoiser_are_refused():
    with pytest.raises(ValueError, match=r"of Said's denoiser is named 'decoder\.0': there"):
        adapt(Said(), targets=["decoder.0"])


def test_files_name_layers_of_the_denoiser_only(tmp_path):
    from peft import LoraConfig, get_peft_model

    tuned = tuning(adapt(Said(), rank=2, targets=["proj"]))
    save_adapters(tuned, tmp_path)
    loaded = load_adapters(Said(), tmp_path)
    assert adapted_layers(loaded) == {"network.proj"}
    for a, b in zip(drawn(loaded), drawn(tuned), strict=True):
        assert torch.equal(a, b)
    theirs = get_peft_model(Said(), LoraConfig(r=2, target_modules=["proj"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 belong to layers that its denoiser does not have"):
        load_adapters(Said(), tmp_path, check=False)


def test_copies_of_a_tuned_flow_are_whole():
    tuned = tuning(adapt(Said(), rank=2))
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        for a, b in zip(drawn(other), drawn(tuned), strict=True):
            assert torch.equal(a, b)
        assert other.switch is not tuned.switch
        assert other.switch.shared[0] is other.flow.text
        for p in other.adapters().values():
            p.data += 1
        assert torch.equal(drawn(other.base)[0], drawn(tuned.base)[0])


def test_the_embedded_model_has_adapters_where_it_always_had():
    flow = steer.load("emoji")
    kinds = (nn.Linear, nn.Conv2d)
    found = targets(flow)
    assert set(found.names) == {n for n, m in flow.named_modules() if isinstance(m, kinds)}
    assert (found.left_out, found.beside) == ({}, ())
    assert len(found.names) == 60
