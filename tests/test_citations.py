"""`steer cite`: what a method is built of has its BibTeX."""

import re

from recipes.lists import cite
from steer.sampling.citations import CITATIONS
from steer.sampling.methods import TABLE


def test_noise_smc_cites_its_moves_and_its_temperatures(capsys):
    cite("noise-smc")
    printed = capsys.readouterr().out
    entries = dict(re.findall(r"@misc\{([\w-]+),.*?eprint = \{([\d.]+)\}", printed, re.DOTALL))
    assert entries == {"pcn": "1202.0709", "slice": "1001.0175", "adaptive-smc": "1306.6462"}
    assert "Murray, Iain and Adams, Ryan Prescott and MacKay, David J. C." in printed


def test_every_source_is_a_work_and_every_work_a_source():
    named = {key for method in TABLE.values() for key in method.source}
    assert named == set(CITATIONS)
