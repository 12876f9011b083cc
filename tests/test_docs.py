"""The documents' code blocks run, and what they point at is there."""

import re
import shlex
from pathlib import Path

import pytest

from recipes.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(kind):
    return [
        pytest.param(code, id=f"{path.name}-{i}")
        for path in DOCUMENTS
        for i, (language, code) in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")))
        if language == kind
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch, capsys):
    """They run, and print the number that a comment beside the print promises."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    for promised in re.findall(r"^print\(.*#.* (\d+\.\d+) and (\d+\.\d+)$", code, re.MULTILINE):
        printed = capsys.readouterr().out.split()[-2:]
        assert [f"{float(p):.2f}" for p in printed] == list(promised)


@pytest.mark.parametrize("code", blocks("sh"))
def test_commands_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "steer":
            assert main(words[1:]) == 0, line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
