"""The documents' code blocks run, and what they point at is there."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from recipes.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [p for room in ("steer", "rewards", "recipes") for p in (ROOT / room).rglob("*.py")]
THEORY = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_blocks_run(path, tmp_path, monkeypatch, capsys):
    """They run in order, in one folder; a first line `# name.py` makes a block that file.

    What a comment beside a print promises is printed. The tests of a contract run as well.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for i, (language, code) in enumerate(BLOCK.findall(path.read_text(encoding="utf-8"))):
        if language == "sh":
            run_commands(code)
        else:
            run_python(code, f"{path.name}, block {i}", capsys)
    for name in set(sys.modules) - before:  # the next document may have a file of that name
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_python(code, name, capsys):
    if file := re.match(r"# (\w+\.py)\n", code):
        Path(file[1]).write_text(code, encoding="utf-8")
        importlib.invalidate_caches()
    namespace = {"__name__": "block"}
    capsys.readouterr()
    exec(compile(code, name, "exec"), namespace)
    printed = re.findall(r"-?\d+\.\d+", capsys.readouterr().out)
    for promised in re.findall(r"^print\(.*#.* (\d+\.\d+) and (\d+\.\d+)$", code, re.MULTILINE):
        assert [f"{float(p):.2f}" for p in printed[-2:]] == [f"{float(p):.2f}" for p in promised]
    for title, value in namespace.items():
        if title.startswith("Test"):
            for test in (t for t in dir(value) if t.startswith("test_")):
                getattr(value(), test)()


def run_commands(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "steer":
            assert main(words[1:]) == 0, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def formulas():
    """The numbers of the formulas, in the order of the page: two spaces follow each."""
    return [int(n) for n in re.findall(r"^\((\d+)\)  ", THEORY, re.MULTILINE)]


def test_each_formula_has_one_number_and_an_anchor():
    found = formulas()
    assert sorted(found) == list(range(1, len(found) + 1))
    assert [int(n) for n in re.findall(r'<a id="f(\d+)"></a>', THEORY)] == found


def test_cited_formulas_exist():
    """`theory (7)` and `theory (7, 8)`, in the sources and in the other documents."""
    known, cited = set(formulas()), 0
    for path in [*SOURCES, *DOCUMENTS]:
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
        for numbers in re.findall(r"theory \((\d[\d, ]*)\)", text):
            cited += 1
            missing = {int(n) for n in numbers.split(",")} - known
            assert not missing, f"{path.relative_to(ROOT)} cites theory ({numbers})"
    assert cited > 20


def test_theory_names_code_that_exists():
    """`steer/kernel.py: Jump, Adaptation` and `steer/flow.py: FlowMap.jump`."""
    text, count = re.sub(r"\s+", " ", THEORY), 0
    for file, names in re.findall(r"`([\w/]+\.py): ([\w., ]+)`", text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for name in names.split(", "):
            count += 1
            assert name in set(defined(tree.body)), f"theory.md: {file} has no {name}"
    assert count > 30


def defined(body, prefix=""):
    """The functions and classes of a body, and what their bodies define."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{prefix}{node.name}.")
