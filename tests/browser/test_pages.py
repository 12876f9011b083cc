"""The studio in a real browser: Debian's chromium, driven by playwright."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from recipes.studio.completing import COMPLETE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LACKS = [name for name in ("playwright", "gradio") if find_spec(name) is None]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
    pytest.mark.skipif(bool(LACKS), reason=f"not installed: {LACKS}"),
]
WAIT = 120_000


def started(root, port, *more):
    command = [
        sys.executable, "-W", "ignore", "-m", "recipes.cli", "studio", "--root", str(root),
        "--port", str(port), *more,
    ]  # fmt: skip
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2)
            return server
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, server.stderr.read().decode()
            time.sleep(0.5)
    raise TimeoutError("the studio did not start")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("studio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = started(root, port)
    yield root, port
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # not where these tests are only collected

    with sync_playwright() as run:
        made = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def opened(page, port):
    page.set_default_timeout(WAIT)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#start")
    return page


@pytest.fixture
def page(browser, place):
    made = browser.new_page(viewport={"width": 1280, "height": 900})
    made.foreign = []
    ours = (f"http://127.0.0.1:{place[1]}", f"ws://127.0.0.1:{place[1]}", "data:", "blob:")
    made.on("request", lambda r: None if r.url.startswith(ours) else made.foreign.append(r.url))
    opened(made, place[1])
    yield made
    assert made.foreign == []  # the page loads nothing from elsewhere
    made.close()


def says(page, where, text):
    page.wait_for_function(
        "([where, text]) => document.querySelector(where)?.innerText.includes(text)",
        arg=[where, text],
    )


def steer(page, **filled):
    for name, value in filled.items():
        page.fill(f"#{name} textarea, #{name} input", value)
    page.keyboard.press("Tab")
    page.click("#start")


def test_a_picture_is_steered_saved_and_made_again_by_its_command(page, place, tmp_path):
    steer(page)
    page.wait_for_selector("#strip img")
    says(page, "#message", "done")
    assert page.locator("#before img").count() == 4
    page.fill("#name textarea, #name input", "mine")
    page.click("#save")
    says(page, "#saved", "saved: mine")
    config = ["sample", "--config", str(place[0] / "mine" / "config.yaml")]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recipes.cli", *config], check=True,
        capture_output=True,
    )  # fmt: skip
    ours, theirs = (
        [pil_to_tensor(Image.open(f)) for f in sorted((folder / "images").iterdir())]
        for folder in (place[0] / "mine", place[0] / "mine-again")
    )
    assert len(ours) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    words = shlex.split(page.inner_text("#command .cm-content"))
    assert words[1:] == [*shlex.split((place[0] / "mine" / "command.txt").read_text())[1:-1],
                         words[-1]]  # fmt: skip


def test_a_run_of_the_command_line_is_opened_where_it_was_left(page, place):
    told = ["--reward", "brightness", "--prompt", "[fox, bird]", "--steps", "3", "--scale", "0.2",
            "--particles", "2", "--unguided", "false"]  # fmt: skip
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "recipes.cli", "sample", *told, "--out",
         str(place[0] / "told")], check=True, capture_output=True,
    )  # fmt: skip
    page.get_by_role("tab", name="Runs").click()
    page.click("#again")
    page.click("#folder input")
    page.get_by_role("option", name="told").click()
    page.wait_for_selector("#grid img")
    page.click("#restore")
    says(page, "#message", "opened told")
    assert page.input_value("#prompts textarea") == "fox\nbird"
    assert page.input_value("#reward input") == "brightness"
    assert page.input_value("#steps input[type=number]") == "3"
    assert page.input_value("#options textarea, #options input") == "{scale: 0.2}"
    page.wait_for_selector("#strip img")
    page.click("#start")
    says(page, "#message", "done")
    page.fill("#name textarea, #name input", "told-by-hand")
    page.click("#save")
    says(page, "#saved", "saved: told-by-hand")
    ours, theirs = (
        [pil_to_tensor(Image.open(f)) for f in sorted((folder / "images").iterdir())]
        for folder in (place[0] / "told", place[0] / "told-by-hand")
    )
    assert len(ours) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_reward_is_completed_while_it_is_typed_and_refused_beside_its_field(page):
    page.fill("#reward input", "")
    page.locator("#reward input").press_sequentially("0.7*clip + 0.3*sat", delay=30)
    option = page.get_by_role("option", name="0.7*clip + 0.3*saturation")
    option.wait_for()
    assert page.input_value("#reward input") == "0.7*clip + 0.3*sat"
    option.click()
    says(page, "#cost", "network calls")
    assert page.input_value("#reward input") == "0.7*clip + 0.3*saturation"
    page.fill("#reward input", "0.7*clop")
    page.keyboard.press("Tab")
    says(page, "#reward-error", "did you mean clip")
    for text, first in {
        "cli": "clip", "-.5*br": "-.5*brightness", "min(clip, sh": "min(clip, sharpness",
        "clip +": "clip + aesthetic", "mi": "min(", "2*min(clip, 0.5*jp": "2*min(clip, 0.5*jpeg",
        "colour:name=re": None, "clip + zzz": None, "0.5": None,
    }.items():  # fmt: skip
        assert (page.evaluate(COMPLETE, text) or [None])[0] == first, text


def test_a_run_is_paused_a_particle_kept_and_the_run_stopped(page):
    steer(page, steps="32")
    page.wait_for_selector("#strip img")
    page.click("#pause")
    says(page, "#message", "paused: click")
    page.locator("#strip button.thumbnail-item, #strip .thumbnail-item").nth(1).click()
    says(page, "#marked", "keeping 2")
    page.click("#go-on")
    says(page, "#message", "step")
    page.click("#stop")
    says(page, "#message", "done")


def test_a_closed_tab_ends_its_run_and_gives_the_turn_back(page, browser, place):
    other = opened(browser.new_page(), place[1])
    steer(other, steps="32")
    other.wait_for_selector("#strip img")
    other.click("#pause")
    says(other, "#message", "paused: click")  # it would hold its turn for ever
    page.click("#start")
    says(page, "#message", "another picture is being steered")
    other.close()
    says(page, "#message", "done")


def test_an_error_is_the_library_s_own_sentence(page):
    steer(page, options="{scle: 0.3}")
    says(page, "#message", "scale")


def test_a_reward_that_reads_files_is_refused_here(page):
    page.fill("#reward input", "evil.py:Reward")
    page.keyboard.press("Enter")
    page.click("#start")
    says(page, "#message", "--allow-files")


def test_pictures_are_scored_and_a_reward_is_checked(page, tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(file)
    page.get_by_role("tab", name="Rewards").click()
    page.set_input_files("#pictures input[type=file]", str(file))
    says(page, "#pictures", "red")
    page.click("#score")
    says(page, "#scores", "red.png")
    page.click("#check")
    says(page, "#report", "differentiable")


def test_two_tabs_take_turns(page, browser, place):
    other = opened(browser.new_page(), place[1])
    steer(page, steps="12")
    page.wait_for_selector("#before img")
    other.click("#start")
    says(page, "#message", "done")
    says(other, "#message", "done")
    other.close()


def test_methods_are_compared_row_by_row(page):
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-methods textarea", "none:steps=1,particles=2\nfmrg-j:steps=2,particles=2")
    page.click("#compare-go")
    says(page, "#compare-table", "fmrg-j")
    assert page.locator("#compare-sheet img").count() >= 2


def test_a_tuning_run_is_started_alarmed_stopped_and_resumed(page, place):
    page.get_by_role("tab", name="Tune").click()
    told = {"reward": "brightness", "every": "2", "steps": "300", "rate": "0.03"}
    for name, value in told.items():
        page.fill(f"#tune-{name} textarea, #tune-{name} input", value)
    page.click("#tune-go")
    says(page, "#tune-state", "Running, at step")
    says(page, "#tune-alarms", "step")
    page.click("#tune-stop")
    says(page, "#tune-state", "Stopped")
    file = place[0] / "tuned" / "readings.jsonl"
    before = len(file.read_text().splitlines())
    assert before < 150
    page.click("#tune-go")  # an alarm may end the run soon: it is resumed all the same
    state = "document.querySelector('#tune-state').innerText"
    page.wait_for_function(f"/^(Running|Finished)/.test({state})")
    assert page.inner_text("#tune-error").strip() == ""
    assert len(file.read_text().splitlines()) >= before
    if page.inner_text("#tune-state").startswith("Running"):
        page.click("#front-go")
        says(page, "#front-error", "stop it first")
        page.click("#tune-stop")
        page.wait_for_function(f"!{state}.startsWith('Running')")
    page.click("#front-go")
    page.wait_for_function(
        "document.querySelector('#at-scale')?.innerText.includes('At scale 1:')"
        " && !/is drawn|turn/.test(document.querySelector('#front-error').innerText)"
    )
    page.wait_for_selector("#front-plot img")
    assert page.locator("#scaled img").count() == 4
    at_one = page.locator("#scaled img").first.get_attribute("src")
    page.fill("#lora-scale input[type=number]", "0")
    page.keyboard.press("Tab")
    says(page, "#at-scale", "At scale 0:")
    assert page.locator("#scaled img").first.get_attribute("src") != at_one


def test_a_server_that_was_killed_keeps_the_folders(browser, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: emoji\n")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "run" / "grid.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started(tmp_path, port).kill()
    server = started(tmp_path, port)
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(f"http://127.0.0.1:{port}/")
    page.get_by_role("tab", name="Runs").click()
    page.click("#folder input")
    page.get_by_role("option", name="run").click()
    page.wait_for_selector("#grid img")
    shots = os.environ.get("STUDIO_SHOTS")
    if shots:
        page.screenshot(path=f"{shots}/runs.png")
    page.close()
    server.terminate()
