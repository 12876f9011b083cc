"""What commands are given: prompts, pictures and a model's own defaults, read in one way."""

import json
import time

import pytest
import torch
from PIL import Image, ImageFont

from recipes import defaults
from recipes.defaults import listed, own, reward_of, tuning_prompts
from recipes.inputs import asked_for, file_or_list, read_picture, read_prompts, takes_prompts
from recipes.terminal import console
from steer import pictures
from steer.exact import GaussianMixture
from steer.models.loading import load
from steer.pictures import captioned_grid, contact_sheet, save_picture

# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_lines_end_where_editors_end_them(tmp_path, name):
    """A byte-order mark, three kinds of line ends; what Unicode calls a separator ends no line."""
    lines = ["ein Apfel", "two\u2028halves", "", "größer\x85\u2029still one"]
    if name.endswith("jsonl"):
        lines = [json.dumps({"prompt": t}, ensure_ascii=False) if t else t for t in lines]
    whole = f"\ufeff{lines[0]}\r\n{lines[1]}\r{lines[2]}\n{lines[3]}\n"
    (tmp_path / name).write_bytes(whole.encode())
    expected = ["ein Apfel", "two halves", "größer still one"]
    assert read_prompts(tmp_path / name) == (expected, None)


def test_lines_of_json_say_what_a_reward_is_asked(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "animal", "reward_prompt": "cat", "id": 3}\n{"text": "food"}\n')
    asked = read_prompts(file)
    assert asked == (["animal", "food"], ["cat", "food"])
    assert asked.questions == ["cat", "food"]
    assert asked.part(1, 2) == (["food"], ["food"])
    assert asked_for(None, file) == file_or_list(str(file)) == asked


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.txt", "a\nb\x1b[31m\n", ["line 2", "control character U+001B", "remove it"]),
        ("p.txt", "a\u202etxt.exe", ["line 1", "U+202E"]),
        ("p.txt", '\n{"prompt": "a"}\n', ["line 2", "looks like JSON", "jsonl"]),
        ("p.txt", "\ufeff \n\r\n", ["has no prompts"]),
        ("p.jsonl", '{"prompt": "\\u0007"}', ["line 1", "U+0007"]),
        ("p.jsonl", '{"prompt": "\\ud800"}', ["line 1", "U+D800"]),
        ("p.jsonl", '{"prompt": ["a"]}', ["line 1", 'not an object with a "prompt"']),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}', ["line 2"]),
        ("p.jsonl", "[" * 20_000, ["line 1", 'not an object with a "prompt"']),
        ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}", ["line 1"]),
    ],
)
def test_what_is_no_list_of_prompts_is_refused_by_its_line(tmp_path, name, content, parts):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=name) as raised:
        read_prompts(tmp_path / name)
    for part in (name, *parts):
        assert part in str(raised.value)
    assert len(str(raised.value)) < 600


