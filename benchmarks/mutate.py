"""Seeded single-line changes in the mathematics, and whether the matching tests detect them.

    python -m benchmarks.mutate --out outputs/mutate --minutes 40

In a copy of the tree, one change is made at a time: an operator, sign, constant or comparison is
changed, a term, keyword or call dropped, arguments or branches swapped. torch is imported once.
Each change then runs its module's own tests in a fork, until one fails or three times their normal
time is up. Results are appended to `mutants.jsonl`, so an interrupted run continues; `--again`
tries the survivors again. Not changed are imports, annotations, defaults, messages, conditions
that only guard a `raise`, and numbers below 1e-6. mutmut and cosmic-ray are not used, because
neither takes a seeded sample, drops terms, or runs only the matching tests.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
POLICY, VALUE = "objectives_policy", "objectives_value"
TESTS = {
    "path": "path flow", "flow": "flow wrapped", "exact": "exact", "noise": "noise",
    "posterior": VALUE, "batches": "state noise",
    "guidance/ascent": "ascent", "guidance/control": "control", "guidance/kernel": "kernel",
    "guidance/population": "guidance stream", "guidance/potential": "potential",
    "guidance/resampler": "resampler", "guidance/smc": "guidance stream",
    "guidance/state": "state weights kernel", "guidance/weights": "weights",
    "sampling/forecast": "sample stream", "sampling/temperature": "sample",
    "sampling/start": "sample",
    "objectives/adjoint": f"{VALUE} objectives", "objectives/amortise": "objectives",
    "objectives/batch": f"objectives {POLICY} {VALUE}", "objectives/direct": "objectives",
    "objectives/grpo": POLICY, "objectives/nft": POLICY, "objectives/parts": "objectives",
    "objectives/policy": POLICY, "objectives/regression": "rules",
    "objectives/table": "objectives", "objectives/transport": f"objectives {VALUE}",
    "objectives/value": VALUE,
    "models/classifier_free": "cfg", "one_time": "one_time",
    "objectives/derivative": POLICY, "sampling/lineage": "lineage",
    "training/metric": "rules", "training/rules/objective": "map_rules",
    "training/rules/eulerian": "map_rules", "training/rules/lagrangian": "map_rules",
    "training/rules/semigroup": "map_rules",
    "backends/pipeline": "backends", "backends/noise_prediction": "backends",
    "backends/latents": "backends backends_gradient", "backends/conditions": "backends",
    "backends/deducing": "backends_generic", "backends/two_time": "backends backends_gradient",
    "backends/flow_matching": "backends", "adapters/attach": "tuned_further backends_lora",
    "models/pair": "backends_gradient",
}  # fmt: skip
"""Module of `steer/` -> its test files; a module's own doctests run with them."""
EQUIVALENT = ROOT / "benchmarks" / "equivalent.json"
"""File -> changed line -> why no test can distinguish it from the original."""

