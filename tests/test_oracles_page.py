"""The page of results says what docs/oracles.json holds."""

from pathlib import Path

import pytest

from benchmarks import oracles

DOCS = Path(__file__).parents[1] / "docs"
HIDDEN = ("fk", "fk-sum")


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_table_of_exact_samplers_is_that_of_the_committed_cells():
    header, _, *rows = oracles.table(oracles.gathered(DOCS / "oracles.json")).splitlines()
    shown = [i for i, name in enumerate(cells(header)) if name not in HIDDEN]
    page = {tuple(cells(line)) for line in (DOCS / "results.md").read_text().splitlines()}
    for row in rows:
        assert tuple(cells(row)[i] for i in shown) in page, row


def test_the_counts_of_what_passes_are_those_of_the_committed_cells():
    counts = oracles.passing(oracles.gathered(DOCS / "oracles.json")).split(", ")
    page = " ".join((DOCS / "results.md").read_text().split())
    for one in counts:
        if one.split("`")[1] not in HIDDEN:
            assert one in page, one


def test_no_cells_are_an_error_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    kept = tmp_path / "cells.json"
    kept.write_text("[]")
    argv = ["oracles", "table", "--out", str(tmp_path / "no"), "--write", str(kept)]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit):
        oracles.main()
    assert "holds no cells" in capsys.readouterr().err
    assert kept.read_text() == "[]"


def test_a_cell_that_another_process_computes_is_left_to_it(tmp_path, monkeypatch, capsys):
    argv = ["oracles", "run", "--out", str(tmp_path), "--only", "linear, d=2", "--steps", "10",
            "--methods", "tds"]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(oracles, "measured", lambda *a: {"z": 1.0, "z_error": 0.01, "error": 1.0})
    file = oracles.file_of(tmp_path, "linear, d=2", "tds", 10)
    with oracles.locked(file, file.with_suffix(".lock")):
        oracles.main()
    assert not file.exists()
    oracles.main()
    assert file.exists()
    assert "tds, 10 steps: 1.000" in capsys.readouterr().out
