"""What a person may ask of the studio that is unusual or wrong, and what it answers."""

import inspect
import json
import shlex
import socket
import threading
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import rewards
import steer
from recipes import defaults, inputs
from recipes.arguments import parse
from recipes.compare import compare as steer_compare
from recipes.identity import config_text, settings_of
from recipes.studio import compare_page, session, steer_page, tune_page, tuning
from recipes.studio.ask import Ask
from recipes.studio.command import studio as open_studio
from recipes.studio.jobs import AHEAD, Job
from recipes.studio.loading import Loading
from recipes.studio.places import plain_reward
from recipes.studio.restoring import restored
from recipes.studio.session import Studio
from recipes.studio.showing import heard, said
from recipes.studio.tuning import readings
from steer.reward import score


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    made = Studio("fashion", tmp_path_factory.mktemp("studio"))
    made.loading.get()
    return made


def ask(**changed):
    told = {
        "prompts": "bag\nboot", "reward": "brightness", "method": "fmrg-j", "particles": 2,
        "steps": 2, "seed": 4, "options": "",
    }  # fmt: skip
    return Ask.of(**(told | changed))


def steered(studio, *given):
    """What the Steer page yields; `given` as `Ask.of`."""
    with gr.Blocks() as whole:
        steer_page.page(studio, whole)
    (run,) = [f.fn for f in whole.fns.values() if f.name == "run"]
    return list(run(SimpleNamespace(session_hash="page"), *given))


def compare(studio, *given):
    """What the Compare page yields for prompts, reward, methods and seed, and its Stop."""
    with gr.Blocks() as whole:
        compare_page.page(studio)
    acts = {f.name: f.fn for f in whole.fns.values()}
    request = SimpleNamespace(session_hash="compare")
    return acts["run"](*given, request), lambda: acts["halt"](request)


def tune(studio):
    """What the Tune page does, by name."""
    with gr.Blocks() as whole:
        tune_page.page(studio)
    return {f.name: f.fn for f in whole.fns.values()}


def test_more_pictures_than_fit_in_one_group_are_counted_and_shown(studio):
    asked = ask(prompts="bag\nboot\ncoat\nshirt\ndress", particles=16, steps=1)
    seen = list(studio.run("a", asked))
    steps = [value for kind, value in seen if kind == "step"]
    assert [(s.step, s.total, len(s.images)) for s in steps] == [(1, 2, 64), (2, 2, 16)]
    assert seen[-1][0] == "done"
    assert seen[-1][1].images.shape[:2] == (5, 16)
    assert len(dict(seen)["judged"]) == 2


def test_prompts_with_a_target_are_counted_each_from_its_own_first_step(studio):
    seen = list(studio.run("b", ask(options="{target: 100.0}")))
    steps = [value.step for kind, value in seen if kind == "step"]
    assert steps == [1, 2, 3, 4]
    early = list(studio.run("b", ask(options="{target: -100.0}", steps=4)))
    steps = [(value.step, value.total) for kind, value in early if kind == "step"]
    assert [step for step, _ in steps] == [1, 2, 5, 6]  # a step and a jump each
    assert {total for _, total in steps} == {8}
    assert early[-1][1].images.shape[:2] == (2, 2)
    page = steered(studio, "bag\nboot", "brightness", "fmrg-j", 2, 2, 4, "{target: 100.0}")
    _, strip, *_, message = page[-1]
    assert message.startswith("done")
    assert len(strip) == 4  # of both prompts
    plot = page[-1][3]
    assert len(plot) == 2 * (1 + 2)  # a point a step, not one a prompt
    assert "step 4 of 4" in [row[-1] for row in page]


@pytest.mark.parametrize("name", ["seed", "particles", "steps", "method", "prompts", "reward"])
def test_what_has_a_field_is_no_option(name):
    with pytest.raises(ValueError, match=f"options: {name} has a field of its own"):
        ask(options=f"{{{name}: 5}}")


