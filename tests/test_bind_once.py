"""Prompts are bound, and texts encoded, once: a prompt group, a micro-batch, a check's draw."""

import copy
import pickle

import pytest
import torch

import steer
from steer.adapters.inject import adapt
from steer.models.two_time import NetworkFlow, TwoTimeUNet
from steer.objectives.table import TABLE, build
from steer.reward import wrap
from steer.sampling.calibrate import learn, spread
from steer.tuning.module import RewardTuning
from steer.tuning.panel import Panel
from steer.tuning.prompts import Prompts

PROMPTS = ["cat", "red fox", "blue dog", "owl"]


def reward(images):
    return torch.tanh(images).mean((1, 2, 3))


class Bound(NetworkFlow):
    """Counts what is bound, and what its text side encodes."""

    def __init__(self, network):
        super().__init__(network)
        self.given_calls, self.encodings = [], []
        network.text.register_forward_hook(lambda *_: self.encodings.append(1))

    def given(self, prompts):
        self.given_calls.append(list(prompts))
        return super().given(prompts)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = TwoTimeUNet(
            ["cat", "red", "fox", "blue", "dog", "owl"], [8, 8], [1, 1], size=8, width=16, groups=2
        )
        for p in made.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return made.eval().requires_grad_(False)


@pytest.fixture
def flow():
    return Bound(network())


@pytest.mark.parametrize("method", ["none", "fmtt", "split", "fmrg-j", "reno"])
def test_a_sample_binds_and_encodes_once_a_group(flow, method):
    heat = {"strength": 2.0} if method in {"fmtt", "split"} else {}
    steer.sample(flow, reward, PROMPTS, 4, 16, method, batch_size=8, **heat)  # two groups
    assert flow.given_calls == [PROMPTS[:2], PROMPTS[2:]]
    assert len(flow.encodings) == 2


def test_probes_bind_and_encode_once_a_group(flow):
    spread(flow, wrap(reward), PROMPTS, batch_size=16)  # 8 of each prompt
    assert flow.given_calls == [PROMPTS[:2], PROMPTS[2:]]
    assert len(flow.encodings) == 2
    assert learn(flow, wrap(reward), PROMPTS) == 0
    assert len(flow.given_calls) == 2


def tuning(flow, objective="direct", targets=None):
    tuned = adapt(flow, 2, targets=targets)
    module = RewardTuning(
        tuned, build(objective), wrap(reward), Prompts(PROMPTS), steps=4, batch_size=8,
        micro_batch=8, temperature=0.1,
    )  # fmt: skip
    return tuned, module


@pytest.mark.parametrize("objective", TABLE)
def test_a_micro_batch_binds_once(flow, objective):
    """`amortise` samples by itself besides, each prompt once a round."""
    tuned, module = tuning(flow, objective)
    given = tuned.flow.given_calls
    batch = module.batch(0, 0, 8)
    module.objective(batch)
    bound, *own = given
    assert bound == batch.prompts
    assert own == ([[name] for name in batch.prompts] if objective == "amortise" else [])


@pytest.mark.parametrize("objective", ["direct", "nft"])
def test_a_micro_batch_encodes_once_where_no_adapter_sits_on_the_text(flow, objective):
    convolutions = ["conv1", "conv2"]
    _, module = tuning(flow, objective, convolutions)
    module.objective(module.batch(0, 0, 8))["loss"].backward()
    assert len(flow.encodings) == 1


def test_checks_bind_once_a_draw(flow):
    tuned, _ = tuning(flow)
    panel = Panel(tuned, PROMPTS, 2, wrap(reward))
    given = tuned.flow.given_calls
    panel.read(1.0, 4, drift=True)
    assert given == [PROMPTS] * 3  # the base's pictures, the tuned ones, the drift


# ------------------------------------------------------------------ what is kept is what it was