def test_prompts_that_are_written_out_obey_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert asked_for("a\nb") == (["a b"], None)
    assert asked_for(["", "a"]) == file_or_list(["", "a"]) == (["", "a"], None)
    assert asked_for(None) is file_or_list(None) is None
    assert asked_for("nothing.txt").prompts == ["nothing.txt"]
    (tmp_path / "p.txt").write_text("a")
    for wrong, message in [
        (lambda: asked_for("p.txt"), "'p.txt' is a file: give it as --prompts-file p.txt"),
        (lambda: asked_for("a", tmp_path / "p.txt"), "both given"),
        (lambda: asked_for(["a", "\x00"]), r"prompt 2 holds the control character U\+0000"),
        (lambda: file_or_list([]), "list of prompts is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(FileNotFoundError, match="give a text or jsonl file"):
        file_or_list("none.txt")


# ------------------------------------------------------------------ defaults


def test_what_comes_along_has_its_own_and_others_have_none():
    flow = load("emoji")
    assert takes_prompts(flow)
    assert reward_of("emoji", None) == "clip"
    assert reward_of("runs/mine", "brightness") == "brightness"
    assert len(tuning_prompts("emoji", flow, None).prompts) == 200
    assert len(listed("emoji", None, own("emoji").held_out).prompts) == 50
    with pytest.raises(ValueError, match=r"'runs/mine' has no default reward: give --reward"):
        reward_of("runs/mine", None)
    with pytest.raises(ValueError, match=r"'runs/mine' has no default prompts: give --prompts"):
        tuning_prompts("runs/mine", flow, None)
    plain = GaussianMixture(torch.zeros(1, 2), 1.0)
    assert not takes_prompts(plain)
    assert tuning_prompts("toy.py:Plain", plain, None) is None


def test_a_model_of_one_s_own_is_judged_by_none_and_is_told_so(capsys):
    assert defaults.judge_of("emoji", "own", console()) is not None
    assert capsys.readouterr().err == ""
    assert defaults.judge_of("toy[/x].py:A", "own", console()) is None
    assert "model toy[/x].py:A has no default judge" in capsys.readouterr().err
    assert defaults.judge_of("toy.py:A", None, console()) is None
    assert defaults.judge_of("toy.py:A", "brightness", console()) is not None
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ pictures


def test_a_picture_is_read_as_people_see_it(tmp_path):
    """Turned as its EXIF data say, on white where it is transparent, grey as three channels."""
    wide = Image.new("RGB", (8, 4), "red")
    wide.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left is the top
    wide.save(tmp_path / "turned.png", exif=exif)
    x = read_picture(tmp_path / "turned.png", (8, 4), "--init-image")
    assert x.shape == (3, 8, 4)
    assert x[:, 0, 0].tolist() == [0, 0, 1]
    assert x[:, -1, 0].tolist() == [1, 0, 0]
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", (4, 4), "--init-image").min() == 1
    Image.new("L", (4, 4), 51).save(tmp_path / "grey.png")
    grey = read_picture(tmp_path / "grey.png", (2, 2), "--init-image")
    assert grey.flatten().tolist() == pytest.approx([0.2] * 12)
    Image.new("I;16", (4, 4), 51 * 257).save(tmp_path / "deep.png")
    deep = read_picture(tmp_path / "deep.png", (2, 2), "--init-image")
    assert deep.flatten().tolist() == pytest.approx([0.2] * 12)


def test_what_is_no_picture_is_refused(tmp_path, monkeypatch):
    Image.new("F", (4, 4), 1000).save(tmp_path / "deep.png", "TIFF")
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, message in [
        ("deep.png", "more than 16 bits"), ("bomb.png", "cannot read"), ("cut.png", "cannot read"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_picture(tmp_path / name, (4, 4), "--init-image")
    with pytest.raises(FileNotFoundError, match=r"--init-image=picture\.png"):
        read_picture(tmp_path / "none.png", (4, 4), "--init-image")


def test_long_captions_are_cut_in_no_time():
    x, long = torch.rand(2, 3, 8, 8), "ab " * 7000
    start = time.perf_counter()
    sheet = captioned_grid([(long, x, [long, "i" * 20_000]), ("b\nc", x, ["two\nlines", ""])])
    assert time.perf_counter() - start < 2
    assert sheet.width <= pictures.WIDEST + 12
    font = ImageFont.load_default(12)
    for text in ("iiii" * 30, "mmmmmmmmmmmmmmmmmmm", "cat"):
        fits = [n for n in range(len(text) + 1) if font.getlength(text[:n]) <= 96]
        same = [captioned_grid([("t", x[:1], [t])]).tobytes() for t in (text, text[: fits[-1]])]
        assert same[0] == same[1]


def test_captions_have_a_second_line_and_no_third():
    x = torch.rand(1, 3, 8, 8)
    one, two, three = (
        captioned_grid([("", x, [text])])
        for text in ("red apple", "a red apple on a table", "a red apple on a table under a tree")
    )
    assert one.height < two.height == three.height
    below = two.crop((6, 118, 108, two.height)).convert("L").tobytes()
    assert min(below) < 128  # "table" stands there


def test_small_pictures_are_enlarged_by_a_whole_factor():
    x = (torch.arange(28) % 2).float().expand(1, 3, 28, 28)  # stripes
    side = pictures.side_of(x)
    sheet = captioned_grid([("", x, [""])], side)
    assert [sheet.getpixel((6 + i, 9))[0] // 255 for i in range(side)] == [
        i // 4 % 2 for i in range(side)
    ]


def test_a_contact_sheet_is_a_grid_without_titles(tmp_path):
    x = torch.rand(14, 3, 8, 8)
    sheet = contact_sheet(x, ["a"] * 13 + [""], columns=12, size=32)
    assert sheet.size == (12 * 38 + 6, (32 + 16 + 6) + (32 + 2 * 16 + 6) + 6)  # (no | prompt)
    same = captioned_grid([("", x[:12], ["a"] * 12), ("", x[12:], ["a", "(no prompt)"])], 32)
    assert sheet.tobytes() == same.tobytes()
    save_picture(sheet, tmp_path / "new" / "sheet.png")
    assert Image.open(tmp_path / "new" / "sheet.png").tobytes() == sheet.tobytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sheet.png"]
