"""The home of the project: its pictures, version, notebooks, and the site's own machinery."""

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

import jupytext
import pytest
import yaml
from PIL import Image

import rewards
import steer

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / ".ci/site.py")
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


# ---------------------------------------------------------------- home


def test_the_readme_shows_pictures_that_are_there():
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert {"docs/readme.png", "docs/steering.gif"} <= set(shown)
    for name in shown:
        with Image.open(ROOT / name) as picture:
            assert min(picture.size) > 100
    with Image.open(ROOT / "docs/steering.gif") as film:
        assert film.n_frames > 20
    assert (ROOT / "docs/steering.gif").stat().st_size < 1_500_000


def test_the_pipeline_comes_before_the_embedded_model():
    assert README.index("on your own pipeline") < README.index('steer.load("emoji")')


def test_the_version_is_written_once():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "steer.__version__" }' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == steer.__version__
    assert cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_forms_and_workflows_are_yaml(path):
    found = yaml.safe_load(path.read_text())
    if path.name == "release.yml":
        steps = [step.get("run", "") for step in found["jobs"]["build"]["steps"]]
        assert {".ci/wheel", "make docs"} <= set(steps)
        assert "python -m build" in " ".join(steps)
    elif path.name != "config.yml":
        assert {"name", "description", "body"} <= set(found)
        assert all("type" in field for field in found["body"])


# ---------------------------------------------------------------- notebooks


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_cells_show_themselves(path, tmp_path, monkeypatch):
    """As a kernel runs it: each cell's last value is drawn. `make docs` runs it in a kernel."""
    monkeypatch.chdir(tmp_path)
    namespace, pictures = {"__name__": "notebook"}, 0
    for cell in jupytext.read(path, fmt="py:percent").cells:
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), path.name, "eval"), namespace)
            pictures += drawn(value)
    assert pictures >= 3


def drawn(value):
    png = getattr(value, "_repr_png_", lambda: None)()
    page = getattr(value, "_repr_html_", lambda: None)()
    return bool(png or (page and "<img" in page))


# ---------------------------------------------------------------- site


def listed(nav):
    for item in nav:
        ((_, value),) = item.items()
        yield from listed(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation(site):
    text = (ROOT / "mkdocs.yml").read_text()
    nav = set(listed(yaml.safe_load(text)["nav"]))
    written = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert written <= nav
    made = {f"reference/{page}.md" for page in site.reference()}
    made |= {f"notebooks/{p.stem}.md" for p in NOTEBOOKS} | {"reference/command_line.md"}
    made |= {f"cards/{p.parent.name}/index.md" for p in (ROOT / "steer/zoo").glob("*/README.md")}
    assert nav - written == made | (set(site.OPTIONAL) - written)


def test_every_public_name_is_in_the_reference(site):
    text = "".join(site.reference().values())
    for package in (steer, rewards):
        stub = ast.parse((ROOT / package.__name__ / "__init__.pyi").read_text())
        names = {
            alias.name for node in stub.body if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }  # fmt: skip
        assert names
        for name in names:
            assert text.count(f"{{ #{package.__name__}.{name} }}") == 1, name


def test_every_command_is_in_the_reference(site):
    from recipes.commands import COMMANDS

    text = site.commands()
    assert all(f"## steer {name}\n" in text for name in COMMANDS)
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ('<img alt="a" src="readme.png"><a href="https://example.org">there</a>', False),
    ],
)
def test_a_page_that_loads_from_elsewhere_ends_the_build(site, caplog, html, refused):
    """A warning does, by `--strict`."""
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="x.md"))
    assert site.on_post_page(html, page, None) == html
    assert bool(caplog.records) is refused


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("alpha_t x_0 &lt;= log_w", "α<sub>t</sub> x<sub>0</sub> ≤ log_w"),
        ("exp(-a^2 / 2) -&gt; pi_t", "exp(-a<sup>2</sup> / 2) → π<sub>t</sub>"),
        ("∇r_t(x) - beta'", "∇r<sub>t</sub>(x) − β'"),
        ("alphabet(max_steps)", "alphabet(max_steps)"),
    ],
)
def test_formulas_are_set(site, code, shown):
    assert site.symbols(code) == shown


@pytest.mark.parametrize("code", ["pi_t", "x_t", "rho_0 = N(0, I)", "pi t / 2"])
def test_inline_formulas_are_set(site, code):
    assert site._is_formula(code)


@pytest.mark.parametrize("code", ["flow.log_prob", "steer/path.py: Path", "log_prob", "lookahead"])
def test_code_stays_code(site, code):
    assert not site._is_formula(code)


def test_every_formula_of_the_theory_is_set(site):
    """Each numbered block reads as a formula, and none loses a line."""
    theory = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(\(\d+\).*?)```", theory, re.DOTALL)
    assert len(blocks) > 60
    for block in blocks:
        made = site.set_formula(block.replace("<", "&lt;").replace(">", "&gt;"))
        assert made.startswith("<b>(")
        assert made.count("\n") == block.count("\n")
        assert made.count("<sub>") == made.count("</sub>")