def test_every_other_argument_of_a_request_is_refused_as_an_option(studio):
    known = set(inspect.signature(steer.sample).parameters) - {"options"}
    allowed = {"temperature", "strength", "target", "budget", "on_bad_reward"}
    for name in known - allowed:
        with pytest.raises(ValueError, match=f"options: {name} (has a field|is not an option)"):
            ask(options=f"{{{name}: 5}}")
    for options in ("{1: 2}", "[scale]", "scale", "{"):
        with pytest.raises(ValueError, match="write them as"):
            ask(options=options)
    command = ask(options="{target: -5.0, budget: 40, scale: 0.2}").command("fashion", "o")
    assert "--options '{scale: 0.2}'" in command
    read = parse("sample", shlex.split(command)[2:]).settings
    assert (read["target"], read["budget"], read["options"]) == (-5.0, 40, {"scale": 0.2})
    said = steered(studio, "bag", "brightness", "fmrg-j", 2, 2, 4, "{batch_size: 1}")
    assert "batch_size is not an option of a method" in said[-1][-1]


@pytest.mark.parametrize("name", ["seed", "steps", "particles"])
def test_an_empty_number_is_named(name):
    field = {"particles": "pictures"}.get(name, name)
    for value in (None, float("nan"), 1.5):
        with pytest.raises(ValueError, match=f"{field}: give a whole number"):
            ask(**{name: value})


@pytest.mark.parametrize(
    "text",
    ["null", "# fox", "[red, fox]", "- a", "~", "'a fox'", "a: 'b", "fox #1", "12", "1e3", "-x",
     "@x", "2020-13-45", "{a: b}", "a fox", "it's a fox", "1e3\n12\nnull", "é 😀\nb"],
)  # fmt: skip
def test_the_command_reads_the_prompt_as_it_was_written(text, tmp_path):
    asked = ask(prompts=text)
    words = shlex.split(asked.command("fashion", "o"))[2:]
    file = tmp_path / "config.yaml"
    file.write_text(config_text(settings_of(asked.settings("fashion", "o"))))
    for given in (words, ["--config", str(file)]):
        prompt = parse("sample", given).settings["prompt"]
        assert ([prompt] if isinstance(prompt, str) else prompt) == text.split("\n")


METHODS = "none:steps=1,particles=2\nfmrg-j:steps=3,particles=2\nfmrg-j:steps=2,particles=2"


def test_a_row_that_was_stopped_is_left_out_and_said(studio, monkeypatch):
    found, halt = compare(studio, "bag", "brightness", METHODS, 0)
    assert [row[0] for row in next(found)[0]] == ["none, 1 step"]
    sample = steer.sample

    def stopped_at_the_first_step(*given, callback, **named):
        return sample(*given, callback=lambda p: (halt(), callback(p)), **named)

    monkeypatch.setattr(steer, "sample", stopped_at_the_first_step)
    (last,) = found
    assert "stopped: the row of fmrg-j, 3 steps" in last[-1]
    assert "left out" in last[-1]
    monkeypatch.undo()
    found, _ = compare(studio, "bag", "brightness", METHODS, 0)
    assert [len(rows) for rows in [list(one[0]) for one in found]] == [1, 2, 3]


def test_the_curve_is_the_mean_over_groups_of_prompts():
    def point(*values):
        return dict(zip([*steer_page.CURVE, "pictures"], values, strict=True))

    drawn = steer_page.table([
        point(0, float("nan"), "reward", 0), point(2, 1.0, "reward", 64),
        point(4, 3.0, "reward", 64), point(2, 6.0, "reward", 16), point(2, 9.0, "held-out", 8),
    ])  # fmt: skip
    assert drawn[1:].to_numpy().tolist() == [
        [2, 2.0, "reward"], [4, 3.0, "reward"], [2, 9.0, "held-out"],
    ]  # fmt: skip
    assert drawn[:1].to_numpy().tolist()[0][::2] == [0, "reward"]


def test_an_empty_field_of_compare_is_named(studio):
    for prompts, methods, seed, words in (
        ("", METHODS, 0, "write a prompt"),
        ("bag", " \n", 0, "write a method"),
        ("bag", METHODS, None, "seed: give a whole number"),
        ("bag", "nosuch:steps=1", 0, "nosuch"),
    ):
        (last,) = compare(studio, prompts, "brightness", methods, seed)[0]
        assert words in last[-1]


