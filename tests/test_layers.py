"""Which layers have adapters, and what adding them to the weights gives: the view, or an error."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import steer
from steer.adapters.inject import adapt
from steer.adapters.merge import merged
from steer.adapters.targets import GROUPED, PROJECTIONS, targets
from steer.flow import FlowMap

X = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))


class On(FlowMap):
    """A flow of any network on events (4, 6)."""

    def __init__(self, network):
        super().__init__()
        self.network, self.path, self.event_shape = network, steer.Linear(), (4, 6)
        self.eval()

    def velocity(self, x, t):
        return self.network(x)

    def jump(self, x, s, t):
        return x + (t - s) * self.velocity(x, s)


def on(*layers, seed=0):
    torch.manual_seed(seed)
    return On(nn.Sequential(*(make() for make in layers)))


def linear():
    return nn.Linear(6, 6)


def trained(flow, targets=None, rank=2):
    tuned = adapt(flow, rank=rank, targets=targets)
    generator = torch.Generator().manual_seed(3)
    for p in tuned.adapters().values():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return tuned


def names(tuned):
    return sorted({n.split(".lora_")[0].removeprefix("network.") for n in tuned.adapters()})


def same_as_the_view(tuned, scale=1.0):
    view = tuned.at(scale)
    plain = merged(view)
    expected = view.velocity(X, 0.5)
    torch.testing.assert_close(plain.velocity(X, 0.5), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - tuned.base.velocity(X, 0.5)).abs().max()) > 0.05
    assert torch.equal(tuned.base.velocity(X, 0.5), merged(tuned.base).velocity(X, 0.5))
    return plain


# ------------------------------------------------------------------ merging


def test_weight_norm_is_written_through():
    flow = on(lambda: parametrizations.weight_norm(linear()), nn.Tanh, linear)
    before = flow.velocity(X, 0.5)
    tuned = trained(flow)
    plain = same_as_the_view(tuned, 0.7)
    assert plain.state_dict().keys() == flow.state_dict().keys()
    assert torch.equal(flow.velocity(X, 0.5), before)


@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ],
    ids=["spectral", "orthogonal", "older spectral", "older weight"],
)
def test_what_computes_a_weight_in_another_way_is_refused(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flow = on(lambda: norm(linear()), linear)
        before = flow.velocity(X, 0.5)
        tuned = trained(flow)
    assert torch.equal(tuned.base.velocity(X, 0.5), before)
    assert float((tuned.velocity(X, 0.5) - before).abs().max()) > 0.05
    with pytest.raises(ValueError, match=r"weights of network\.0 are computed.*remove_parametriz"):
        merged(tuned)
    assert torch.equal(flow.velocity(X, 0.5), before)


def test_after_the_norm_is_taken_off_it_merges():
    flow = on(lambda: parametrizations.spectral_norm(linear()), linear)
    nn.utils.parametrize.remove_parametrizations(flow.network[0], "weight")
    same_as_the_view(trained(flow))


def test_layers_that_share_a_weight_are_parted():
    flow = on(linear, nn.Tanh, linear)
    flow.network[2].weight = flow.network[0].weight
    plain = same_as_the_view(trained(flow))
    assert plain.network[0].weight is not plain.network[2].weight
    assert flow.network[2].weight is flow.network[0].weight


def test_a_layer_at_two_places_is_parted():
    shared = linear()
    network = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Tanh()))
    tuned = trained(On(network))
    assert names(tuned) == ["0"]  # the first place, as peft does
    plain = same_as_the_view(tuned)
    assert plain.network[0] is not plain.network[2][0]
    assert torch.equal(plain.network[2][0].weight, shared.weight)


def test_a_block_at_two_places_stays_one():
    block = nn.Sequential(linear(), nn.Tanh())
    plain = same_as_the_view(trained(On(nn.Sequential(block, block))))
    assert plain.network[0] is plain.network[1]


def test_convolutions_merge():
    layers = (lambda: nn.Conv1d(4, 4, 3, padding=1), nn.Tanh, lambda: nn.Conv1d(4, 4, 1))
    same_as_the_view(trained(on(*layers)), 0.3)


def test_half_weights_are_rounded_once():
    flow = on(linear).to(torch.bfloat16)
    tuned = trained(flow)
    a, b = (p.detach() for p in tuned.adapters().values())
    exact = flow.network[0].weight.float() + 0.7 * (b @ a) * 2
    assert torch.equal(merged(tuned.at(0.7)).network[0].weight, exact.to(torch.bfloat16))


# ------------------------------------------------------------------ what is left out


def grouped(groups):
    return lambda: nn.Conv1d(4, 4, 3, padding=1, groups=groups)


def test_grouped_convolutions_are_left_out_and_said():
    flow = on(grouped(4), nn.Tanh, grouped(2), linear)
    with pytest.warns(UserWarning, match=r"without adapters: 2 grouped convolutions.* names them"):
        tuned = trained(flow)
    assert names(tuned) == ["3"]
    assert targets(flow).left_out == {GROUPED: ("network.0", "network.2")}
    same_as_the_view(tuned)


def test_a_grouped_convolution_that_is_asked_for_can_be_tuned_and_not_merged():
    tuned = trained(on(grouped(4), linear), targets=["0"], rank=4)
    assert names(tuned) == ["0"]
    assert float((tuned.velocity(X, 0) - tuned.base.velocity(X, 0)).abs().max()) > 0.05
    with pytest.raises(ValueError, match=r"network\.0 is a grouped convolution.*Keep the a"):
        merged(tuned)
    merged(tuned.base)
    with pytest.raises(ValueError, match=r"network\.0 of On .* of rank 2.*multiple of its groups"):
        adapt(on(grouped(4), linear), rank=2, targets=["0"])


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out_proj = nn.Linear(6, 6)

    def forward(self, x):
        return self.out_proj(self.attention(x, x, x, need_weights=False)[0])


def test_projections_of_attention_are_left_out_and_said():
    torch.manual_seed(0)
    flow = On(Attends())
    with pytest.warns(UserWarning, match=r"without adapters: 1 projections of nn\.Multihead"):
        tuned = trained(flow)
    assert names(tuned) == ["out_proj"]
    assert targets(flow).left_out == {PROJECTIONS: ("network.attention.out_proj",)}
    with pytest.raises(ValueError, match=r"projections of nn.*leave 'attention\.out_proj'"):
        adapt(flow, targets=["attention.out_proj"])
    assert names(trained(flow, targets=["out_proj"])) == ["out_proj"]


@pytest.mark.parametrize("grad", [True, False])
def test_a_transformers_fast_kernel_sees_the_adapters(grad):
    """In evaluation without gradients torch reads the weights alone, and leaves adapters out."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flow = On(nn.TransformerEncoder(block, 2)).requires_grad_(False)
        tuned = trained(flow)
    assert "layers.0.linear1" in names(tuned)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            merged(tuned).velocity(X, 0), tuned.velocity(X, 0), rtol=1e-4, atol=1e-5
        )
        assert float((tuned.velocity(X, 0) - flow.velocity(X, 0)).abs().max()) > 0.05
        assert torch.equal(tuned.base.velocity(X, 0), flow.velocity(X, 0))


def test_every_default_adapter_gets_a_gradient():
    torch.manual_seed(0)
    layers = (grouped(4), Attends, lambda: parametrizations.weight_norm(linear()), linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = trained(on(*layers))
    for p in tuned.adapters().values():
        p.requires_grad_(True)
    tuned.velocity(X, 0).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in tuned.adapters().values())
