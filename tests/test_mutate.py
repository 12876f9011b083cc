"""The mutation run's own changes: each of one line, and all of them found."""

import random

import pytest

from benchmarks.mutate import ROOT, TESTS, mutants, table

SOURCE = '''
def f(x: float = 0.5, *, step: int = 3) -> float:
    """Say 1 + 2."""
    if x < 0:
        raise ValueError(f"{x + 1} is below")
    return -g(x, 2 * step, clamp=True) if x > 1 else x.sqrt()
'''


def found(source):
    return {mutant["new"]: mutant["kind"] for mutant in mutants(source, random.Random(0))}


def test_every_kind_of_change_is_made_and_nothing_else():
    line = "return -g(x, 2 * step, clamp=True) if x > 1 else x.sqrt()"
    assert found(SOURCE) == {
        line.replace("-g", "g"): "sign",
        line.replace("2 * step", "2 / step"): "operator",
        line.replace("2 * step", "2"): "dropped term",
        line.replace("2 * step", "step"): "dropped term",
        line.replace("x, 2 * step", "2 * step, x"): "swapped arguments",
        line.replace(", clamp=True", ""): "dropped keyword",
        line.replace("True", "False"): "constant",
        line.replace("2 *", "3 *"): "constant",
        line.replace("x > 1", "x > 2"): "constant",
        line.replace("x > 1", "x >= 1"): "comparison",
        line.replace("x > 1", "x < 1"): "comparison",
        line.replace("x.sqrt()", "x"): "dropped call",
        "return x.sqrt() if x > 1 else -g(x, 2 * step, clamp=True)": "swapped branches",
    }


def test_brackets_are_kept_where_they_are_needed():
    assert "y = a / (b + c)" in found("y = a * (b + c)")
    assert "y = a * (b - c)" in found("y = a * (b + c)")
    assert "y = (a * b) ** 3" in found("y = (a * b) ** 2")


def test_a_change_has_one_line_and_is_drawn_by_its_seed():
    draws = [[m["source"] for m in mutants(SOURCE, random.Random(s))] for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    whole = SOURCE.splitlines()
    for source in draws[0]:
        changed = [a != b for a, b in zip(whole, source.splitlines(), strict=True)]
        assert sum(changed) == 1


@pytest.mark.parametrize("module", TESTS)
def test_modules_and_their_tests_are_there(module):
    assert (ROOT / "steer" / f"{module}.py").is_file()
    for name in TESTS[module].split():
        assert (ROOT / "tests" / f"test_{name}.py").is_file()


def test_the_table_counts_what_is_left():
    def row(result, new="y = 3"):
        return {"file": "steer/a.py", "line": 1, "old": "y = 2", "new": new, "result": result}

    text = table([row("caught"), row("timeout"), row("caught"), row("survived")])
    assert "| `steer/a.py` | 4 | 3 | 0 | 1 |" in text
    assert "| all | 4 | 3 (75.0%) | 0 | 1 |" in text
    assert "- `steer/a.py:1` `y = 2` → `y = 3`" in text
