"""Quantised bases: what has right gradients is taken, what has partial ones is refused."""

import importlib.util

import pytest
import torch
from torch import nn

import steer
from steer.adapters.inject import adapt
from steer.backends.quantised import is_quantised, unsound
from tests import tiny_pipelines as tiny
from tests.test_compile import pipeline
from tests.test_tuning import tune

BF16 = torch.bfloat16


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


def inside(name):
    """Linear layers of the blocks; those at the ends stay as they are, as diffusers does it."""
    return "blocks" in name


def torchao(config, every=False):
    import torchao.quantization as ao

    pipe = tiny.build("flux")
    pipe.transformer.requires_grad_(False).to(BF16)
    ao.quantize_(
        pipe.transformer, getattr(ao, config)(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and (every or inside(name)),
    )  # fmt: skip
    return pipe


def gguf(kind):
    import gguf as package
    from diffusers.quantizers.gguf import utils

    pipe = tiny.build("flux")
    network = pipe.transformer.requires_grad_(False)
    weights = {name: p.clone() for name, p in network.state_dict().items()}
    network.to(BF16)
    kind = package.GGMLQuantizationType[kind]

    def packed(p):
        return utils.GGUFParameter(
            torch.from_numpy(package.quantize(p.numpy(), kind)), quant_type=kind
        )

    chosen = {n: packed(p) for n, p in weights.items() if p.ndim == 2 and inside(n)
              and p.shape[1] % 32 == 0}  # fmt: skip
    utils._replace_with_gguf_linear(network, BF16, chosen)
    for name, layer in network.named_modules():
        if isinstance(layer, utils.GGUFLinear):
            layer.weight = packed(weights[f"{name}.weight"])
            if layer.bias is not None:
                layer.bias = nn.Parameter(weights[f"{name}.bias"].to(BF16), requires_grad=False)
    return pipe


def bright(images):
    return images.mean((1, 2, 3))


def seen(pipe):
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    call = dict(tiny.CALLS["flux"])
    return steer.load(pipe, height=call.pop("height"), width=call.pop("width"), call=call)


@torch.no_grad()
def dequantised(flow, dtype):
    """The same flow with ordinary weights in the place of each layer's, read off the layer."""
    network = flow.denoiser
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and is_quantised(layer.weight):
            zero = torch.zeros(1, layer.in_features, dtype=BF16)
            shift = layer(zero).float()
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight.copy_((layer(torch.eye(layer.in_features, dtype=BF16)).float() - shift).T)
            if plain.bias is not None:
                plain.bias.copy_(shift[0])
            network.set_submodule(name, plain.requires_grad_(False))
    network.to(dtype)
    return flow


def gradient(flow, x):
    leaf = x.clone().requires_grad_()
    y = flow.given(["a fox"]).jump(leaf, 0.3, 1.0)
    way = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((y * way).sum(), leaf)[0]


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


RIGHT = [
    pytest.param(lambda: torchao("Int8WeightOnlyConfig"), id="int8", marks=needs("torchao")),
    pytest.param(lambda: torchao("Float8WeightOnlyConfig"), id="fp8", marks=needs("torchao")),
    pytest.param(lambda: gguf("Q8_0"), id="Q8_0", marks=needs("gguf")),
    pytest.param(lambda: gguf("Q4_0"), id="Q4_0", marks=needs("gguf")),
]


@pytest.mark.parametrize("made", RIGHT)
def test_gradients_are_those_of_the_weights_that_it_stands_for(made):
    """Of the input, and with adapters: in float32, all with a gradient; off they are not there."""
    flow = seen(made())
    plain, coarse = (dequantised(seen(made()), dtype) for dtype in (torch.float32, BF16))
    assert sum(is_quantised(p) for p in flow.denoiser.parameters()) > 5
    assert not any(is_quantised(p) for p in plain.denoiser.parameters())
    assert "gradient" not in flow.lacks
    x = torch.randn(2, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    wanted, found = gradient(plain, x), gradient(flow, x)
    rounding = off(gradient(coarse, x), wanted)
    assert off(found, wanted) < 1.5 * rounding < 0.15
    tuned = adapt(flow, 2)
    assert torch.equal(gradient(tuned, x), found)
    adapters = list(tuned.adapters().values())
    assert {p.dtype for p in adapters} == {torch.float32}
    for k, p in enumerate(adapters):
        p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
        p.requires_grad_(True)
    y = tuned.given(["a"]).jump(x, 0.3, 1.0)
    assert all(float(g.norm()) > 0 for g in torch.autograd.grad(y.square().sum(), adapters))
    assert torch.equal(gradient(tuned.base, x), found)


@needs("torchao")
def test_activations_that_are_quantised_are_refused():
    """Without an error six of fourteen adapters would get none, and the input a wrong one."""
    flow = seen(torchao("Int8DynamicActivationInt8WeightConfig"))
    assert "the denoiser's layer transformer_blocks.0" in flow.lacks["gradient"]
    assert "Quantise the weights alone" in flow.lacks["gradient"]
    with pytest.raises(ValueError, match="Quantise the weights alone"):
        steer.sample(flow, bright, ["a"], particles=1, steps=1, method="fmrg-j")
    with pytest.raises(ValueError, match="tuning takes gradients through the model"):
        tune(flow)
    drawn = steer.sample(flow, bright, ["a"], particles=2, steps=1, method="best-of-n")
    assert drawn.images.isfinite().all()  # what needs no gradient works


def test_a_layer_whose_gradient_is_another_is_found():
    class Weight(nn.Parameter):
        pass

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    class Partial(nn.Linear):
        def forward(self, x):
            return super().forward(Half.apply(x))

    network = nn.Sequential(nn.Linear(4, 4), Partial(4, 4))
    assert unsound(network) == ""
    network[1].weight = Weight(network[1].weight.detach())
    assert "has a gradient that is 50% off" in unsound(network)
    network[1] = nn.Conv1d(4, 4, 1)
    network[1].weight = Weight(network[1].weight.detach())
    assert "is a Conv1d" in unsound(network)


def test_casting_of_norms_and_convolutions_is_refused():
    pipe = tiny.build("sdxl")
    pipe.unet.to(BF16).enable_layerwise_casting(torch.float8_e4m3fn, BF16)
    assert "enable_layerwise_casting" in unsound(pipe.unet)
    assert unsound(tiny.build("sdxl").unet) == ""
    assert unsound(pipeline("flux").denoiser) == ""
