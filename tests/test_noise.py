import pytest
import torch

import steer
from steer.noise import Draws, Noise, generator, noise_dtype

EVENTS = [(), (2,), (16,), (3, 32, 32)]


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_a_particle_keeps_its_noise(event):
    """Whatever the number of particles, and whatever the other prompts."""
    many = Noise(7, range(5), 130).at(3)
    few = Noise(7, [2], 3).at(3)
    a = many.normal(event).unflatten(0, (5, 130))[2, :3]
    assert torch.equal(few.normal(event), a)
    assert torch.equal(few.uniform(), many.uniform().unflatten(0, (5, 130))[2, :3])


def test_keys_matter():
    base = Noise(0, [0], 4).at(0).normal((2,))
    for other in (Noise(1, [0], 4).at(0), Noise(0, [1], 4).at(0), Noise(0, [0], 4).at(1)):
        assert not torch.equal(other.normal((2,)), base)
    twice = Noise(0, [0], 4).at(0)
    first, second = twice.normal((2,)), twice.normal((2,))
    assert torch.equal(first, base)
    assert not torch.equal(first, second)
    rows = Noise(0, [0], 5000).normal((1,))[:, 0]
    assert len(rows.unique()) == 5000
    assert abs(float(rows.mean())) < 4 / 5000**0.5
    assert abs(float(rows.var()) - 1) < 4 * (2 / 5000) ** 0.5


def test_resampling_has_a_key_of_its_own():
    """A generator for each seed, prompt and step, and none that rows share."""

    def first(noise, prompt=0):
        return float(torch.rand((), generator=noise.generator(prompt)))

    noise = Noise(0, [3, 5], 4)
    assert first(noise.at(1)) == first(Noise(0, [3], 900).at(1))
    others = [noise.at(2), Noise(1, [3]).at(1), Noise(0, [5]).at(1)]
    assert len({first(noise.at(1)), *map(first, others)}) == 4
    assert first(noise.at(1), 1) == first(others[2])
    rows = Noise(0, [3], 900).at(1).uniform()
    assert (rows - first(noise.at(1))).abs().min() > 0


def test_a_row_of_a_batch_keeps_its_draws():
    """Whatever the other rows of a call: parts have what the whole has."""
    whole = Draws(3, 5, (0, 1400))
    x, u = whole.normal((2,)), whole.uniform((3,))
    for first, last in ((0, 3), (500, 520), (511, 1400)):
        part = Draws(3, 5, (first, last))
        assert len(part) == last - first
        assert torch.equal(part.normal((2,)), x[first:last])
        assert torch.equal(part.uniform((3,)), u[first:last])


def test_keys_of_a_batch_matter():
    base = Draws(0, 1, (0, 4))
    x = base.normal((2,))
    for other in (base, Draws(1, 1, (0, 4)), Draws(0, 2, (0, 4))):
        assert not torch.equal(other.normal((2,)), x)
    picks = [
        [d.choice(10_000) for _ in range(6)] for d in (Draws(0, 1, (0, 4)), Draws(0, 1, (9, 11)))
    ]
    assert picks[0] == picks[1]  # the same for all rows
    assert len(set(picks[0])) == 6
    assert picks[0] != [d.choice(10_000) for d in [Draws(0, 2, (0, 4))] for _ in range(6)]


def test_a_seeds_draws_stay_what_they_are():
    """The keys as they are written into pictures and runs: from release to release."""
    assert generator(0, "start").initial_seed() == 4801040339590912508
    x = [torch.randn(512, 2, generator=generator(0, 3, 7, k, 0))[:4] for k in range(2)]
    noise = Noise(0, [3], 4).at(7)
    assert torch.equal(noise.normal((2,)), x[0])
    assert torch.equal(noise.normal((2,)), x[1])
    draws = Draws(0, 7, (510, 514))
    u = [torch.rand(1024, generator=generator(0, 7, 1, "rows", 0))[510:514]]
    assert torch.equal(draws.uniform(), u[0])
    assert draws.choice(100) == int(torch.randint(100, (), generator=generator(0, 7, 2, "choice")))
    again = [torch.randn(512, 2, generator=generator(0, 7, 3, "rows", b)) for b in range(2)]
    assert torch.equal(draws.normal((2,)), torch.cat(again)[510:514])


def test_what_noise_is_drawn_in():
    assert noise_dtype(torch.nn.Linear(2, 2)) == torch.float32
    assert noise_dtype(torch.nn.Linear(2, 2).bfloat16()) == torch.float32
    assert noise_dtype(torch.nn.Linear(2, 2).double()) == torch.float64
    assert noise_dtype(torch.nn.Identity()) == torch.get_default_dtype()
    for draws in (Noise(0, particles=2), Draws(0, 0, (0, 2))):
        assert draws.normal((2,)).dtype == torch.get_default_dtype()
    wide = (Noise(0, particles=2, dtype=torch.float64), Draws(0, 0, (0, 2), dtype=torch.float64))
    assert {draws.uniform().dtype for draws in (*wide, wide[0].at(1))} == {torch.float64}


def test_only_blocks_that_are_needed_are_drawn(monkeypatch):
    keys = []
    monkeypatch.setattr("steer.noise.generator", lambda *key: keys.append(key) or generator(*key))
    Draws(0, 0, (510, 514)).normal((2,))  # blocks of 512 rows
    assert [key[-1] for key in keys] == [0, 1]


def test_global_randomness_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Noise(0, [0], 8).normal((4,))
    generator("x")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", ["none", "fmtt", "split"])
def test_sampling_does_not_depend_on_company(method):
    """Micro-batches, the number of particles and the other prompts change no particle."""
    flow = steer.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5)
    reward = steer.LinearReward(torch.tensor([1.0, 0.0]))
    options = {} if method == "none" else {"threshold": 0.0}
    if method == "split":  # its step size learns from all particles: keep it from moving
        options["moves"] = 0

    def sample(prompts, particles, position=0, batch_size=None):
        return steer.sample(
            flow, reward, prompts, particles, 4, method, 0.7,
            seed=5, position=position, batch_size=batch_size, **options,
        ).x  # fmt: skip

    whole = sample(["a", "b", "c"], 6)
    for batch_size in (1, 4, 7, 100):
        assert torch.allclose(sample(["a", "b", "c"], 6, 0, batch_size), whole, atol=1e-5)
    assert torch.allclose(sample(["a", "b", "c"], 3), whole[:, :3], atol=1e-5)
    assert torch.allclose(sample(["c"], 6, position=2), whole[2:], atol=1e-5)
    assert torch.allclose(sample(["x", "b"], 6)[1], whole[1], atol=1e-5)
    assert torch.allclose(sample("z", 6), whole[0], atol=1e-5)


def test_full_split_does_not_depend_on_micro_batches_or_other_prompts():
    """Adaptation and resampling couple a prompt's particles, and nothing else."""
    flow = steer.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5)
    reward = steer.LinearReward(torch.tensor([2.0, 0.0]))
    runs = [
        steer.sample(flow, reward, ["a", "b", "c"], 16, 5, "split", 0.5, batch_size=size).x
        for size in (None, 5, 24)
    ]
    alone = steer.sample(flow, reward, ["b"], 16, 5, "split", 0.5, position=1).x
    for other in runs[1:]:
        assert torch.allclose(runs[0], other, atol=1e-5)
    assert torch.allclose(runs[0][1:2], alone, atol=1e-5)