TURNED: dict[type, list[Any]] = {
    ast.Add: [ast.Sub()], ast.Sub: [ast.Add()], ast.Mult: [ast.Div()], ast.Div: [ast.Mult()],
    ast.Pow: [ast.Mult()], ast.FloorDiv: [ast.Mult()], ast.Mod: [ast.FloorDiv()],
    ast.Lt: [ast.LtE(), ast.Gt()], ast.LtE: [ast.Lt(), ast.Gt()], ast.Gt: [ast.GtE(), ast.Lt()],
    ast.GtE: [ast.Gt(), ast.Lt()], ast.Eq: [ast.NotEq()], ast.NotEq: [ast.Eq()],
    ast.Is: [ast.IsNot()], ast.IsNot: [ast.Is()], ast.And: [ast.Or()], ast.Or: [ast.And()],
}  # fmt: skip
TERMS = ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow | ast.BitAnd
CALLS = {"abs", "clamp", "detach", "exp", "log", "sqrt", "square"}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield (kind, expression) for possible replacements of this node."""
    match node:
        case ast.BinOp(left, op, right):
            yield from (("operator", ast.BinOp(left, o, right)) for o in TURNED.get(type(op), []))
            if isinstance(op, TERMS):
                yield "dropped term", left
            if isinstance(op, ast.Add | ast.Mult | ast.BitAnd):
                yield "dropped term", right
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield "sign", operand
        case ast.Compare(left, [op], right):
            for other in TURNED.get(type(op), []):
                yield "comparison", ast.Compare(left, [other], right)
        case ast.BoolOp(op, values):
            yield "operator", ast.BoolOp(TURNED[type(op)][0], values)
        case ast.Constant(bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(float(value)) if not 0 < value < 1e-6:
            yield "constant", ast.Constant(2 * value or 1.0)
        case ast.IfExp(test, body, orelse):
            yield "swapped branches", ast.IfExp(test, orelse, body)
        case ast.Call(f, args, keywords):
            if not any(isinstance(a, ast.Starred) for a in args):
                for i in range(1, len(args)):
                    swapped = [*args[: i - 1], args[i], args[i - 1], *args[i + 1 :]]
                    yield "swapped arguments", ast.Call(f, swapped, keywords)
            for i in range(len(keywords)):
                yield "dropped keyword", ast.Call(f, args, keywords[:i] + keywords[i + 1 :])
            if isinstance(f, ast.Attribute) and f.attr in CALLS:
                module = isinstance(f.value, ast.Name) and f.value.id in ("math", "torch")
                yield "dropped call", args[0] if module else f.value


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the direct children of a node that may be changed."""
    match node:
        case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Assert():
            return
        case ast.If(body=[ast.Raise()], orelse=parts) | ast.FunctionDef(body=parts):
            yield from parts
        case ast.ClassDef(body=parts) | ast.Call(ast.Name("cast"), [_, *parts]):
            yield from parts
        case ast.Lambda(body=part) | ast.AnnAssign(value=part):
            yield from [part] if part else []
        case _:
            yield from ast.iter_child_nodes(node)


def mathematics(node: ast.AST) -> Iterator[ast.expr]:
    """Yield all expressions below a node that may be changed."""
    for child in inside(node):
        if isinstance(child, ast.expr) and child.lineno == child.end_lineno:
            yield child
        yield from mathematics(child)


