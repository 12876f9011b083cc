"""What a person may ask of the studio that is unusual or wrong, and what it answers."""

import inspect
import shlex
from types import SimpleNamespace

import gradio as gr
import pytest

import steer
from recipes.arguments import parse
from recipes.identity import config_text, settings_of
from recipes.studio import steer_page
from recipes.studio.ask import Ask
from recipes.studio.session import Studio


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
    assert "step 3 of 4" in [row[-1] for row in page]


@pytest.mark.parametrize("name", ["seed", "particles", "steps", "method", "prompts", "reward"])
def test_what_has_a_field_is_no_option(name):
    with pytest.raises(ValueError, match=f"options: {name} has a field of its own"):
        ask(options=f"{{{name}: 5}}")


def test_every_other_argument_of_a_request_is_refused_as_an_option(studio):
    known = set(inspect.signature(steer.sample).parameters) - {"options"}
    allowed = {"temperature", "strength", "target", "budget", "on_bad_reward"}
    for name in known - allowed:
        with pytest.raises(ValueError, match=f"options: {name} (has a field|is no option)"):
            ask(options=f"{{{name}: 5}}")
    for options in ("{1: 2}", "[scale]", "scale", "{"):
        with pytest.raises(ValueError, match="write them as"):
            ask(options=options)
    command = ask(options="{target: -5.0, budget: 40, scale: 0.2}").command("fashion", "o")
    assert "--options '{scale: 0.2}'" in command
    read = parse("sample", shlex.split(command)[2:]).settings
    assert (read["target"], read["budget"], read["options"]) == (-5.0, 40, {"scale": 0.2})
    said = steered(studio, "bag", "brightness", "fmrg-j", 2, 2, 4, "{batch_size: 1}")
    assert "batch_size is no option of a method" in said[-1][-1]


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
