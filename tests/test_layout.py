"""What the house rules promise of the code itself."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for room in ("steer", "rewards") for p in (ROOT / room).rglob("*.py"))
HEAVY = {
    "steer": ["lightning", "peft", "open_clip", "transformers", "diffusers"],
    "rewards": ["lightning", "peft", "open_clip", "transformers", "diffusers", "torchvision"],
}
DRAWS = {
    "bernoulli", "bernoulli_", "exponential_", "multinomial", "normal", "normal_", "poisson",
    "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm",
    "trunc_normal_", "uniform_",
}  # fmt: skip
SPLIT = ("rewards",)
"""The packages whose files are short, without circles, and keep their private names."""
LINES = 350
"""The longest that a file of theirs may be."""
ARROWS = {
    "rewards": set(),
    "rewards.loading": {"catalogue", "grammar", "trust"},
    "rewards.sizes": {"catalogue", "grammar", "loading", "models"},
    "rewards.trust": {"catalogue"},
    "rewards.catalogue": set(),
    "rewards.judge": {"models"},
    "rewards.models": {"pixels", "trust"},
    "rewards.combine": {"gradient"},
    "rewards.serving": {"gradient"},
    "rewards.pixels": set(),
    "rewards.checking": set(),
    "rewards.grammar": set(),
    "rewards.gradient": set(),
    "rewards.testing": set(),
}
"""Room -> the rooms of its package that it may import, beside itself; a file beside is a room."""
GROUND = {
    "steer.devices", "steer.hub", "steer.names", "steer.reward", "steer.secrets",
    "steer.user_code",
}  # fmt: skip
"""What `rewards` stands on."""
LATE = {"rewards.models": {"loading"}, "rewards.serving": {"loading"}}
"""Room -> those that it may import besides, inside functions."""

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


OURS = {module(path): path for path in FILES}
SPLIT_FILES = [path for name, path in OURS.items() if name.split(".")[0] in SPLIT]
every_split_file = pytest.mark.parametrize(
    "path", SPLIT_FILES, ids=lambda p: str(p.relative_to(ROOT))
)


def statements(node, late=False):
    """Every import statement below a node, and whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, late
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(child, late or inside)


def edges(path):
    """The files of ours that a file imports, by their modules' names, and whether late."""
    for node, late in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        else:
            whole = [f"{node.module}.{name.name}" for name in node.names]
            found = [name if name in OURS else node.module for name in whole]
        yield from ((name, late) for name in found if name in OURS)


def room(name):
    return ".".join(name.split(".")[:2])


def test_the_files_are_found():
    assert len(FILES) > 25


@pytest.mark.parametrize("package", HEAVY)
def test_import_is_light(package):
    code = f"import sys, {package}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert package in loaded
    assert not loaded & set(HEAVY[package])


@every_file
def test_arrows_point_one_way(path):
    """recipes -> rewards -> the ground; recipes -> steer; steer imports neither."""
    names = set(imported(path))
    rooms = {name.split(".")[0] for name in names}
    assert "recipes" not in rooms
    assert not rooms & {"tests", "benchmarks"}
    if path.is_relative_to(ROOT / "steer"):
        assert "rewards" not in rooms
    else:
        assert {n for n in names if n.split(".")[0] == "steer"} <= GROUND


@every_split_file
def test_arrows_between_rooms(path):
    """Each room imports those that it stands on; what is made by name is imported late."""
    here = module(path)
    package, own = here.split(".")[0], room(here)
    for name, late in edges(path):
        if name.split(".")[0] == package and room(name) != own:
            allowed = ARROWS[own] | (LATE.get(own, set()) if late else set())
            assert room(name).removeprefix(f"{package}.") in allowed, f"{here} -> {name}"


@pytest.mark.parametrize("package", SPLIT)
def test_no_circles(package):
    """Not inside functions either."""
    graph = {
        name: {n for n, _ in edges(path) if n.split(".")[0] == package}
        for name, path in OURS.items()
        if name.split(".")[0] == package
    }
    assert any(graph.values())
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises, and names a circle
    assert set(order) == set(graph)


@every_split_file
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LINES


@every_split_file
def test_private_names_stay_at_home(path):
    tree = ast.parse(path.read_text())
    modules = set()
    for node, _ in statements(tree):
        for name in node.names:
            whole = name.name if isinstance(node, ast.Import) else f"{node.module}.{name.name}"
            if whole.split(".")[0] in {"steer", "rewards"}:
                assert "._" not in whole, f"{path.name} imports {whole}"
                modules |= {name.asname or name.name} if whole in OURS else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            assert ast.unparse(node.value) not in modules, f"{path.name}:{node.lineno}"


@every_file
def test_randomness_is_an_argument(path):
    """No draw without a generator, and no global seed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        where = f"{path.name}:{node.lineno}"
        assert node.func.attr not in {"manual_seed_all", "seed_everything"}, where
        source = ast.unparse(node.func)
        assert source != "torch.manual_seed", where
        assert not source.startswith(("random.", "np.random.", "numpy.random.")), where
        if node.func.attr in DRAWS and (source.startswith("torch.") or source.endswith("_")):
            assert any(k.arg == "generator" for k in node.keywords), f"{where}: {source}"


@every_file
def test_modules_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no docstring"
    if path.name.startswith("_") and path.name != "__init__.py":
        return
    found = importlib.import_module(module(path))
    if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body):
        assert found.__all__, "no __all__"
    assert all(hasattr(found, name) for name in getattr(found, "__all__", ()))


def test_no_pickles():
    for path in [*FILES, *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get(
                    "weights_only"
                ) == "True", f"{path}:{node.lineno}"
        assert not {"pickle", "cPickle", "dill"} & set(imported(path))