def test_adapters_on_the_text_side_count_at_every_scale(flow):
    """Kept for the base alone: each view gives what a flow that keeps nothing gives."""
    tuned = adapt(flow, 2, targets=["text.mlp.0", "conv1"])
    with torch.no_grad():
        for k, p in enumerate(tuned.adapters().values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    bound = tuned.given(PROMPTS[:2])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    plain = {scale: tuned.at(scale).given(PROMPTS[:2]).jump(x, 0.0, 1.0) for scale in (0, 0.5, 1)}
    for scale in (0, 1, 0, 0.5, 1, 0):
        assert torch.equal(bound.at(scale).jump(x, 0.0, 1.0), plain[scale])
    assert not torch.equal(plain[0], plain[1])
    text = [p for n, p in tuned.adapters().items() if ".text." in n]
    for p in text:
        p.requires_grad_(True)
    grads = torch.autograd.grad(bound.jump(x, 0.0, 1.0).square().sum(), text)
    assert all(bool(g.abs().sum() > 0) for g in grads)


def test_a_tuned_text_side_is_encoded_once_a_scale_and_state_of_its_adapters(flow):
    tuned = adapt(flow, 2, targets=["text.mlp.0", "conv1"])
    for p in tuned.adapters().values():
        p.requires_grad_(True)
    encodings = flow.encodings
    with torch.no_grad():
        for k, p in enumerate(tuned.adapters().values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    bound = tuned.given(PROMPTS[:2])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))

    def same(view):
        """Encode anew what the bound flow may have kept."""
        return torch.equal(view.jump(x, 0.0, 1.0), view.given(PROMPTS[:2]).jump(x, 0.0, 1.0))

    encodings.clear()
    with torch.no_grad():
        for _ in range(3):
            bound.jump(x, 0.0, 1.0)
        assert len(encodings) == 1
        bound.at(0.5).jump(x, 0.0, 1.0)
        assert len(encodings) == 2
        assert same(bound)
        assert same(bound.at(0.5))
    text = [p for n, p in tuned.adapters().items() if ".text." in n]
    optimizer = torch.optim.AdamW(text, lr=0.1)
    for _ in range(2):  # a gradient is asked: each call encodes, and the next one sees the step
        encodings.clear()
        bound.jump(x, 0.0, 1.0).square().sum().backward()
        assert len(encodings) == 1
        assert all(bool(p.grad.abs().sum() > 0) for p in text)
        before = bound.jump(x, 0.0, 1.0)
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(bound.jump(x, 0.0, 1.0), before)
            assert same(bound)
    layer = next(m for m in tuned.layers if isinstance(m.base_layer, torch.nn.Linear))
    layer.lora_dropout[tuned.adapter] = torch.nn.Dropout(0.5)
    encodings.clear()
    with torch.no_grad():
        tuned.train()
        draws = [bound.jump(x, 0.0, 1.0) for _ in range(2)]
    assert len(encodings) == 2
    assert not torch.equal(*draws)


def change_in_place(bound):
    with torch.no_grad():
        bound.network.text.norm.bias.add_(1.0)


def change_tensor(bound):
    bias = bound.network.text.norm.bias
    bias.data = bias.data + 1.0


def load_state(bound):
    state = {k: v + 1.0 for k, v in bound.network.text.state_dict().items()}
    bound.network.text.load_state_dict(state)


@pytest.mark.parametrize("change", [change_in_place, change_tensor, load_state])
def test_changed_weights_are_encoded_again(flow, change):
    bound = flow.given(PROMPTS[:2])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    before = bound.jump(x, 0.0, 1.0)
    assert torch.equal(bound.jump(x, 0.5, 1.0), flow.given(PROMPTS[:2]).jump(x, 0.5, 1.0))
    change(bound)
    after = bound.jump(x, 0.0, 1.0)
    assert torch.equal(after, flow.given(PROMPTS[:2]).jump(x, 0.0, 1.0))
    assert not torch.equal(after, before)


def test_a_text_side_that_learns_is_encoded_each_time(flow):
    flow.requires_grad_(True)
    bound = flow.given(PROMPTS[:2])
    x = torch.zeros(2, 3, 8, 8)
    for _ in range(2):
        bound.jump(x, 0.0, 1.0).sum().backward()
    assert len(flow.encodings) == 2
    assert bool(flow.network.text.norm.bias.grad.abs().sum() > 0)


def test_states_of_torch_and_copies_keep_to_themselves(flow):
    bound = NetworkFlow(network()).given(PROMPTS[:2])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    plain = bound.jump(x, 0.0, 1.0)
    other = NetworkFlow(network()).given(PROMPTS[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other.jump(x, 0.0, 1.0)
    with torch.inference_mode():
        other.jump(x, 0.0, 1.0)
    y = x.clone().requires_grad_()
    other.jump(y, 0.0, 1.0).sum().backward()  # an inference tensor could not be saved
    assert torch.equal(other.jump(x, 0.0, 1.0), plain)
    for made in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert torch.equal(made.jump(x, 0.0, 1.0), plain)
    single = bound.double().float()  # other tensors of the same kind
    assert torch.equal(single.jump(x, 0.0, 1.0), plain)


def test_the_embedded_network_knows_no_default_dtype():
    flow = NetworkFlow(network()).given(PROMPTS[:2])
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    plain = flow.jump(x, 0.1, 0.9)
    try:
        torch.set_default_dtype(torch.float64)
        found = flow.jump(x, 0.1, 0.9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
