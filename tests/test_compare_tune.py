"""`steer compare --tune`: the best of a grid, and never by the prompts that are reported."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recipes import compare as compare_module
from recipes.compare_tune import grid_of, kept_in, tune, tuning_prompts_beside
from recipes.crew import Crew
from recipes.entries import entry
from recipes.partial import Partial


def test_a_grid_is_read():
    assert grid_of("scale=0.1,0.3; steps=8,16") == {"scale": [0.1, 0.3], "steps": [8, 16]}
    assert grid_of("move=pcn,slice") == {"move": ["pcn", "slice"]}
    for text in ("scale", "=1", "scale=", "a=1; b=2; c=3", ""):
        with pytest.raises(ValueError, match="tune"):
            grid_of(text)


def test_prompts_that_are_reported_are_left_out():
    pool = [f"p{i}" for i in range(20)]
    beside = tuning_prompts_beside(["p0", "p2", "other"], pool)
    assert beside.prompts == ["p1", *(f"p{i}" for i in range(3, 14))]
    with pytest.raises(ValueError, match="are also reported"):
        tuning_prompts_beside(pool, pool[:5])


def each(run):
    return lambda units: [run(unit) for unit in units]


def test_each_method_gets_the_best_of_the_values_that_it_takes():
    asked = []

    def run(unit):
        asked.append(unit.row)
        scale = unit.row.options.get("scale", 0.0)
        judge = -((scale - 0.3) ** 2) - 0.01 * abs(unit.row.steps - 8)
        return {"judge": torch.tensor([[judge]]), "reward": torch.tensor([[float(scale)]])}, {}

    entries = [entry(t) for t in ("fmrg-j:steps=16", "reno:steps=4", "best-of-n")]
    grid = grid_of("scale=0.1,0.3,1; steps=8,16")
    chosen, rows = tune(entries, grid, "judge", each(run), 3, lambda line: None)
    assert (chosen[0].options["scale"], chosen[0].steps) == (0.3, 8)
    assert chosen[1].steps == 8  # it has no scale
    assert "scale" not in chosen[1].options
    assert chosen[2] == entries[2]  # its candidates follow from the others' calls
    assert len(rows) == len(asked) == 6 + 2
    by_reward, _ = tune(entries, grid, "reward", each(run), 3, lambda line: None)
    assert by_reward[0].options["scale"] == 1
    with pytest.raises(ValueError, match="no method here takes churn"):
        tune(entries, grid_of("churn=0,1"), "judge", each(run), 3, lambda line: None)
    with pytest.raises(ValueError, match="judge or reward"):
        tune(entries, grid, "luck", each(run), 3, lambda line: None)


def test_without_a_judge_there_is_nothing_to_tune_by():
    def run(unit):
        return {"reward": torch.zeros(1, 1)}, {}

    with pytest.raises(ValueError, match="needs a judge"):
        tune([entry("fmrg-j")], grid_of("scale=1,2"), "judge", each(run), 1, lambda line: None)


def test_what_was_measured_is_read(tmp_path):
    asked = []

    def run(unit):
        asked.append(unit.row.label)
        score = torch.tensor([[0.1 + len(asked)]])
        return {"reward": score, "judge": -score, "images": torch.zeros(1, 1, 3, 8, 8)}, {"nfe": 2}

    entries, grid = [entry("fmrg-j:steps=4")], grid_of("scale=0.1,0.3,1")
    found = []
    for _ in range(2):
        with Partial(tmp_path / "out", {"made": "so"}) as partial:
            found.append(tune(entries, grid, "judge", kept_in(partial, run), 1, lambda line: None))
            assert len(asked) == 3
            assert "images" not in partial.read("tune_002")[0]
    assert found[0] == found[1]


def test_processes_measure_a_share_each_and_read_all(tmp_path):
    asked = [], []

    class One(Crew):
        """A process of two in threads."""

        def __init__(self, rank):
            self.rank, self.count = rank, 2

        def wait(self, done):
            while not done():
                time.sleep(0.01)

    def run(rank, unit):
        asked[rank].append(unit.row.options["scale"])
        return {"reward": torch.tensor([[float(unit.row.options["scale"])]])}, {}

    def tuned(rank):
        measure = kept_in(partial, functools.partial(run, rank), One(rank))
        return tune([entry("fmrg-j")], grid_of("scale=1,2,3"), "reward", measure, 1, print)

    with Partial(tmp_path / "out", {"made": "so"}) as partial, ThreadPoolExecutor(2) as pool:
        one, other = pool.map(tuned, range(2))
    assert one == other
    assert one[0][0].options["scale"] == 3
    assert asked == ([1, 3], [2])


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_its_tuning_was(tmp_path, monkeypatch):
    """What was measured is not measured again, and the tables are those of a run at once."""
    drawn, stop = [], [None]
    run = compare_module._Bench._run

    def counted(bench, unit):
        drawn.append(unit.row.label)
        if len(drawn) == stop[0]:
            raise KeyboardInterrupt
        return run(bench, unit)

    monkeypatch.setattr(compare_module._Bench, "_run", counted)
    options = {
        "model": "emoji", "reward": "colour:name=red", "prompts": ["a fox"],
        "methods": ["fmrg-j:steps=1,particles=1"], "tune": "scale=0.1,0.3", "by": "reward",
        "tune_prompts": ["a bird"], "seeds": 1, "judge": None,
    }  # fmt: skip
    compare_module.compare(**options, out=tmp_path / "whole")
    whole = list(drawn)
    assert len(whole) == 3  # two values, and the one that is reported
    for at in (2, 3):  # in the tuning, and after it
        drawn.clear()
        stop[0] = at
        out = tmp_path / f"cut{at}"
        with pytest.raises(KeyboardInterrupt):
            compare_module.compare(**options, out=out)
        drawn.clear()
        stop[0] = None
        compare_module.compare(**options, out=out)
        assert drawn == whole[at - 1 :]
        names = "tuning.json", "pictures.safetensors"
        assert all((out / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
        assert not list(tmp_path.glob(".*.partial"))
