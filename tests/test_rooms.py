"""The rooms of `steer/`: which may import which, and no circle anywhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "steer").rglob("*.py"))

GROUND = {
    "batches", "catalogue", "devices", "doors", "exact", "files", "film", "flow", "hub",
    "identity", "lock", "names", "noise", "one_time", "onto", "path", "pictures", "posterior",
    "ranges", "ranks", "reward", "rows", "secrets", "shown", "testing", "user_code",
}  # fmt: skip
ARROWS = {
    "guidance": set(),
    "adapters": set(),
    "backends": {"adapters", "guidance"},
    "sampling": {"guidance"},
    "models": {"adapters", "backends"},
    "objectives": {"guidance", "sampling"},
    "training": {"guidance", "sampling", "objectives", "adapters"},
    "planning": {"guidance", "sampling", "objectives", "adapters", "backends", "models"},
    "tuning": {"guidance", "sampling", "objectives", "training", "adapters"},
}
"""Room -> the rooms that it may import, beside the ground."""

LONGEST = 350


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {module(path) for path in FILES}


def imported(path):
    """The modules of `steer` that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in KNOWN else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name in KNOWN)


def room(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_file_is_in_a_room():
    assert {room(module(path)) for path in FILES} - {""} == GROUND | set(ARROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    own = room(module(path))
    others = {room(name) for name in imported(path)} - {own, ""}
    allowed = GROUND if own in GROUND else GROUND | ARROWS.get(own, set())
    assert others <= allowed, f"{own} imports {others - allowed}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_crosses_a_file(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steer"):
            private = [alias.name for alias in node.names if alias.name.startswith("_")]
            assert not private, f"{node.module}: {private}"


def test_no_circles():
    arrows = {module(path): set(imported(path)) - {module(path)} for path in FILES}
    left = dict(arrows)
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST
