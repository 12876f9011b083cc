"""What mkdocs does beside Markdown: pages of names, commands, cards and notebooks; formulas.

Hooks of mkdocs.yml. Pages are generated in memory; an executed notebook is kept in
build/notebooks as long as neither it nor the package's source changes.
"""

import ast
import base64
import hashlib
import html
import logging
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LOG = logging.getLogger("mkdocs.hooks.site")

ROOMS = ("steer", "rewards", "recipes")
OPTIONAL = ("studio.md", "hardware.md")
"""Pages that stand in the navigation where they exist."""

PAGES = {
    "sampling": ("Sampling and results", ["sampling", "film", "doors", "catalogue", "backends"]),
    "guidance": ("Parts of guidance", ["guidance", "noise", "posterior"]),
    "flows": ("Flows and models", ["flow", "path", "exact", "one_time", "models"]),
    "tuning": ("Tuning and adapters", ["tuning", "adapters"]),
}
"""Page -> its title, and the modules of `steer` whose public names it has."""

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eps": "ε", "eta": "η", "rho": "ρ",
    "pi": "π", "sigma": "σ", "tau": "τ", "theta": "θ", "lambda": "λ", "kappa": "κ", "phi": "φ",
    "psi": "ψ", "mu": "μ", "nu": "ν", "xi": "ξ", "epsilon": "ε", "Delta": "Δ",
}  # fmt: skip


# ---------------------------------------------------------------- what is public


def public_names(package):
    """(name, where it lives) of what a package's stub forwards, its modules left out."""
    tree = ast.parse((ROOT / package / "__init__.pyi").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((a.name, f"{package}.{node.module}.{a.name}") for a in node.names)


def reference():
    """Page -> Markdown that asks mkdocstrings for each public name."""
    made, public = {}, list(public_names("steer"))
    taken = {"reward", *(module for _, modules in PAGES.values() for module in modules)}
    for page, (title, modules) in PAGES.items():
        found = [(n, at) for n, at in public if at.split(".")[1] in modules]
        if page == "sampling":  # and what no other page has
            found += [(n, at) for n, at in public if at.split(".")[1] not in taken]
        made[page] = _named(title, "steer", found)
    own = [(n, at) for n, at in public if at.split(".")[1] == "reward"]
    made["rewards"] = _named("Rewards", "rewards", public_names("rewards")) + _named(
        "", "steer", own
    )
    return made


def _named(title, package, names):
    text = f"# {title}\n\n" if title else ""
    for name, where in names:
        text += (
            f"[](){{ #{package}.{name} }}\n\n::: {where}\n    options:\n"
            f"      heading: {package}.{name}\n      toc_label: {package}.{name}\n\n"
        )
    return text


def commands():
    """The page of all commands, with their help."""
    from recipes.arguments import further_help, parser
    from recipes.commands import COMMANDS

    text = "# Command line\n\nEvery option is also a key of a YAML file that `--config` reads.\n\n"
    for name, command in COMMANDS.items():
        shown = parser(name).format_help() + further_help(name)
        shown = re.sub(r"\x1b\[[0-9;]*m|[\x00-\x09\x0b-\x1f]", "", shown)
        shown = re.sub(r"^usage:.*?\n\n", "", shown, flags=re.DOTALL)
        examples = "\n".join(f"steer {example}" for example in command.examples)
        text += f"## steer {name}\n\n```text\n{examples}\n```\n\n```text\n{shown.strip()}\n```\n\n"
    return text


# ---------------------------------------------------------------- notebooks


def notebook_page(path):
    """A notebook, executed, as Markdown, and its pictures as name -> PNG."""
    import jupytext
    import nbclient
    import nbformat

    kept = ROOT / "build/notebooks" / f"{path.stem}.ipynb"
    sources = [path, *(f for room in ROOMS for f in sorted((ROOT / room).rglob("*.py")))]
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()
    if kept.is_file() and nbformat.read(kept, 4).metadata.get("made_of") == key:
        book = nbformat.read(kept, 4)
    else:
        import tempfile

        LOG.info("running %s", path.name)
        book = jupytext.read(path, fmt="py:percent")
        book.metadata["kernelspec"] = {
            "name": "python3", "display_name": "Python", "language": "python"
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            where = {"metadata": {"path": folder}}
            nbclient.NotebookClient(book, timeout=300, resources=where).execute()
        book.metadata["made_of"] = key
        kept.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, kept)
    text, pictures = "", {}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            text += f"{cell.source}\n\n"
            continue
        text += f"```python\n{cell.source}\n```\n\n"
        said = "".join(o.text for o in cell.outputs if o.get("name") == "stdout").strip()
        text += f"```text\n{said}\n```\n\n" if said else ""
        for output in cell.outputs:
            text += _output(output, path.stem, pictures)
    return text, pictures


def _output(output, stem, pictures):
    if output.output_type == "stream":
        return ""  # what was printed stands above
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}_{len(pictures)}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![What the cell shows]({name})\n\n"
    if "text/html" in data:
        return f"<div markdown=0>{data['text/html']}</div>\n\n"
    return f"```text\n{data.get('text/plain', '').strip()}\n```\n\n"