def mutants(source: str, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the changes of a source in random order: line, kind, old and new text, new source."""
    lines, seen = source.splitlines(keepends=True), set()
    nodes = mathematics(ast.parse(source))
    every = [(node, kind, new) for node in nodes for kind, new in changes(node)]
    draw.shuffle(every)
    for node, kind, new in every:
        row, place = lines[node.lineno - 1], (node.lineno, node.col_offset, node.end_col_offset)
        goal = _tree(source, (type(node), *place), new)
        for text in (ast.unparse(new), f"({ast.unparse(new)})"):  # with brackets if needed
            start, end = row.encode()[: place[1]], row.encode()[place[2] :]
            changed = start.decode() + text + end.decode()
            whole = "".join([*lines[: node.lineno - 1], changed, *lines[node.lineno :]])
            if changed != row and whole not in seen and _tree(whole) == goal:
                seen.add(whole)
                old, now = row.strip(), changed.strip()
                nth = [line.strip() for line in lines[: place[0] - 1]].count(old)  # equal lines
                yield {
                    "line": place[0], "nth": nth, "kind": kind,
                    "old": old, "new": now, "source": whole,
                }  # fmt: skip
                break


def _tree(source: str, place: tuple[Any, ...] = (), new: ast.expr | None = None) -> str:
    """Return the syntax tree of a source with `new` at a place, as text; "" if it is invalid."""

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            at = (getattr(node, n, None) for n in ("lineno", "col_offset", "end_col_offset"))
            return new if (type(node), *at) == place else self.generic_visit(node)

    try:
        return ast.dump(Put().visit(ast.parse(source)))
    except SyntaxError:
        return ""


def run_tests(tree: Path, arguments: list[str], seconds: float) -> tuple[str, float]:
    """Run pytest in a fork in a tree; return caught, survived or timeout, and the seconds."""
    began, child = time.monotonic(), os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()
            os.chdir(tree)
            sys.path[:0] = [str(tree)]
            for stream in range(3):
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            import pytest

            code = int(pytest.main(arguments))
        finally:
            os._exit(code)
    while time.monotonic() - began < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "caught" if status else "survived", time.monotonic() - began
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - began


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results in Markdown: one line per file, then the survivors."""
    known = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    lines = ["| file | mutants | caught | equivalent | survived |", "|---|---|---|---|---|"]
    counts, rest = [], []
    for name in dict.fromkeys(row["file"] for row in rows):
        own = [row for row in rows if row["file"] == name]
        left = [row for row in own if row["result"] == "survived"]
        open_ = [row for row in left if row["new"] not in known.get(name, {})]
        counts.append((len(own), len(own) - len(left), len(left) - len(open_), len(open_)))
        lines.append(f"| `{name}` | {' | '.join(map(str, counts[-1]))} |")
        rest += [f"- `{name}:{r['line']}` `{r['old']}` → `{r['new']}`" for r in open_]
    whole, caught, same, left = (sum(column) for column in zip((0, 0, 0, 0), *counts, strict=True))
    share = caught / max(1, whole - same)
    lines += [f"| all | {whole} | {caught} ({share:.1%}) | {same} | {left} |", "", *rest]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run as many changes as there is time for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/mutate"))
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="begin nothing after this long"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=12, help="the most changes of one file")
    parser.add_argument("--only", nargs="*", default=list(TESTS), help="modules, as in TESTS")
    parser.add_argument("--again", action="store_true", help="try the survivors again")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    record, done = options.out / "mutants.jsonl", {}
    for line in record.read_text().splitlines() if record.exists() else []:
        row = json.loads(line)
        done[row["file"], row["old"], row["new"], row.get("nth", 0)] = row
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # a stale cache file could hide a change within the same second
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        chosen, bounds = {}, {}
        for module in options.only:
            source, draw = (tree / f"steer/{module}.py").read_text(), f"{options.seed} {module}"
            chosen[module] = list(islice(mutants(source, random.Random(draw)), options.each))
        for k, module in product(range(options.each), options.only):  # alternating between files
            if k >= len(chosen[module]) or time.monotonic() > until:
                continue
            name, mutant = f"steer/{module}.py", chosen[module][k]
            source = mutant.pop("source")
            key = (name, mutant["old"], mutant["new"], mutant["nth"])
            again = options.again and done.get(key, {}).get("result") == "survived"
            if key in done and not again:
                continue
            files = [name, *(f"tests/test_{test}.py" for test in TESTS[module].split())]
            arguments = ["-x", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:randomly"]
            if module not in bounds:
                result, took = run_tests(tree, [*arguments, *files], 900)
                bounds[module] = 3 * took + 20 if result == "survived" else 0
            if not bounds[module]:
                print(f"{name}: {' '.join(files)} fail without any change", flush=True)
                continue
            original = (tree / name).read_text()
            (tree / name).write_text(source)
            result, took = run_tests(tree, [*arguments, *files], bounds[module])
            (tree / name).write_text(original)
            done[key] = {"file": name, **mutant, "result": result, "seconds": round(took, 1)}
            with record.open("a") as file:
                file.write(json.dumps(done[key], ensure_ascii=False) + "\n")
            print(f"{result} {name}:{mutant['line']} {key[1]} -> {key[2]}", flush=True)
    current = [row for key, row in done.items() if key[1] in (ROOT / key[0]).read_text()]
    (options.out / "table.md").write_text(table(current))
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
