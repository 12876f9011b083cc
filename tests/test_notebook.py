"""A notebook: a bar, a result, a comparison and a tuned flow that show themselves."""

import base64
import io
import sys

import nbclient
import nbformat
import pytest
import torch
from PIL import Image

import steer
from steer.pictures import captioned_grid
from steer.sampling.progress import shown
from steer.shown import MOST, Report, page, picture, table

CELLS = [
    "import steer",
    "result = steer.sample(steer.load('emoji'), 'colour:name=red', ['fox', 'owl'], particles=2,\n"
    "                      steps=4, method='fmrg-j', progress=True)\nresult",
    "steer.compare(steer.load('emoji'), 'colour:name=red', prompts=['fox'], seeds=1,\n"
    "              methods=['none:steps=1', 'reno:steps=2,particles=1'], out='compared')",
    "tuned = steer.finetune(steer.load('emoji'), 'colour:name=red', ['fox <b>', 'owl'], steps=2,\n"
    "                       batch_size=4, rank=2)\ntuned",
    "tuned.at(0.5)",
]


def size_of(text):
    """The size of the first picture in an HTML text."""
    data = text.split('src="data:image/png;base64,')[1].split('"')[0]
    return Image.open(io.BytesIO(base64.b64decode(data))).size


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS])
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    made.metadata["kernelspec"] = kernel
    where = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    return nbclient.NotebookClient(made, timeout=120, resources=where).execute()


def data_of(notebook, cell, kind):
    """What a cell shows of a kind: its own value."""
    (value,) = (o for o in notebook.cells[cell].outputs if o.output_type == "execute_result")
    return value.data[kind]


def printed(notebook, cell):
    return "".join(o.text for o in notebook.cells[cell].outputs if o.output_type == "stream")


def test_a_bar_and_a_result(notebook):
    assert "fmrg-j: 100%" in printed(notebook, 1)
    assert "reward" in printed(notebook, 1)
    shown = Image.open(io.BytesIO(base64.b64decode(data_of(notebook, 1, "image/png"))))
    assert shown.width > 2 * 96


def test_a_comparison(notebook):
    text = data_of(notebook, 2, "text/html")
    assert "<th>" in text
    assert "reno" in text
    assert size_of(text)[0] > 200


def test_a_tuned_flow(notebook):
    """Base above, tuned below: two rows of two prompts; at another scale other pictures."""
    whole, half = (data_of(notebook, cell, "text/html") for cell in (3, 4))
    assert "Adapted(emoji, rank 2" in whole
    assert "scale 0.5" in half
    assert size_of(whole)[1] > 2 * 96
    assert whole.split("base64,")[1] != half.split("base64,")[1]


def test_its_output_is_small(notebook):
    assert len(nbformat.writes(notebook)) < 2_000_000


# ---------------------------------------------------------------- without a kernel


class Screen(io.StringIO):
    """A stream that says whether somebody looks."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def isatty(self):
        return self.looks


class Step:
    reward = torch.ones(2)


@pytest.mark.parametrize(
    ("looks", "wanted", "says"),
    [(False, None, False), (True, None, False), (True, True, True), (False, True, True),
     (True, False, False)],
)  # fmt: skip
def test_where_a_bar_is_shown(monkeypatch, looks, wanted, says):
    """Where nothing is said, a run of less than some seconds shows none."""
    screen = Screen(looks)
    monkeypatch.setattr(sys, "stderr", screen)
    assert len(list(shown([Step()] * 3, 3, "reno", wanted))) == 3
    assert ("reno" in screen.getvalue()) is says


def test_a_long_run_shows_one_where_somebody_looks(monkeypatch):
    monkeypatch.setattr("steer.sampling.progress.DELAY", 0.0)
    screen = Screen(True)
    monkeypatch.setattr(sys, "stderr", screen)
    list(shown([Step()] * 3, 3, "reno", None))
    assert "3/3" in screen.getvalue()


def test_a_file_gets_a_few_lines_at_most(monkeypatch):
    screen = Screen(False)
    monkeypatch.setattr(sys, "stderr", screen)
    list(shown([Step()] * 500, 500, "reno", True))
    assert screen.getvalue().count("\r") < 5


def test_pictures_stay_small():
    noise = captioned_grid([("", torch.rand(30, 3, 256, 256), ["a"] * 30)], 256)
    text = picture(noise)
    assert len(text) < 4 / 3 * MOST + 200
    assert size_of(text)[0] <= 900


def test_what_is_written_in_is_text(tmp_path):
    assert "<script>" not in page("<script>") + table("| <script> |\n|---|\n| <script> |")
    (tmp_path / "table.md").write_text("| a |\n|---|\n| <b> |")
    assert "&lt;b&gt;" in Report(tmp_path)._repr_html_()


def test_a_path_inside_shows_as_a_path(tmp_path):
    report = Report(tmp_path)
    assert report == tmp_path
    assert (report / "table.md")._repr_html_() is None


def test_a_toy_is_a_line():
    tuned = steer.finetune(Toy(), lambda x: x.sum(1), steps=1, batch_size=2, rank=1)
    assert "<img" not in tuned._repr_html_()
    assert "Adapted(" in tuned._repr_html_()


class Toy(steer.FlowMap):
    """A plane, no pictures."""

    def __init__(self):
        super().__init__()
        self.path, self.event_shape = steer.Linear(), (2,)
        self.layer = torch.nn.Linear(2, 2)

    def velocity(self, x, t):
        return self.layer(x)

    def jump(self, x, s, t):
        return x + (t - s) * self.layer(x)
