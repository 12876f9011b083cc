"""Too little memory for a call: rows are halved, it is said once, pictures stay the same."""

import json
import re
import warnings

import pytest
import torch
from torch import Tensor

import steer
from recipes.cli import main
from steer.batches import Batched, Ceiling, in_batches, in_slices
from steer.flow import Wrapped

MIXTURE = steer.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.5]]), 0.3)


def slope(x: Tensor) -> Tensor:
    return x[:, 0] - x[:, 1].square()


class Tight(steer.Reward):
    """A reward that has memory for `most` rows."""

    pictures = False

    def __init__(self, most):
        super().__init__()
        self.most, self.calls = most, []

    def forward(self, images, prompts=None, metadata=None):
        self.calls.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return slope(images)


class TightDecoder(Wrapped):
    """A flow whose decoder has memory for `most` rows."""

    most = 3

    def decode(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().decode(x)


def sampled(flow, reward, method="fmrg-j", **more):
    more = {"particles": 16, "steps": 4, "method": method, "seed": 3, **more}
    return steer.sample(flow, reward, **more)


@pytest.mark.parametrize(
    "method", ["fmrg-j", "fmtt", "renoise", "split", "reno", "noise-smc", "best-of-n", "das"]
)
def test_the_run_halves_says_so_once_and_draws_the_same(method):
    wanted = sampled(MIXTURE, Tight(10**6), method)
    tight = Tight(4)
    with pytest.warns(UserWarning, match="out of memory at 16 rows a call") as said:
        found = sampled(MIXTURE, tight, method)
    assert len(said) == 1
    assert "continuing with 4" in str(said[0].message)
    assert "batch_size=4" in str(said[0].message)
    torch.testing.assert_close(found.x, wanted.x)
    torch.testing.assert_close(found.rewards, wanted.rewards)
    torch.testing.assert_close(found.log_w, wanted.log_w)
    assert [n for n in tight.calls if n > 4] in ([16, 8], [32, 16, 8]), "remembered for the run"


def test_a_decoder_without_memory_is_the_same():
    wanted = sampled(MIXTURE, slope, "fmtt")
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = sampled(TightDecoder(MIXTURE), slope, "fmtt")
    assert len(said) == 1
    torch.testing.assert_close(found.x, wanted.x)


def test_prompts_keep_their_own_particles():
    """Rows are prompt-major: parts take as many of every prompt."""
    flow = steer.load("emoji")
    options = {"prompts": ["a fox", "a bird"], "particles": 4, "steps": 2, "temperature": 0.1}

    def bright(images):
        return images.mean((1, 2, 3))

    class TightPictures(Tight):
        pictures = True

        def forward(self, images, prompts=None, metadata=None):
            super().forward(images[:, :2, 0, 0])
            return bright(images)

    wanted = sampled(flow, bright, "fmtt", **options)
    with pytest.warns(UserWarning, match="at 8 rows a call: continuing with 2"):
        found = sampled(flow, TightPictures(3), "fmtt", **options)
    torch.testing.assert_close(found.images, wanted.images, atol=1e-4, rtol=1e-4)


def test_a_kernel_that_takes_fewer_elements_is_given_fewer_rows():
    """Nearest upsampling of channels-last tensors counts its elements in 32 bits on CUDA."""

    def kernel(x):
        if len(x) > 2:
            raise RuntimeError("upsample_nearest_nhwc only supports less than INT_MAX elements")
        return x

    with pytest.warns(UserWarning, match="rows"):
        parts = in_batches(kernel, torch.arange(8.0), None)
    assert torch.equal(torch.cat(parts), torch.arange(8.0))

    def broken(x):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_batches(broken, torch.arange(8.0), None)


def test_one_row_that_is_too_much_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        sampled(MIXTURE, Tight(0))


def test_a_temperature_is_set_in_smaller_calls_too():
    wanted = sampled(MIXTURE, Tight(10**6), "renoise", strength=2.0)
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = sampled(MIXTURE, Tight(5), "renoise", strength=2.0)
    assert len(said) == 1
    torch.testing.assert_close(found.temperature, wanted.temperature)
    torch.testing.assert_close(found.x, wanted.x)


def test_enough_memory_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tight = Tight(16)
        sampled(MIXTURE, tight, "fmtt", temperature=1.0)
    assert max(tight.calls) == 16


def test_a_ceiling_is_of_its_run_alone():
    with pytest.warns(UserWarning, match="out of memory"):
        sampled(MIXTURE, Tight(4))
    tight = Tight(16)
    sampled(MIXTURE, tight)
    assert max(tight.calls) == 16


def test_several_calls_in_one_run_remember():
    tight, ceiling = Tight(4), Ceiling()
    with ceiling.held():
        with pytest.warns(UserWarning, match="out of memory"):
            sampled(MIXTURE, tight)
        before = len(tight.calls)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampled(MIXTURE, tight)
    assert ceiling.rows == 4
    assert max(tight.calls[before:]) <= 4


def test_parts_and_slices():
    seen = []

    def f(x):
        seen.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("none")
        return x

    with pytest.warns(UserWarning, match="at 10 rows"):
        parts = in_batches(f, torch.arange(10.0), None)
    assert torch.equal(torch.cat(parts), torch.arange(10.0))
    assert seen == [10, 5, 2, *[10, 5, 2][3:], 2, 2, 2, 2]
    seen.clear()
    with pytest.warns(UserWarning, match="at 6 rows"):
        slices = in_slices(lambda rows: f(torch.arange(8.0)[rows]), 8, 6)
    assert torch.equal(torch.cat(slices), torch.arange(8.0))
    x = torch.zeros(4, 2)
    assert Batched(MIXTURE, None).decode(x) is x, "whole batches are passed as they are"


def test_the_command_halves_too(tmp_path, recwarn):
    """Prompt groups of one command remember what the first one has found out."""
    (tmp_path / "tight.py").write_text(
        "import torch\n"
        "def bright(images):\n"
        "    if len(images) > 3:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return images.mean((1, 2, 3))\n\n"
        "def loose(images):\n"
        "    return images.mean((1, 2, 3))\n"
    )
    common = ["sample", "--model", "emoji", "--prompt", "[a fox, a bird]", "--particles", "40",
              "--steps", "1", "--method", "best-of-n"]  # fmt: skip
    tight = f"{tmp_path / 'tight.py'}:bright"
    assert main([*common, "--reward", tight, "--out", str(tmp_path / "a")]) == 0
    assert (
        main([*common, "--reward", tight.replace("bright", "loose"), "--out", str(tmp_path / "b")])
        == 0
    )
    told = [str(w.message) for w in recwarn if "out of memory" in str(w.message)]
    assert len(told) == 1
    assert re.search(r"at 40 rows a call: continuing with 2,", told[0])

    a, b = (figures(tmp_path / name) for name in "ab")
    assert len(a) == 2 * 40
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def figures(folder):
    """Return the rewards in a run's folder."""
    lines = (folder / "scores.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["reward"] for line in lines])
