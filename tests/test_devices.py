"""Attention kernels: cuDNN's backward pass is kept out of gradients, and the setting put back."""

import threading
from contextlib import contextmanager

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import rewards
import steer
from recipes.train import train
from rewards.serving.application import app
from rewards.serving.remote import Remote
from steer.devices import differentiating
from steer.guidance.posterior import PosteriorValue
from steer.reward.terms import term_gradients
from tests.test_serving import running
from tests.test_train import TINY
from tests.test_tuning import tiny


def cudnn():
    return torch.backends.cuda.cudnn_sdp_enabled()


def watched(seen):
    """A reward that notes, when asked with gradients, whether cuDNN's attention may be taken."""

    def red(images):
        if torch.is_grad_enabled() and images.requires_grad:
            seen.append(cudnn())
        return images[:, 0].mean((1, 2))

    return red


@pytest.mark.parametrize("chosen", [True, False])
def test_the_users_choice_is_put_back(chosen):
    before = cudnn()
    torch.backends.cuda.enable_cudnn_sdp(chosen)
    try:
        with torch.no_grad():
            with differentiating():
                assert torch.is_grad_enabled()
                assert not cudnn()
            assert cudnn() == chosen
            with pytest.raises(ZeroDivisionError), differentiating():
                _ = 1 / 0
            assert not torch.is_grad_enabled()
        assert cudnn() == chosen
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_threads_that_leave_in_any_order_put_it_back():
    before, first, second = cudnn(), differentiating(), differentiating()
    first.__enter__()
    other = threading.Thread(target=second.__enter__)
    other.start()
    other.join()
    first.__exit__(None, None, None)
    assert not cudnn(), "the other thread is still at it"
    other = threading.Thread(target=second.__exit__, args=(None, None, None))
    other.start()
    other.join()
    assert cudnn() == before


@pytest.mark.parametrize("method", ["fmtt", "fmrg-j", "fmrg-e", "reno", "dps", "tds"])
def test_guidance_keeps_it_out(method):
    seen, before = [], cudnn()
    for _ in steer.stream(
        steer.load("emoji"), watched(seen), ["a fox"], particles=2, steps=3, method=method,
        temperature=0.1 if method in ("fmtt", "tds") else None,
    ):  # fmt: skip
        assert cudnn() == before, "a person's own code between steps has his own choice"
    assert seen
    assert not any(seen)


@contextmanager
def passes(seen):
    """Note of each pass of a module with gradients whether cuDNN's attention may be taken."""

    def note(module, inputs):
        if torch.is_grad_enabled():
            seen.append(cudnn())

    hook = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("objective", steer.OBJECTIVES)
def test_tuning_keeps_it_out(objective):
    """Of the network's passes, and of the reward's where it has a gradient."""
    seen, before = [], cudnn()
    with passes(seen):
        steer.finetune(
            tiny(), watched(seen), ["cat", "fox"], objective=objective, steps=1, batch_size=8,
            rank=2, temperature=0.1, progress=False, sweep=[], check_every=0, warm=0,
        )  # fmt: skip
    assert seen
    assert not any(seen)
    assert cudnn() == before


def test_training_keeps_it_out(tmp_path):
    seen, before = [], cudnn()
    with passes(seen):
        train(tmp_path, stages=["velocity"], **{**TINY, "velocity_steps": 1})
    assert seen
    assert not any(seen)
    assert cudnn() == before


def test_a_served_gradient_keeps_it_out():
    seen = []
    with running(app(rewards.wrap(watched(seen)))) as url:
        x = torch.rand(2, 3, 8, 8, requires_grad=True)
        Remote(url)(x).sum().backward()
    assert seen
    assert not any(seen)


def test_a_gradient_through_posterior_samples_keeps_it_out():
    seen, mixture = [], steer.GaussianMixture([[-1.0, 0.5], [1.0, -0.5]], 0.3)

    def reward(images):
        seen.append(cudnn())
        return images.sum(1)

    potential = PosteriorValue(
        mixture, reward, None, 1.0, steer.Glass(mixture, steps=2), draws=2, gradient="through"
    )
    potential.evaluate(torch.randn(3, 2), 0.4, derivatives=True)
    assert seen
    assert not any(seen)


def test_the_gradients_of_a_rewards_terms_keep_it_out():
    seen = []
    term_gradients(rewards.wrap(watched(seen)), torch.rand(2, 3, 8, 8))
    assert seen
    assert not any(seen)
