"""What the checks of a reward report: findings, each with a verdict, a line and figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from steer.reward import unknown

__all__ = ["Finding", "Report", "Seen", "Verdict", "graded", "said"]

Verdict = Literal["pass", "warn", "fail", "skip"]

Seen = tuple[Verdict, str, dict[str, float]]
"""What a check returns: verdict, line and figures of its `Finding`."""


@dataclass(frozen=True)
class Finding:
    """The finding of one check.

    Attributes:
        name: of the check, one of `rewards.checking.CHECKS`.
        verdict: "pass", "warn" (a property that users should know), "fail" (a fault) or "skip".
        line: what was found, and how to fix it if there is something to fix.
        figures: the measurements, name -> number.
    """

    name: str
    verdict: Verdict
    line: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The findings of all checks of a reward.

    Attributes:
        reward: its name.
        findings: one per check, in the order of `rewards.checking.CHECKS`.
        size: (height, width) of the pictures.
        device: where it ran.
        prompts: the prompt of each picture; None: it was scored without prompts.
    """

    reward: str
    findings: tuple[Finding, ...]
    size: tuple[int, int]
    device: str
    prompts: tuple[str, ...] | None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not any(finding.verdict == "fail" for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """Return the finding of a check.

        Raises:
            ValueError: no such check; the message has the nearest ones.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise unknown("check", name, [finding.name for finding in self.findings])

    def count(self, verdict: Verdict) -> int:
        """Count the findings of a verdict."""
        return sum(finding.verdict == verdict for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; numbers that are not finite are null."""
        findings = [
            {
                "name": f.name,
                "verdict": f.verdict,
                "line": f.line,
                "figures": {k: v if math.isfinite(v) else None for k, v in f.figures.items()},
            }
            for f in self.findings
        ]
        return {
            "reward": self.reward,
            "ok": self.ok,
            "size": list(self.size),
            "device": self.device,
            "prompts": None if self.prompts is None else list(self.prompts),
            "findings": findings,
        }


def graded(value: float, limits: tuple[float, float]) -> Verdict:
    """Return "pass" up to the first limit, "warn" up to the second, else "fail", also for NaN."""
    return "pass" if value <= limits[0] else "warn" if value <= limits[1] else "fail"


def said(error: Exception) -> str:
    """Return an exception's kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