def test_no_pause_after_the_last_step(studio):
    kinds = []
    for kind, _ in studio.run("p", ask(steps=1)):
        kinds.append(kind)
        if kind == "unguided":
            studio.job("p").pause()
    assert "paused" not in kinds
    assert kinds[-1] == "done"
    assert not studio.job("p").touched


def test_pictures_wait_for_the_judge_alone_and_in_bounded_number(studio):
    unjudged = Studio("fashion", studio.root)
    unjudged.loading = Loading(lambda: (studio.flow, None))
    found = unjudged.run("m", ask(steps=16))
    while next(found)[0] != "step":
        pass
    job = unjudged.job("m")
    made = -1
    while made < len(job.seconds):  # until the sampler waits
        made = len(job.seconds)
        threading.Event().wait(0.5)
    assert AHEAD < made <= AHEAD + 2 < 16
    assert [kind for kind, _ in found][-1] == "done"
    assert made < len(job.seconds) == 16
    assert job._unjudged == []
    waiting = studio.run("m", ask(steps=2))
    steps = [value for kind, value in waiting if kind == "step"]
    assert len(steps) == 2
    assert studio.job("m")._unjudged == []


def test_what_is_judged_is_what_is_shown(studio):
    shown, judged, result = [], [], None
    for kind, value in studio.run("j", ask(steps=2)):
        if kind == "step":
            shown.append(value)
            x = studio.job("j")._unjudged[-1][1]
            assert x.dtype == torch.uint8
            assert torch.equal(x[0], pil_to_tensor(value.images[0]))
        judged = value if kind == "judged" else judged
        result = value
    of_floats = score(studio.judge, result.images.flatten(0, 1), ["bag"] * 2 + ["boot"] * 2).mean()
    assert judged[-1][2] == 4
    assert judged[-1][1] == pytest.approx(float(of_floats), abs=0.02)


