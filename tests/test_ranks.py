"""The particles of one prompt over processes: the same run, whatever the number of them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import steer
from steer.batches import Batched
from steer.ranks import Ranks

MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])


class Thread:
    """What `Ranks` asks of a Fabric, of threads in one process."""

    def __init__(self, rank, shared):
        self.global_rank, self.world_size, self.device = rank, len(shared[1]), torch.device("cpu")
        self.barrier, self.slots = shared

    def all_gather(self, data):
        self.slots[self.global_rank] = data
        self.barrier.wait()
        found = torch.stack(list(self.slots))
        self.barrier.wait()
        return found


def ran(count, f):
    """Run `f` in as many ranks as threads, and return what each has."""
    shared = threading.Barrier(count, timeout=60), [None] * count

    def one(rank):
        try:
            with Ranks(Thread(rank, shared)):
                return f(rank)
        except BaseException:
            shared[0].abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Seen(torch.nn.Module):
    """A reward that notes how many rows it is asked about."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return x[:, 0] - x[:, 1].square()


def sampled(method, particles=5, prompts=None, **options):
    flow, reward = steer.GaussianMixture(MEANS, 0.4), Seen()
    result = steer.sample(
        flow, steer.reward.wrap(reward), prompts, particles, 3, method, progress=False, **options
    )
    return result, reward.rows


def same(one, other):
    """Whether two results are one; a sum of another number of rows may round otherwise."""
    for name in ("x", "rewards", "log_w", "log_z", "ancestors", "temperature"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)
    assert one.nfe == other.nfe
    assert {**one.costs, "seconds": 0} == {**other.costs, "seconds": 0}


@pytest.mark.parametrize("method", [m for m in steer.METHODS if m != "posterior"])
def test_every_method_makes_the_same_run(method):
    alone, _ = sampled(method)
    for count in (2, 4):
        for result, _ in ran(count, lambda rank: sampled(method)):
            same(alone, result)


def test_each_calls_for_its_own_particles():
    _, whole = sampled("renoise", 8, temperature=0.5)
    for _, rows in ran(4, lambda rank: sampled("renoise", 8, temperature=0.5)):
        assert len(rows) == len(whole)
        assert [4 * n for n in rows] == whole


def test_more_processes_than_particles_and_a_prompt_axis():
    class Flow(steer.GaussianMixture):
        def given(self, prompts):
            return self

    def run(rank=None):
        flow = Flow(MEANS, 0.4)
        return steer.sample(flow, Seen(), ["a", "b"], 3, 3, "split", progress=False)

    alone = run()
    for result in ran(4, run):
        same(alone, result)


def test_memory_that_is_too_little_in_one_process_changes_nothing():
    class Tight(Seen):
        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    def run(rank=None):
        reward = Tight() if rank == 1 else Seen()
        return steer.sample(
            steer.GaussianMixture(MEANS, 0.4), reward, None, 8, 3, "noise-smc", progress=False
        )

    alone = run()
    with pytest.warns(UserWarning, match="continuing with 2"):
        found = ran(2, run)
    for result in found:
        same(alone, result)


def test_bad_rewards_are_counted_once():
    class Bad(Seen):
        def forward(self, x):
            return super().forward(x).masked_fill(x[:, 0] > 1, torch.nan)

    def run(rank=None):
        flow = steer.GaussianMixture(MEANS, 0.4)
        return steer.sample(
            flow, Bad(), None, 6, 2, "best-of-n", on_bad_reward="drop", progress=False
        )

    alone = run()
    assert alone.costs["bad_rewards"] > 0
    for count in (2, 4):
        assert all(
            r.costs == {**alone.costs, "seconds": r.costs["seconds"]} for r in ran(count, run)
        )


def test_processes_that_differ_are_found_out():
    Ranks(Others(0)).agree(torch.ones(3), torch.zeros(2), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="did not make the same run"):
        Ranks(Others(1)).agree(torch.ones(3))


class Others:
    """Two processes, of which the other holds as much more."""

    global_rank, world_size, device = 0, 2, torch.device("cpu")

    def __init__(self, more):
        self.more = more

    def all_gather(self, data):
        return torch.stack([data, data + self.more])


def test_a_process_that_is_gone_is_said():
    class Gone(Others):
        def all_gather(self, data):
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(ConnectionError, match=r"another of the 2 processes.*closed by peer"):
        Ranks(Gone(0)).agree(torch.ones(3))


def test_gradients_between_processes_are_refused():
    def run(rank):
        x = torch.zeros(4, 2, requires_grad=True)
        return Batched(steer.GaussianMixture(MEANS, 0.4), None).velocity(x, 0.5)

    with pytest.raises(RuntimeError, match="gradients do not pass from one process"):
        ran(2, run)
