"""Plots: their legend, axes and colours; a run's plots drawn again; the film of a run."""

import contextlib
import io
import json
import sys
from functools import partial

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

import steer
from recipes import films
from recipes.cli import main
from recipes.figures import Estimate
from recipes.partial import Partial
from recipes.plots import charts, style
from recipes.plots.charts import Point, legend_of, methods
from recipes.plots.compared import plot_compared
from steer.film import animation, movie

LABELS = ("network calls a picture", "reward: clip")


def points(method, counts, name="steps", fixed=""):
    return [
        Point(method, Estimate(float(k), None), Estimate(k / 10, 0.1), {name: k}, fixed)
        for k in counts
    ]


PANELS = {
    "a": [*points("none", [1]), *points("best-of-n", [10, 100], "candidates", "1 step"),
          *points("reno", [4, 8, 16]), *points("fmrg-j", [4, 8, 12])],
    "b": points("reno", [4, 8, 16]),
}  # fmt: skip


def figure_of(panels, look="light"):
    return methods(panels, LABELS, style.theme(look), log_x=True)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_legend_has_an_entry_a_method():
    assert legend(figure_of(PANELS)) == [
        "reno: 4 to 16 steps", "fmrg-j: 4 to 12 steps", "none, 1 step",
        "best-of-n, 1 step: 10 to 100 candidates", charts.ERRORS,
    ]  # fmt: skip


def test_a_method_has_one_colour_in_all_panels_and_numbers_beside_its_points():
    figure = figure_of(PANELS)
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == LABELS
    colours = [
        {line.get_color() for line in axis.lines if list(line.get_xdata()) == [4, 8, 16]}
        for axis in (left, right)
    ]
    assert colours[0] == colours[1]
    assert len(colours[0]) == 1
    assert [t.get_text() for t in right.texts] == ["4", "8", "16"]
    assert left.get_xscale() == "log"


def test_a_line_follows_the_setting_and_not_the_axis():
    away = [Point("reno", Estimate(x, None), Estimate(0.5, None), {"steps": k})
            for x, k in ((3.0, 4), (1.0, 16), (2.0, 8))]  # fmt: skip
    (axis,) = methods({"a": away}, LABELS, style.theme("light")).axes
    assert list(axis.lines[0].get_xdata()) == [3.0, 2.0, 1.0]


def test_two_options_are_two_groups_and_a_missing_mean_is_left_out():
    rows = [*points("split", [4], fixed="strength 1"), *points("split", [4], fixed="strength 3"),
            Point("reno", Estimate(None, None), Estimate(1.0, None), {"steps": 4})]  # fmt: skip
    found = legend(figure_of({"a": rows}))
    assert found[:-1] == ["split, strength 1, 4 steps", "split, strength 3, 4 steps"]
    assert legend_of(points("x", [2])) == ("x, 2 steps", None)


def luminance(colour):
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("look", ["light", "dark"])
def test_colours_stand_out(look):
    """WCAG: text 4.5 to 1 and graphics 3 to 1 where they carry the plot (three first colours)."""
    chosen = style.theme(look)

    def contrast(colour):
        a, b = sorted((luminance(colour), luminance(chosen.paper)))
        return (b + 0.05) / (a + 0.05)

    assert contrast(chosen.ink) > 7
    assert min(contrast(c) for c in chosen.colours[:3]) > 3
    assert contrast(chosen.faint) > 3
    assert len(set(chosen.colours)) == len(chosen.colours)


def test_both_formats_are_the_same_twice_and_nothing_else_is_left(tmp_path):
    draw = partial(methods, PANELS, LABELS, log_x=True)
    first = [f.read_bytes() for f in style.save(draw, tmp_path / "x.png")]
    again = [f.read_bytes() for f in style.save(draw, tmp_path / "x.png")]
    assert first == again
    assert first[1].startswith(b"<?xml")
    assert {p.name for p in tmp_path.iterdir()} == {"x.png", "x.svg"}
    dark = style.save(draw, tmp_path / "dark.png", "dark", ["png"])
    corner = Image.open(dark[0]).convert("RGB").getpixel((0, 0))
    assert sum(corner) < 120
    with pytest.raises(ValueError, match="png or svg, not as 'pdf'"):
        style.save(draw, tmp_path / "x", formats=["pdf"])
    with pytest.raises(ValueError, match="light, dark"):
        style.save(draw, tmp_path / "x", "grey")


def row(method, steps, value, **more):
    estimate = {"mean": value, "error": 0.1}
    kinds = dict.fromkeys(("reward", "judge", "diversity", "nfe"), estimate)
    return {"method": method, "steps": steps, "particles": 1, "options": {},
            "summary": {"all": kinds}} | more  # fmt: skip