class Own(steer.Reward):
    """A reward with a weight; the package's own share theirs with other tests."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, prompts=None, metadata=None):
        return self.weight * images.flatten(1).mean(1)


def test_rewards_and_judge_are_where_the_model_is(monkeypatch, tmp_path):
    flow = torch.nn.Linear(1, 1, device="meta")
    monkeypatch.setattr(inputs, "load_model", lambda model, device: flow)
    monkeypatch.setattr(defaults, "judge_of", lambda *given: Own())
    monkeypatch.setattr(rewards, "load", lambda text: Own())
    there = Studio("fashion", tmp_path, device="meta")
    assert there.judge.weight.device.type == "meta"
    assert there.reward("clip").weight.device.type == "meta"


def test_a_tab_that_is_closed_while_the_sampler_waits_gives_its_turn_back(studio):
    found = studio.run("w", ask(steps=32))
    while next(found)[0] != "step":
        pass
    threading.Event().wait(0.5)
    found.close()
    assert list(studio.run("next", ask(steps=1)))[-1][0] == "done"


def test_a_wrong_reward_loses_nothing_and_a_failed_run_says_so(studio):
    list(studio.run("s", ask()))
    result = studio.job("s").result
    with pytest.raises(ValueError, match="blarg"):
        list(studio.run("s", ask(reward="blarg")))
    assert studio.job("s").result is result
    assert studio.save("s", "kept-after-all").is_dir()
    with pytest.raises(FloatingPointError):
        list(studio.run("s", ask(reward="1e38*brightness + 1e38*brightness + 1e39*jpeg",
                                 method="best-of-n")))  # fmt: skip
    with pytest.raises(ValueError, match="ended with an error and has no pictures: press Steer"):
        studio.save("s", "failed")
    with pytest.raises(ValueError, match="press Steer"):
        studio.job("s").stop()


def test_who_waits_for_a_turn_is_told_why_and_may_stop(studio):
    first, second = studio.run("x", ask(steps=32)), studio.run("y", ask(steps=1))
    while next(first)[0] != "step":
        pass
    assert next(second) == ("waiting", session.WAITING)
    found, halt = compare(studio, "bag", "brightness", METHODS, 0)
    assert next(found)[-1] == session.WAITING
    studio.job("x").pause()
    while next(first)[0] != "paused":
        pass
    assert next(second) == ("waiting", session.PAUSED)
    halt()
    assert [row[-1] for row in found] == ["stopped before the first row"]
    studio.end("x")
    list(first)
    assert [kind for kind, _ in second][-1] == "done"
    assert studio.busy == ""


def test_a_file_beside_the_server_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plain_reward("aesthetic:head=v2", allow_files=False) == "aesthetic:head=v2"
    (tmp_path / "v2").touch()
    (tmp_path / "red").touch()
    assert plain_reward("colour:name=red", allow_files=False) == "colour:name=red"
    for text in ("aesthetic:head=v2", "0.5*aesthetic:head='v2' + clip", "similarity:image=photo",
                 "layout:mask=photo"):  # fmt: skip
        with pytest.raises(ValueError, match="--allow-files"):
            plain_reward(text, allow_files=False)
        assert plain_reward(text, allow_files=True) == text


def test_a_benchmark_s_steps_that_nobody_is_told_of_hold_nothing_up(studio):
    from benchmarks.studio import every_other_block

    job = every_other_block(Job)(studio.flow, studio.reward("brightness"), ask(steps=16), None)
    worker = threading.Thread(target=job.work, daemon=True)
    worker.start()
    told = 0
    while (event := job.events.get(timeout=60))[0] != "over":
        if event[0] == "step":
            told += 1
            job.shown(event[1])
    assert told == 16 // 2
    assert len(job.seconds) == 16


def test_a_learned_scale_is_of_its_own_run(studio):
    """The second run's pictures are those of its own command, not scaled by the first one's."""
    text = "normalised(brightness) + 0.5*normalised(sharpness)"
    list(studio.run("scaled", ask(prompts="bag", reward=text)))
    asked = ask(prompts="sandal", reward=text)
    (done,) = [value for kind, value in studio.run("scaled", asked) if kind == "done"]
    wanted = steer.sample(studio.flow, text, ["sandal"], progress=False, **asked.keywords)
    assert torch.equal(done.images, wanted.images)
    assert studio.fresh("brightness") is studio.reward("brightness")
    assert studio.fresh(text) is not studio.reward(text)


def test_a_row_of_the_compare_page_is_that_of_steer_compare(studio, tmp_path):
    lines = ["none:steps=1,particles=4", "fmtt:steps=2,particles=4,keep=all,temperature=0.2",
             "best-of-n:steps=1,particles=4"]  # fmt: skip
    run, _ = compare(studio, "bag", "brightness", "\n".join(lines), 0)
    rows = list(run)[-1][0]
    made = steer_compare(
        "fashion", reward="brightness", prompts="bag", methods=lines, seeds=1, out=tmp_path / "o"
    )
    figures = json.loads((made / "figures.json").read_text())["methods"]
    for label, calls, reward, judged, _ in rows:
        there = figures[label]
        assert reward == pytest.approx(torch.tensor(there["reward"]).mean().item(), abs=6e-4)
        assert judged == pytest.approx(torch.tensor(there["judge"]).mean().item(), abs=6e-4)
        assert calls == pytest.approx(torch.tensor(there["nfe"]).mean().item(), abs=0.5)


def test_pages_of_one_tab_are_stopped_each_by_its_own(studio):
    first, front = studio.begun("one", "compare"), studio.begun("one", "tune")
    studio.halt("one", "tune")
    assert (first.is_set(), front.is_set()) == (False, True)
    again = studio.begun("one", "compare")
    assert first.is_set()
    list(studio.run("one", ask(prompts="bag", steps=1)))
    assert not again.is_set()  # Steer is another page
    studio.end("one")
    assert again.is_set()


def test_particles_are_chosen_while_the_run_is_paused(studio):
    job = Job(studio.flow, studio.reward("brightness"), ask(), None)
    with pytest.raises(ValueError, match="press Pause first"):
        job.go_on([0])
    job.go_on()
    job.end()


def test_tune_neither_reads_nor_writes_through_links(studio, tmp_path):
    outside, run = tmp_path / "outside", studio.root / "linked"
    outside.mkdir()
    run.mkdir()
    (outside / "000001.png").touch()
    (outside / "log").write_text("kept")
    Image.new("RGB", (4, 4)).save(outside / "000001.png")
    (outside / "readings.jsonl").write_text('{"step": 7}\n')
    (run / "sheets").symlink_to(outside)
    (run / "readings.jsonl").symlink_to(outside / "readings.jsonl")
    (studio.root / ".linked.log").symlink_to(outside / "log")
    acts = tune(studio)
    line, plot, found, sheet, _ = acts["watch"]("linked", "")
    assert "step 7" not in line
    assert (plot, found, sheet) == (None, "", None)
    said = acts["begin"]("linked", "brightness", "", "direct", 1, 1, 0.1)
    assert "is a link" in said
    assert (outside / "log").read_text() == "kept"


def test_tune_says_which_number_is_none(studio):
    begin = tune(studio)["begin"]
    assert "steps: give a whole number" in begin("t", "brightness", "", "direct", None, 1, 0.1)
    assert "steps: give a whole number" in begin("t", "brightness", "", "direct", 2.7, 1, 0.1)


def test_a_reading_that_is_being_written_waits(tmp_path):
    (tmp_path / "readings.jsonl").write_text('{"step": 1}\n{"ste')
    assert readings(tmp_path) == [{"step": 1}]


def test_a_reward_with_a_minus_is_no_option(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(tuning.subprocess, "Popen", lambda words, **_: begun.append(words))
    tuning.Tunings().start(tmp_path / "run", {"reward": "-1*brightness", "steps": 3})
    assert begun[0][-4:] == ["--reward=-1*brightness", "--steps=3", "--out", str(tmp_path / "run")]


def test_damaged_scores_are_said_to_be(studio):
    folder = studio.root / "damaged"
    folder.mkdir()
    config = {"reward": "brightness", "method": "none", "model": "fashion", "prompts_file": "x"}
    (folder / "config.yaml").write_text(json.dumps(config))
    for text in ('{"particle": 0}', "[1]", '{"particle'):
        (folder / "scores.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"scores\.jsonl is damaged"):
            restored(studio.root, folder, "fashion")


def test_a_run_on_another_device_makes_other_pictures(studio):
    asked = ask(prompts="bag")
    assert "--device cuda" in asked.command("fashion", "o", "cuda")
    assert "device='cuda'" in asked.python("fashion", "cuda")
    folder = studio.root / "elsewhere"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_text(settings_of(asked.settings("fashion", "o"))))
    assert not restored(studio.root, folder, "fashion").lost
    assert restored(studio.root, folder, "fashion", "cuda").lost == {"device": None}
    told = asked.settings("fashion", "o", "cuda")
    (folder / "config.yaml").write_text(config_text(settings_of(told)))
    assert restored(studio.root, folder, "fashion").lost == {"device": "cuda"}
    assert not restored(studio.root, folder, "fashion", "cuda").lost


def test_an_error_of_another_kind_is_shown_with_its_kind(caplog):
    def broken():
        raise KeyError("x")

    assert "KeyError" in heard(broken, 0)()
    assert "unexpected error" in caplog.text
    assert "KeyError" not in said(ValueError("plain"))


def test_a_model_without_pictures_is_refused():
    flow = steer.GaussianMixture([[0.0, 0.0]], 1.0)
    job = Job(flow, steer.LinearReward([1.0, 0.0]), ask(prompts="bag"), None)
    with pytest.raises(ValueError, match="are no pictures"):
        job.unguided()


def test_a_port_in_use_is_said_before_the_page_is_announced(tmp_path, capsys, monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")  # gradio sets them
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        port = place.getsockname()[1]
        with pytest.raises(ValueError, match=rf"nothing can listen at 127.0.0.1:{port}.*--port"):
            open_studio("fashion", tmp_path, port=port)
    assert "open http" not in "".join(capsys.readouterr())
