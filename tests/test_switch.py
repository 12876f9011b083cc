"""Views of one tuned flow share layers: calls from several threads keep their own scale."""

import copy
import io
import pickle
import threading

import pytest
import torch

from tests.test_lora import adapt, network, noise, train

X = noise()


def expected(tuned, scales):
    with torch.no_grad():
        return {scale: tuned.at(scale).jump(X, 0.0, 1.0) for scale in scales}


def in_threads(work, count=4):
    errors = []

    def run(i):
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads), "they wait for each other"
    if errors:
        raise errors[0]


def test_threads_keep_their_own_scale():
    tuned = train(adapt(network()))
    scales = [0.0, 0.3, 0.7, 1.0]
    right = expected(tuned, scales)

    def work(i):
        view = tuned.at(scales[i]).given([""])
        for _ in range(20):
            with torch.no_grad():
                assert torch.equal(view.jump(X, 0.0, 1.0), right[scales[i]])
                view.decode(X)

    in_threads(work)


def test_threads_that_recompute_in_the_backward_pass():
    tuned = train(adapt(network()))
    for p in tuned.adapters().values():
        p.requires_grad_(True)
    scales = [0.3, 0.6, 0.9]

    def gradient(scale, again):
        view = tuned.at(scale)
        view.checkpoint = again
        x = X.clone().requires_grad_(True)
        own = list(tuned.adapters().values())
        y = view.jump(x, 0.0, 0.5) + view.base.velocity(x, 0.5)
        return torch.autograd.grad(view.jump(y, 0.5, 1.0).square().mean(), [x, *own])

    right = {scale: gradient(scale, False) for scale in scales}

    def work(i):
        for _ in range(5):
            for a, b in zip(gradient(scales[i], True), right[scales[i]], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)

    in_threads(work, 3)


def test_the_views_of_a_flow_share_one_switch_and_copies_have_their_own():
    tuned = train(adapt(network()))
    views = [tuned.at(0.5), tuned.base, tuned.given(["apple"]), copy.copy(tuned)]
    assert all(view.switch is tuned.switch for view in views)
    file = io.BytesIO()
    torch.save(tuned, file)
    file.seek(0)
    copies = [
        copy.deepcopy(tuned),
        pickle.loads(pickle.dumps(tuned)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert other.switch is not tuned.switch
        own = {id(m) for m in other.modules()}
        assert all(id(layer) in own for layer in other.layers)
        with tuned.switch.hold():  # does not stop the copy
            in_threads(lambda i, other=other: other.jump(X, 0.0, 1.0), 1)
        assert torch.equal(other.jump(X, 0.0, 1.0), tuned.jump(X, 0.0, 1.0))


def test_views_that_are_copied_together_share_their_switch():
    tuned = train(adapt(network()))
    for a, b in (
        copy.deepcopy((tuned, tuned.base)),
        pickle.loads(pickle.dumps((tuned, tuned.base))),
    ):
        assert a.switch is b.switch
        assert a.layers[0] is b.layers[0]


def test_an_error_lets_the_others_go_on():
    tuned = train(adapt(network()))
    with pytest.raises(RuntimeError):
        tuned.jump(torch.zeros(1, 5, 8, 8), 0.0, 1.0)
    in_threads(lambda i: tuned.jump(X, 0.0, 1.0), 1)
