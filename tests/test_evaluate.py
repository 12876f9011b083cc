"""What `steer eval` measures, of a model that knows all pictures by heart."""

import json
import subprocess
import sys

import pytest
import torch

import recipes.evaluate
from recipes.binding import colour_pairs
from recipes.cli import main
from recipes.data.emoji import load
from recipes.data.recolour import is_held_out, plain_label
from recipes.evaluate import STEPS, evaluate
from recipes.figures import estimate, markdown, rate
from recipes.inputs import load_model
from recipes.measure import draw, found, kid

HEART = '''
import torch, steer
from recipes.data import emoji
from recipes.data.recolour import HUES, dominant_colour, plain_label, recolour

class ByHeart(steer.FlowMap):
    """A point mass for each prompt: the picture that fits it best."""

    def __init__(self, pictures=None):
        super().__init__()
        self.path, self.event_shape = steer.Linear(), (3, 32, 32)
        self.pictures = pictures

    def given(self, prompts):
        return ByHeart(torch.stack([self.picture(p) for p in prompts]))

    def picture(self, prompt):
        data = emoji.load()
        words, colour = prompt.split(), None
        for i, label in enumerate(data.labels):
            if prompt in (label, f"{data.styles[i]} {label}"):
                return data.images[i]
        for i, label in enumerate(data.labels):
            if words and words[0] in HUES and plain_label(label) == " ".join(words[1:]):
                turned = recolour(data.images[i : i + 4], words[0])
                named = dominant_colour(turned)
                return turned[named.index(words[0]) if words[0] in named else 0]
        return data.images[len(prompt)]

    def jump(self, x, s, t):
        return x + (t - s) / (1 - s + 1e-6) * (self.pictures - x)

    def velocity(self, x, t):
        return (self.pictures - x) / (1 - t + 1e-6)

class Small(steer.FlowMap):
    def __init__(self):
        super().__init__()
        self.path, self.event_shape = steer.Linear(), (3, 4, 4)
'''
SMALL = {"repeats": 1, "pictures": 12, "paths": 2, "bindings": 24, "kernel": 24, "breadth": 2,
         "samples": 2}  # fmt: skip


class ByNumber:
    """A judge for one-pixel pictures: picture i fits name i."""

    def similarity(self, images, names):
        numbers = torch.tensor([float(name) for name in names])
        return -(images.flatten(1)[:, :1] - numbers).abs()


def test_a_picture_is_found_among_so_many_names():
    names = [str(i) for i in range(50)]
    images = torch.arange(50.0)[:, None, None, None]
    assert found(ByNumber(), images, names, names, captions=10).all()
    shifted = images - 0.6  # nearer to the one before, wherever that one stands to choose from
    whole = found(ByNumber(), shifted, names, names, captions=50)
    assert whole.tolist() == [True] + [False] * 49
    some = found(ByNumber(), shifted, names, names, captions=10)
    assert 35 <= some.sum() < 50
    assert torch.equal(some, found(ByNumber(), shifted, names, names, captions=10))


def test_estimates_leave_out_what_is_not_known():
    assert estimate(torch.tensor([torch.nan])) == (None, None)
    assert estimate(torch.tensor([2.0])) == (2.0, None)
    assert rate([]) == (None, None)
    assert markdown(["a"], [[estimate(torch.tensor([1.0, 3.0]))]]).endswith("| 2.0000 ± 1.0000 |")


def test_the_kernel_distance_has_no_bias_and_sees_a_shift():
    x = torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(0))
    same, spread = kid(x[0], x[1])
    assert abs(same) < 3 * spread
    assert kid(x[0], x[1] + 1)[0] > 20 * spread
    state = torch.random.get_rng_state()
    assert kid(x[0], x[1]) == (same, spread)
    assert torch.equal(state, torch.random.get_rng_state())


def test_no_real_picture_has_the_colour_of_a_pair():
    data = load()
    pairs = colour_pairs(data)
    for kind, count in (("trained", 1000), ("held out", 100)):
        assert len(pairs[kind]) >= count
        for colour, concept, _ in pairs[kind][::50]:
            rows = [i for i, label in enumerate(data.labels) if plain_label(label) == concept]
            assert not any(colour in data.colours[i] for i in rows)
            left_out = {is_held_out(data.labels[i], colour) for i in rows}
            assert left_out == {kind == "held out"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate")
    (out / "heart.py").write_text(HEART)
    model = f"{out / 'heart.py'}:ByHeart"
    real, calls = recipes.evaluate._kernel_distance, []

    def counted(*args):
        calls.append(args)
        return real(*args)

    def interrupted(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes.evaluate, "_kernel_distance", counted)
        with patch.context() as inner:
            inner.setattr(recipes.evaluate, "_distances", interrupted)
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, out / "run", **SMALL)
        metrics = evaluate(model, out / "run", **SMALL)
    assert len(calls) == 1, "what was measured before the interruption was measured again"
    assert not list(out.glob(".run*"))
    return metrics, out / "run"