# ---------------------------------------------------------------- hooks


def on_config(config):
    """Leave pages out of the navigation that are not written."""
    config["nav"] = _there(config["nav"], Path(config["docs_dir"]))
    return config


def _there(nav, docs):
    kept = []
    for item in nav:
        ((title, value),) = item.items()
        if isinstance(value, list):
            kept.append({title: _there(value, docs)})
        elif value not in OPTIONAL or (docs / value).is_file():
            kept.append({title: value})
    return kept


def on_files(files, config):
    """Add the pages that are made of the package."""

    def add(name, content):
        files.append(File.generated(config, name, content=content))

    for page, text in reference().items():
        add(f"reference/{page}.md", text)
    add("reference/command_line.md", commands())
    for card in sorted((ROOT / "steer/zoo").glob("*/README.md")):
        add(f"cards/{card.parent.name}/index.md", _card(card))
        for beside in (*card.parent.glob("*.png"), *card.parent.glob("metrics.json")):
            add(f"cards/{card.parent.name}/{beside.name}", beside.read_bytes())
    for path in sorted(Path(config["docs_dir"], "notebooks").glob("*.py")):
        text, pictures = notebook_page(path)
        files.remove(files.get_file_from_path(f"notebooks/{path.name}"))
        add(f"notebooks/{path.stem}.md", text)
        for name, data in pictures.items():
            add(f"notebooks/{name}", data)
    return files


def _card(card):
    text = card.read_text(encoding="utf-8")
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def on_page_markdown(markdown, page, config, files):
    """Point links to model cards at their pages, and cited formulas at theirs."""
    markdown = re.sub(
        r"\]\(\.\./steer/zoo/([\w-]+)/README\.md\)", r"](cards/\1/index.md)", markdown
    )
    markdown = re.sub(r"\]\((notebooks/\w+)\.py\)", r"](\1.md)", markdown)
    if page.file.src_uri == "theory.md":
        return markdown
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"(?<!\[)theory \((\d+)\)", rf"[theory (\1)]({up}theory.md#f\1)", markdown)


def on_page_content(content, page, config, files):
    """Set the formulas of the theory, and link those that docstrings cite."""
    if page.file.src_uri == "theory.md":
        content = re.sub(
            r'<div class="highlight"><pre><span></span><code>(\(\d+\).*?)</code></pre></div>',
            lambda found: f'<pre class="formula">{set_formula(found[1])}</pre>',
            re.sub(r'<div class="language-text highlight">', '<div class="highlight">', content),
            flags=re.DOTALL,
        )
        return re.sub(r"<code>([^<]*)</code>", _inline, content)
    if page.file.src_uri.startswith("reference/"):
        return re.sub(
            r"theory \((\d+)\)", r'<a href="../theory.html#f\1">theory (\1)</a>', content
        )
    return content


def on_post_page(output, page, config):
    """Refuse a page that would load something from elsewhere."""
    loads = (
        r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//[^"]+|<link[^>]*stylesheet[^>]*//[^">]+'
    )
    if found := re.search(loads, output):
        LOG.warning("%s loads %s: keep a copy in docs/assets", page.file.src_uri, found[0])
    return output


def _inline(found):
    text = found[1]
    return f"<code>{symbols(text) if _is_formula(text) else text}</code>"


def _is_formula(text):
    """Whether inline code is mathematics: no path, no dotted name, no call of the library."""
    return not re.search(r"\w\.[a-z]|\w/\w|[a-z]{2,}_[a-z]{2,}|=\w+,|^[A-Za-z]{3,}$", text)


def symbols(text):
    """Write Greek letters as such, and what follows an underscore below the line.

    >>> symbols("alpha_t x_0 &lt;= log_w")
    'α<sub>t</sub> x<sub>0</sub> ≤ log_w'
    """
    text = re.sub(
        r"(?<![A-Za-z_])(" + "|".join(GREEK) + r")(?![A-Za-z])",
        lambda found: GREEK[found[1]],
        text,
    )
    text = re.sub(r"(?<![A-Za-z_])([A-Za-zα-ω∂∇][’']?)_([a-z0-9]{1,2})(?![A-Za-z0-9_])",
                  r"\1<sub>\2</sub>", text)  # fmt: skip
    text = re.sub(r"\^\(([^()]*)\)|\^(\w)", r"<sup>\1\2</sup>", text)
    for old, new in (("&lt;=", "≤"), ("&gt;=", "≥"), ("&lt;-", "←"), ("-&gt;", "→"),
                     ("sqrt(", "√("), (" - ", " − "), (" * ", " · "),
                     ("sum_i", "Σ<sub>i</sub>")):  # fmt: skip
        text = text.replace(old, new)
    return text


def set_formula(text):
    """Set a numbered formula: its number faint, its symbols as they are written by hand."""
    text = re.sub(r"<[^>]*>", "", text)
    number, rest = re.match(r"(\(\d+\))(.*)", text, re.DOTALL).groups()
    return f"<b>{html.escape(number)}</b>{symbols(rest)}"
