"""`steer check-reward`: check that a reward keeps its contract, with figures."""

import json as json_
import sys

import rewards
from recipes.inputs import file_or_list
from recipes.terminal import say
from rewards.checking import Report, check
from steer.secrets import redacted

__all__ = ["check_reward"]

COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def check_reward(
    name: str,
    prompts: str | list[str] | None = None,
    size: int = 64,
    device: str | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Check a reward: shape, range, gradient, copies, cost, and its score on noise.

    The exit code is 0 where nothing failed (warnings are properties to know of), 1 where a check
    failed, 2 for a mistake in the command.

    Args:
        name: a name that `steer rewards` lists, a weighted sum of such, or file.py:Name.
        prompts: a text or jsonl file, or a list; the pictures get them in turn. Default: none, or
            a few simple ones if the reward needs prompts.
        size: side of the test pictures.
        device: device for the test. Default: where the reward is loaded, the CPU.
        seed: seed of pictures and directions.
        json: print only the report, as JSON, instead of a table.
    """
    asked = file_or_list(prompts)
    reward, name = rewards.load(name), redacted(name)
    report = check(reward, asked and asked.prompts, size, device=device, seed=seed)
    if json:
        say(json_.dumps({**report.as_dict(), "reward": name}, indent=2, allow_nan=False))
    else:
        _print(report, name)
    if not report.ok:
        sys.exit(1)


def _print(report: Report, name: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    height, width = report.size
    asked = "without prompts" if report.prompts is None else f"asked {report.prompts[0]!r} ..."
    title = escape(f"{name}: {width} x {height} pixels, {asked}")
    table = Table(box=None, pad_edge=False, title=title)
    table.title_justify = "left"
    for column in ("", "check", "figures", "what was seen"):
        table.add_column(column, no_wrap=column == "check")
    for finding in report.findings:
        colour = COLOURS[finding.verdict]
        figures = (f"{k.replace('_', ' ')} {v:.3g}" for k, v in finding.figures.items())
        table.add_row(
            f"[{colour}]{finding.verdict}[/{colour}]",
            finding.name,
            "\n".join(figures),
            escape(finding.line),
        )
    say(table)
    counts = {word: report.count(word) for word in COLOURS}  # type: ignore[arg-type]
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    verdict = "keeps the contract" if report.ok else "breaks the contract"
    say(f"{name} {verdict}: {told}")