def test_a_model_that_knows_the_pictures_is_as_good_as_they_are(measured):
    metrics, _ = measured
    retrieval = metrics["retrieval_1_of_100"]
    assert min(retrieval["relative_to_real"][str(k)] for k in STEPS) > 0.95
    for figure in ("style_binding", "colour_binding"):
        for kind in ("trained", "held out"):
            model, real = (metrics[figure][f"{kind}, {whose}"] for whose in ("model", "real"))
            assert model["pictures"] == real["pictures"] == 12
            for what in ("style", "label") if figure == "style_binding" else ("colour",):
                assert model[what]["mean"] == pytest.approx(real[what]["mean"], abs=1e-6)
            assert model["both"]["mean"] <= min(
                model[what]["mean"] for what in model if what not in ("both", "pictures")
            )
    assert metrics["colour_binding"]["held out, real"]["colour"]["mean"] == 1
    share = metrics["memorisation"]["share_nearer"]
    assert share["real to nearest other real"]["mean"] == pytest.approx(0.05, abs=0.005)
    assert share["label prompts"]["mean"] > 0.7
    assert metrics["nearest_training_distance"]["label prompts"] < 0.01
    assert metrics["diversity"]["labels"]["model"]["mean"] == pytest.approx(0, abs=0.1)
    assert metrics["diversity"]["groups"]["real"]["mean"] > 5
    assert {*metrics["kernel_distance"]} == {f"{k} steps" for k in STEPS} | {"real to real"}
    assert max(metrics["composition_error"].values()) < 1e-3


def test_the_figures_are_written(measured):
    metrics, out = measured
    names = {"metrics.json", "broad_4_step.png", *(f"labels_{k}_step.png" for k in STEPS)}
    assert {p.name for p in out.iterdir()} == names
    written = json.loads((out / "metrics.json").read_text())
    assert written["retrieval_1_of_100"]["rate"] == metrics["retrieval_1_of_100"]["rate"]
    assert written["sizes"] == SMALL


def test_one_picture_a_prompt(measured):
    flow = load_model(measured[0]["model"])
    images = draw(flow, ["fox", "cat", "fox"], 1, seed=0, batch=2)
    assert images.shape == (3, 3, 32, 32)
    assert torch.allclose(images[0], images[2], atol=1e-3)


def test_what_cannot_be_measured_is_refused(measured, tmp_path, capsys):
    small = measured[0]["model"].replace("ByHeart", "Small")
    assert main(["eval", "--model", small, "--out", str(tmp_path / "run")]) == 2
    assert "(3, 4, 4)" in capsys.readouterr().err
    assert main(["eval", "--samples", "0", "--out", str(tmp_path / "run")]) == 2
    assert "samples must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(measured, tmp_path):
    _, folder = measured
    options = [word for name, size in SMALL.items() for word in (f"--{name}", str(size))]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recipes.cli", "eval", "--devices", "2",
         "--model", f"{folder.parent / 'heart.py'}:ByHeart", "--out", str(tmp_path / "run"),
         *options],
        check=True, timeout=300,
    )  # fmt: skip
    made = json.loads((tmp_path / "run/metrics.json").read_text())
    one = json.loads((folder / "metrics.json").read_text())
    assert {**made, "seconds": 0} == {**one, "seconds": 0}
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in folder.iterdir()}
    assert not list(tmp_path.glob(".run*"))


def shares(monkeypatch, second):
    """Evaluate parts that take no time: the first says its paths, the second is `second`."""
    monkeypatch.setattr(recipes.evaluate.fashion_data, "load", lambda *_: None)
    monkeypatch.setattr(recipes.evaluate, "Judge", lambda folder: None)
    monkeypatch.setattr(recipes.evaluate, "show_classes", lambda metrics: None)

    def parts(flow, posterior, data, judge, kernel, paths, out):
        return [lambda: {"paths of the first": paths}, lambda: second(kernel, paths)]

    monkeypatch.setattr(recipes.evaluate, "class_parts", parts)


def test_parts_of_other_settings_are_not_taken_and_not_deleted(monkeypatch, tmp_path):
    def stopped(kernel, paths):
        raise KeyboardInterrupt

    sizes = dict.fromkeys(("repeats", "pictures", "bindings", "breadth", "samples"), 1)
    given = {"model": "fashion", "out": tmp_path / "run", "kernel": 1, **sizes}
    shares(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(paths=2, **given)
    shares(monkeypatch, lambda kernel, paths: {"rows": kernel})
    with pytest.raises(FileExistsError, match=r"other settings.*paths.*--overwrite"):
        evaluate(paths=16, **given)
    whole = evaluate(paths=2, **given)
    assert whole["paths of the first"] == 2
    shares(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(paths=2, **given)
    shares(monkeypatch, lambda kernel, paths: {"rows": kernel})
    assert evaluate(paths=16, overwrite=True, **given)["rows"] >= 16  # as many as paths


def test_a_full_disk_at_the_end_keeps_what_was_measured(monkeypatch, tmp_path):
    calls = []

    def second(kernel, paths):
        calls.append(paths)
        return {}

    def full(*_):
        raise OSError(28, "No space left on device")

    shares(monkeypatch, second)
    with monkeypatch.context() as patch:
        patch.setattr(recipes.evaluate, "write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            evaluate("fashion", tmp_path / "run", paths=2)
    evaluate("fashion", tmp_path / "run", paths=2)
    assert calls == [2]
