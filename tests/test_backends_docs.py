"""The lines about pipelines in the documents run, on tiny ones in the place of published ones."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest

from tests import tiny_pipelines as tiny

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)

STAND_INS = {
    "stabilityai/sdxl-turbo": "sdxl_turbo",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": "sana",
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": "sana_sprint",
}
"""Published checkpoint -> the tiny pipeline of its class."""

REPLACED = {
    '.to("cuda")': "",
    'device="cuda",': "",
    "dtype=torch.bfloat16,": "",
    "aesthetic + 0.5*pickscore": "contrast",
    '"aesthetic"': '"contrast"',
    "height=768": "height=32",
    "width=512": "width=16",
    "steps=200": "steps=1, batch_size=2, sweep=[], check_every=0, progress=False",
}
"""What a machine without a card and a network has instead."""


def small(name):
    """A tiny pipeline whose own size is its tiny one."""
    made = tiny.build(name)
    size = {k: v for k, v in tiny.CALLS[name].items() if k in ("height", "width")}
    call = {k: v for k, v in tiny.CALLS[name].items() if k not in size}
    kind = type(made)

    class Small(kind):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **{**size, **call, **kwargs})

        __call__.__signature__ = inspect.signature(kind.__call__)

    Small.__name__ = kind.__name__
    made.__class__ = Small
    return made


@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_the_lines_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def opened(name, **options):
        assert name in STAND_INS, name
        return small(STAND_INS[name])

    monkeypatch.setattr("steer.models.loading.open_pipeline", opened)
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained",
        classmethod(lambda cls, name, **options: opened(name)),
    )  # fmt: skip
    code = "\n".join(BLOCK.findall((ROOT / document).read_text(encoding="utf-8")))
    assert code
    for theirs, ours in REPLACED.items():
        code = code.replace(theirs, ours)
    scope = {"__name__": "block"}
    exec(compile(code, document, "exec"), scope)
    assert (tmp_path / "fox.png").is_file()
    assert (tmp_path / "runs" / "fox" / "README.md").is_file()