def test_the_plots_of_a_run_are_drawn_again(tmp_path, capsys):
    figures = {"reward": "clip", "methods": {"a": row("none", 1, 0.5), "b": row("reno", 4, 0.7)}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/figures.json").write_text(json.dumps(figures))
    command = ["plot", str(tmp_path / "run"), "--theme", "dark", "--formats", "[svg]"]
    assert main([*command, "--out", str(tmp_path / "paper")]) == 0
    names = {p.name for p in (tmp_path / "paper").iterdir()}
    assert names == {f"{n}_dark.svg" for n in ("reward_nfe", "reward_diversity", "judge_reward")}
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"figures.json"}
    assert "reward_nfe_dark.svg" in capsys.readouterr().out


def test_figures_of_an_older_run_are_drawn(tmp_path):
    old = {"methods": {"reno, 4 steps": {"summary": row("reno", 4, 0.7)["summary"]}}}
    assert len(plot_compared(old, tmp_path, formats=["svg"])) == 3


def test_the_front_of_a_tuning_run_is_drawn_again(tmp_path):
    entries = [
        {"scale": s, "steps": k, "alarms": ["drift"] * (s == 1), "reward": s, "judge": 1 - s,
         "kid": s, "diversity": 2 - s}
        for k in (1, 4) for s in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    (tmp_path / "front.json").write_text(json.dumps(entries))
    assert main(["plot", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"front.json", "front.png", "front.svg"}
    figure = charts.front(entries, style.theme("light"))
    assert legend(figure) == [
        "1 step",
        "4 steps",
        "an alarm was raised",
        "numbers: scale of the adapters",
    ]


def test_a_front_of_adapters_begins_at_the_base():
    def at(name, x, y, scale=1.0):
        return Point(name, Estimate(x, 0.1), Estimate(y, 0.1), {"scale": scale})

    parts = {"base": [at("base", 1.0, 0.5)], "adapters": [at("nft", 0.9, 0.6, 0.5),
             at("nft", 0.8, 0.7)], "methods": [at("reno, 4 steps", 0.9, 0.8)]}  # fmt: skip
    sections = {"1 step": {"reward": parts, "judge": parts}, "4 steps": {"reward": parts,
                "judge": parts}}  # fmt: skip
    figure = charts.tuned_fronts(sections, style.theme("dark"))
    above, beside, below, _ = figure.axes
    assert [a.get_title() for a in (above, beside)] == ["1 step", "4 steps"]
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "diversity (feature distance)")
    assert (above.get_ylabel(), below.get_ylabel()) == ("reward", "held-out judge's score")
    assert [1.0, 0.9, 0.8] in [list(line.get_xdata()) for line in above.lines]
    assert [t.get_text() for t in above.texts] == ["0.5", "1"]
    assert legend(figure)[:3] == ["base", "nft", "reno, 4 steps"]


def test_rules_are_grouped_by_their_family():
    lines = {"lsd": [1.0, 0.5], "imf": [0.9, 0.4], "mine": [0.8, 0.3]}
    panel = ("jumps", "distance", (1, 4), lines)
    families = {"lsd": "Lagrangian", "imf": "Eulerian", "mine": ""}
    figure = charts.curves([panel, panel], families, style.theme("light"))
    assert [t for t in legend(figure) if t] == [
        "Eulerian",
        "imf",
        "Lagrangian",
        "lsd",
        "other",
        "mine",
    ]
    assert {line.get_color() for line in figure.axes[0].lines} == {
        *style.theme("light").colours[:2],
        style.theme("light").faint,
    }


def test_a_folder_without_numbers_says_what_to_give(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "neither figures.json nor front.json" in capsys.readouterr().err
    (tmp_path / "figures.json").write_text("{")
    assert main(["plot", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err


# ------------------------------------------------------------------ film


@pytest.fixture(scope="module")
def flow():
    return steer.load("emoji")


@pytest.mark.parametrize("method", ["none", "fmrg-j", "reno", "best-of-n"])
def test_a_film_ends_with_the_pictures_of_the_run(flow, method):
    film = steer.Film(flow, ["fox", "owl"], particles=2)
    plain = steer.sample(flow, "brightness", ["fox", "owl"], 3, 3, method)
    result = steer.sample(flow, "brightness", ["fox", "owl"], 3, 3, method, callback=film)
    assert torch.equal(result.x, plain.x)  # looking changes nothing
    assert result.nfe == plain.nfe
    last = film.frames[-1]
    assert last.time == 1.0
    assert torch.equal(last.images, (result.images[0, :2].clamp(0, 1) * 255).round().byte())
    assert last.rewards.tolist() == pytest.approx(result.rewards[0, :2].tolist())


def test_a_film_shows_the_lookahead(flow):
    film, seen = steer.Film(flow, "fox", particles=1), []
    steer.sample(
        flow, "brightness", "fox", 1, 4, "none",
        callback=lambda p: (film(p), seen.append((p.x, p.time))),
    )  # fmt: skip
    x, t = seen[1]
    expected = flow.decode(flow.given(["fox"]).lookahead(x, t)).clamp(0, 1)
    assert torch.equal(film.frames[1].images, (expected * 255).round().byte())


@pytest.mark.parametrize("make", [animation, movie])
@pytest.mark.parametrize("milliseconds", [0, -5, float("nan")])
def test_a_time_that_is_none_is_refused(make, milliseconds):
    with pytest.raises(ValueError, match=r"milliseconds must be (above zero|a number)"):
        make({}, milliseconds)


def test_a_film_without_an_encoder_is_a_gif(flow, tmp_path, monkeypatch, capsys):
    class Cannot:
        class FFmpegError(Exception):
            pass

        @staticmethod
        def open(*_, **__):
            return contextlib.nullcontext(Cannot)

        @staticmethod
        def add_stream(*_):
            raise ValueError("encoder not found")

    monkeypatch.setitem(sys.modules, "av", Cannot)
    monkeypatch.setattr(films, "find_spec", lambda name: name)
    film = steer.Film(flow, "fox", particles=2)
    steer.sample(flow, "brightness", "fox", 2, 2, "none", callback=film)
    with Partial(tmp_path / "run", {"a": 1}) as partial:
        reel = films.Reel(True, ["fox"])
        reel.films["guided"] = film
        reel.keep(partial)
        assert sorted(films.files_of(partial, ["guided"])) == ["film.gif", "filmstrip.png"]
    assert "cannot write H.264" in "".join(capsys.readouterr())


def test_a_strip_and_an_animation(flow, tmp_path):
    films = {}
    for method in ("none", "fmrg-j"):
        films[method] = steer.Film(flow, "fox", particles=2)
        steer.sample(flow, "brightness", "fox", 2, 5, method, callback=films[method])
    strip = steer.filmstrip(films, columns=3)
    assert strip.height == 2 * (96 + 2 * 16 + 6) + 6
    moving = Image.open(io.BytesIO(steer.animation(films)))
    assert moving.n_frames == 5
    moving.seek(4)
    assert moving.info["duration"] == 2000
    end = (films["fmrg-j"].frames[-1].images[0].float()).mean()
    assert Image.open(films["fmrg-j"].gif(tmp_path / "new/x.gif")).n_frames == 5
    pytest.importorskip("av")
    assert films["fmrg-j"].mp4(tmp_path / "new/x.mp4").read_bytes()[4:8] == b"ftyp"
    assert Image.open(films["fmrg-j"].save(tmp_path / "new/x.png")).width > 400
    assert end > films["none"].frames[-1].images[0].float().mean()  # it was asked to be bright
    kept = steer.Film.of(films["none"].tensors())
    assert kept.strip().tobytes() == films["none"].strip().tobytes()


def test_a_film_of_nothing_says_so(flow):
    with pytest.raises(ValueError, match="no frames yet"):
        steer.Film(flow).strip()
    with pytest.raises(ValueError, match="at least 1"):
        steer.Film(flow, particles=0)
    plane = steer.GaussianMixture(torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="needs pictures"):
        steer.sample(plane, lambda x: x[:, 0], method="none", steps=1, callback=steer.Film(plane))


def test_a_run_folder_has_its_film(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["sample", "--prompt", "[fox, owl]", "--reward", "brightness", "--steps", "3",
               "--particles", "2", "--film", "true", "--out", str(out)]  # fmt: skip
    assert main(command) == 0
    with Image.open(out / "film.gif") as film:
        assert film.n_frames == 3
    with Image.open(out / "filmstrip.png") as strip:
        assert strip.width > 3 * 96
    assert main([*command, "--overwrite", "true"]) == 0  # it is known as a run's own
    assert (out / "film.gif").exists()
    av = pytest.importorskip("av")
    with av.open(str(out / "film.mp4")) as film, Image.open(out / "film.gif") as gif:
        pages = [frame.to_image() for frame in film.decode(video=0)]
        assert len(pages) == 3 + 9  # the last of three stays two seconds, 200 ms a page
        assert pages[0].size == (gif.width + gif.width % 2, gif.height + gif.height % 2)
        first = pages[0].crop((0, 0, *gif.size))
        apart = ImageChops.difference(first, gif.convert("RGB"))
        assert ImageStat.Stat(apart).mean < [6.0] * 3  # it is the same page, less what is lost


def test_a_film_without_pyav_says_what_to_install(flow, tmp_path, monkeypatch):
    film = steer.Film(flow, "fox", particles=1)
    steer.sample(flow, "brightness", "fox", 1, 1, "none", callback=film)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"flowsteer\[video\]"):
        film.mp4(tmp_path / "x.mp4")
    assert not (tmp_path / "x.mp4").exists()
