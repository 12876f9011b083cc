"""`file.py:Name` in Python and on the command line, and the neighbours of such files."""

import sys
from pathlib import Path

import pytest
import torch

import rewards
import steer
from recipes.inputs import load_model
from steer.adapters.inject import adapt
from steer.adapters.store import save_adapters
from steer.user_code import from_file

FLOW = """
import torch
import steer
from near_scale import SCALE

class Toy(steer.FlowMap):
    path, event_shape = steer.Linear(), (3, 4, 4)
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 4)
    def velocity(self, x, t):
        return SCALE * self.net(x.to(self.net.weight)).to(x)
    def jump(self, x, s, t):
        return x + (t - s) * self.velocity(x, s)

def make():
    return Toy()

ready, number, later = Toy(), 3, lambda: 3

def late(images):
    import near_late
    return near_late.VALUE * images.mean((1, 2, 3))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file and two neighbours, and somewhere else to be."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "toy_flow.py").write_text(FLOW)
    (tmp_path / "code" / "near_scale.py").write_text("SCALE = 2.0\n")
    (tmp_path / "code" / "near_late.py").write_text("VALUE = 5.0\n")
    monkeypatch.chdir(tmp_path)
    before, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        if name.startswith(("near_", "_steer_file_")):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["Toy", "make", "ready"])
def test_a_file_gives_a_flow_as_on_the_command_line(here, name):
    text = f"code/toy_flow.py:{name}"
    flow, theirs = steer.load(text), load_model(text)
    assert type(flow).__name__ == "Toy"
    assert flow.name == theirs.name == text
    assert not flow.training
    assert not any(p.requires_grad for p in flow.parameters())
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(flow.jump(x, 0.0, 1.0), theirs.jump(x, 0.0, 1.0))


def test_a_files_flow_goes_where_it_is_asked_to(here):
    assert steer.load("code/toy_flow.py:Toy", dtype=torch.float64).net.weight.dtype.itemsize == 8
    assert steer.load("code/toy_flow.py:Toy", device="meta").net.weight.is_meta
    path = Path("code/toy_flow.py:make")
    assert steer.load(path).name == str(path)


def test_adapters_are_put_on_a_files_flow(here):
    tuned = adapt(steer.load("code/toy_flow.py:Toy"), rank=1)
    save_adapters(tuned, here / "lora")
    assert isinstance(steer.load("code/toy_flow.py:Toy", lora=here / "lora"), steer.Adapted)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("code/toy_flow.py:number", TypeError, "number gives a int: expected a steer.FlowMap"),
        ("code/toy_flow.py:later", TypeError, "later gives a int: expected a steer.FlowMap"),
        ("code/toy_flow.py:Toi", ValueError, "defines no 'Toi': did you mean Toy"),
        ("code/none.py:Toy", FileNotFoundError, "no file code/none.py: give the path of a Python"),
        ("code/toy_flow.py", ValueError, "is a file: give the folder that holds it"),
        ("nowhere", ValueError, "file.py:Name"),
    ],
)
def test_what_is_no_flow_is_refused(here, name, kind, words):
    with pytest.raises(kind) as caught:
        steer.load(name)
    assert words in str(caught.value)


def test_a_file_without_public_names_says_so(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("_hidden = 1\n")
    with pytest.raises(ValueError, match=r"defines no 'Toy': it defines no public names$"):
        from_file(file, "Toy")


def test_a_reward_imports_its_neighbours_at_once_and_later(here):
    images = torch.ones(1, 3, 4, 4)
    assert float(rewards.load("code/toy_flow.py:late")(images)) == 5.0
    assert sys.path[-1] == str(here / "code")  # last, so that it hides nothing
    assert sys.path.count(str(here / "code")) == 1


def test_each_file_has_its_own_neighbours(here):
    (here / "other").mkdir()
    (here / "other" / "near_scale.py").write_text("SCALE = 7.0\n")
    (here / "other" / "toy_flow.py").write_text("from near_scale import SCALE\n")
    assert from_file(Path("code/toy_flow.py"), "SCALE") == 2.0
    assert from_file(Path("other/toy_flow.py"), "SCALE") == 7.0
    assert from_file(Path("code/toy_flow.py"), "SCALE") == 2.0


def test_a_neighbour_that_fails_leaves_the_path_in_order(here):
    (here / "code" / "near_scale.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        steer.load("code/toy_flow.py:Toy")
    assert sys.path[0] != str(here / "code")
