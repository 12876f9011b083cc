"""Attention kernels: cuDNN's backward pass is kept out of gradients, and the setting put back."""

import threading

import pytest
import torch

import rewards
import steer
from steer.devices import differentiating
from steer.reward.terms import term_gradients
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


@pytest.mark.parametrize("objective", steer.OBJECTIVES)
def test_tuning_keeps_it_out(objective):
    seen, before = [], cudnn()
    steer.finetune(
        tiny(), watched(seen), ["a", "b"], objective=objective, steps=1, batch_size=8, rank=2,
        temperature=0.1, progress=False, sweep=[], check_every=0, warm=0,
    )  # fmt: skip
    assert not any(seen)
    assert cudnn() == before


def test_the_gradients_of_a_rewards_terms_keep_it_out():
    seen = []
    term_gradients(rewards.wrap(watched(seen)), torch.rand(2, 3, 8, 8))
    assert seen
    assert not any(seen)
