"""Check that a reward keeps its contract, and report figures.

>>> from rewards import load
>>> report = check(load("brightness"), size=16)
>>> report.ok
True
>>> [finding.name for finding in report.findings if finding.verdict == "warn"]
[]
"""

from rewards.checking.bench import PROMPTS
from rewards.checking.report import Finding, Report
from rewards.checking.run import CHECKS, check

__all__ = ["CHECKS", "PROMPTS", "Finding", "Report", "check"]
