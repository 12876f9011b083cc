"""The pages: steer, rewards, compare, tune, runs. What is refused is said under the button."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pandas
from PIL import Image

import rewards
import steer
from recipes.studio import compare_page, tune_page
from recipes.studio.ask import Ask
from recipes.studio.jobs import Shown
from recipes.studio.looking import looked_at, report_of
from recipes.studio.places import inside, inside_quietly, runs_in
from recipes.studio.session import Studio
from recipes.studio.showing import FAULTS, crisp, heard, said

__all__ = ["CSS", "pages", "theme"]

CURVE = ["network calls a picture", "mean", "scale"]

CSS = ".said {color: #b3261e} @media (prefers-color-scheme: dark) {.said {color: #f2b8b5}}"


def theme() -> Any:
    """Return a theme that loads no fonts from elsewhere."""
    plain = ["system-ui", "sans-serif"]
    return gr.themes.Soft(font=plain, font_mono=["ui-monospace", "monospace"])


def pages(studio: Studio) -> gr.Blocks:
    """Return the whole page."""
    with gr.Blocks(title="flowsteer studio", analytics_enabled=False) as page:
        gr.Markdown(f"## flowsteer studio: `{studio.model}`, folder `{studio.root.name}`")
        with gr.Tab("Steer"):
            _steer(studio)
        with gr.Tab("Rewards"):
            _rewards(studio)
        with gr.Tab("Compare"):
            compare_page.page(studio)
        with gr.Tab("Tune"):
            tune_page.page(studio)
        with gr.Tab("Runs"):
            _runs(studio, page)

        def gone(request: gr.Request) -> None:
            studio.end(str(request.session_hash))

        page.unload(gone)
    return page


def _steer(studio: Studio) -> None:
    methods = [name for name in steer.METHODS if name != "none"]
    names = sorted([*rewards.NAMES, "0.7*clip + 0.3*colour:name=red"])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            prompts = gr.Textbox(
                "a fruit", label="Prompts, one a line", lines=2, elem_id="prompts"
            )
            reward = gr.Dropdown(
                names, value="0.7*clip + 0.3*colour:name=red", allow_custom_value=True,
                label="Reward: a name, or a sum with weights", elem_id="reward",
            )  # fmt: skip
            method = gr.Dropdown(methods, value="fmrg-j", label="Method", elem_id="method")
            options = gr.Textbox(
                "", label="Options, as {scale: 0.3, brake: 0.8}", elem_id="options"
            )
            with gr.Row():
                particles = gr.Slider(1, 16, 4, step=1, label="Pictures a prompt")
                steps = gr.Slider(1, 32, 8, step=1, label="Steps", elem_id="steps")
                seed = gr.Number(0, label="Seed", precision=0)
            cost = gr.Markdown(elem_id="cost")
            with gr.Row():
                start = gr.Button("Steer", variant="primary", elem_id="start")
                pause = gr.Button("Pause", elem_id="pause")
                go_on = gr.Button("Go on", elem_id="go-on")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            message = gr.Markdown(elem_id="message")
        with gr.Column(scale=2, min_width=300):
            small = {"columns": 4, "height": 260, "object_fit": "contain", "format": "png"}
            before = gr.Gallery(label="Unguided, the same noise", elem_id="before", **small)
            strip = gr.Gallery(
                label="What the reward sees now. Pause, click those to keep, then Go on",
                allow_preview=False, elem_id="strip", **small,
            )  # fmt: skip
            chosen = gr.State([])
            marked = gr.Markdown(elem_id="marked")
            slider = gr.ImageSlider(label="The same seed before and after", type="pil", height=320)
            plot = gr.LinePlot(
                x=CURVE[0], y=CURVE[1], color=CURVE[2], height=220,
                label="Reward, and the held-out reward (computed at a pause and at the end)",
                elem_id="plot",
            )  # fmt: skip
    with gr.Row():
        command = gr.Code(
            label="As a command", language="shell", elem_id="command", wrap_lines=True
        )
        python = gr.Code(label="As Python", language="python", elem_id="python", wrap_lines=True)
    with gr.Row():
        name = gr.Textbox("steered", label="Save as a run folder named", elem_id="name")
        save = gr.Button("Save", elem_id="save")
    kept = gr.Markdown(elem_id="saved")
    controls = [prompts, reward, method, particles, steps, seed, options]

    def told(*given: Any) -> str:
        return f"This will cost {studio.cost(Ask.of(*given))}."

    for control in controls:
        control.change(heard(told, 0), controls, cost, show_progress="hidden")

    def run(request: gr.Request, *given: Any) -> Iterator[tuple[Any, ...]]:
        keep_as_they_are = [gr.skip()] * 8
        try:
            ask = Ask.of(*given)
            out = studio.root.name + "/" + "steered"
            texts = ask.command(studio.model, out), ask.python(studio.model)
            first: list[Image.Image] = []
            curve: list[dict[str, Any]] = []
            tab = str(request.session_hash)
            for kind, value in studio.run(tab, ask):
                if kind == "waiting":
                    yield *keep_as_they_are, value
                elif kind == "unguided":
                    first = [crisp(image) for image in value]
                    yield first, [], None, None, *texts, [], "", "steering"
                elif kind == "message":
                    yield *keep_as_they_are, value
                elif kind == "paused":
                    yield (
                        *keep_as_they_are,
                        "paused: click the pictures to keep, then press Go on",
                    )
                elif kind == "judged":
                    curve += [_point(calls, mean, "held-out") for calls, mean in value]
                    yield (
                        *[gr.skip()] * 3, pandas.DataFrame(curve, columns=CURVE),
                        *[gr.skip()] * 5,
                    )  # fmt: skip
                elif kind == "step":
                    if not math.isnan(value.reward):
                        curve.append(_point(value.calls, value.reward, "reward"))
                    yield (
                        gr.skip(), _strip(value), gr.skip(),
                        pandas.DataFrame(curve, columns=CURVE), gr.skip(), gr.skip(), [], "",
                        f"step {value.step} of {ask.steps}",
                    )  # fmt: skip
                else:
                    best = int(value.rewards.flatten().argmax())
                    pair = (
                        first[best],
                        crisp(steer.pictures.to_pil(value.images.flatten(0, 1)[best])),
                    )
                    calls = ask.particles * len(ask.prompts) * value.nfe
                    bill = f"done: {calls:.0f} network calls in {value.costs['seconds']:.1f} s"
                    notes = "".join(f"\n\n{text}" for text in value.warnings)
                    yield (
                        gr.skip(), gr.skip(), pair, gr.skip(), gr.skip(), gr.skip(), [], "",
                        bill + notes,
                    )  # fmt: skip
        except FAULTS as error:
            yield *keep_as_they_are, said(error)

    outputs = [before, strip, slider, plot, command, python, chosen, marked, message]
    start.click(run, controls, outputs, concurrency_limit=4, show_progress="hidden")

    def mark(now: list[int], event: gr.SelectData) -> tuple[list[int], str]:
        new = sorted(set(now) ^ {int(event.index)})  # type: ignore[arg-type]
        return new, f"keeping {', '.join(str(i + 1) for i in new)}" if new else ""

    strip.select(mark, chosen, [chosen, marked], queue=False)

    def wish(act: Callable[[Any, list[int]], None]) -> Callable[..., Any]:
        def handler(picked: list[int], request: gr.Request) -> Any:
            try:
                act(studio.job(str(request.session_hash)), picked)
            except ValueError as error:
                return said(error)
            return gr.skip()  # the run itself says what it does

        return handler

    acts: dict[Any, Callable[[Any, list[int]], None]] = {
        pause: lambda job, _: job.pause(),
        go_on: lambda job, picked: job.go_on(picked),
        stop: lambda job, _: job.stop(),
    }
    for button, act in acts.items():
        button.click(wish(act), chosen, message, queue=False)

    def write(name: str, request: gr.Request) -> str:
        try:
            place = studio.save(str(request.session_hash), name)
        except (ValueError, OSError) as error:
            return said(error)
        return f"saved: `{place.relative_to(studio.root)}`"

    save.click(write, name, kept, queue=False)


def _strip(shown: Shown) -> list[tuple[Image.Image, str]]:
    pairs = zip(shown.images, shown.captions, strict=True)
    return [(crisp(image), caption) for image, caption in pairs]


def _point(calls: float, mean: float, scale: str) -> dict[str, Any]:
    return dict(zip(CURVE, (calls, mean, scale), strict=True))


def _rewards(studio: Studio) -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            files = gr.File(
                file_count="multiple", file_types=["image"], label="Pictures", elem_id="pictures"
            )
            reward = gr.Dropdown(
                sorted(rewards.NAMES), value="colour:name=red", allow_custom_value=True,
                label="Reward", elem_id="looked-reward",
            )  # fmt: skip
            prompt = gr.Textbox(label="What it is asked", elem_id="asked")
            look = gr.Button("Score", variant="primary", elem_id="score")
            check = gr.Button("Check this reward", elem_id="check")
            message = gr.Markdown(elem_id="rewards-message")
        with gr.Column(scale=2, min_width=300):
            table = gr.Dataframe(
                headers=["picture", "reward"], interactive=False, elem_id="scores"
            )
            maps = gr.Gallery(
                label="The pictures, and how strongly each pixel moves the reward", columns=4,
                height="auto", object_fit="contain",
            )  # fmt: skip
            report = gr.Markdown(elem_id="report")

    def scored(names: list[str] | None, text: str, asked: str) -> tuple[Any, ...]:
        found = looked_at(studio.reward(text), names or [], asked)
        rows = [[name, round(value, 6)] for name, value, _, _ in found]
        shown: list[Any] = []
        for name, _, image, heat in found:
            shown.append((crisp(image), name))
            if heat is not None:
                shown.append((crisp(heat), "its gradient"))
        return rows, shown, ""

    look.click(heard(scored, 2), [files, reward, prompt], [table, maps, message])

    def checked(text: str) -> tuple[str, str]:
        return report_of(studio.reward(text)), ""

    check.click(heard(checked, 1), reward, [report, message])


def _runs(studio: Studio, page: gr.Blocks) -> None:
    with gr.Row():
        folder = gr.Dropdown(
            runs_in(studio.root), value=None, label="Run folder", elem_id="folder"
        )
        again = gr.Button("Look again", elem_id="again")
    message = gr.Markdown(elem_id="runs-message")
    grid = gr.Image(label="Its grid", type="filepath", elem_id="grid")
    with gr.Row():
        figures = gr.JSON(label="metrics.json")
        config = gr.Code(label="config.yaml or command.txt", language="yaml")

    def opened(name: str | None) -> tuple[Any, ...]:
        if not name:
            return None, None, "", ""
        place = inside(studio.root, name)
        picture = place / "grid.png"
        metrics = place / "metrics.json"
        texts = [place / "config.yaml", place / "command.txt"]
        return (
            Image.open(picture) if _there(studio.root, picture) else None,
            json.loads(metrics.read_text()) if _there(studio.root, metrics) else None,
            "".join(t.read_text() for t in texts if _there(studio.root, t)),
            "",
        )

    folder.change(heard(opened, 3), folder, [grid, figures, config, message])

    def listed() -> Any:
        return gr.Dropdown(choices=runs_in(studio.root), value=None)

    again.click(listed, None, folder, queue=False)
    page.load(listed, None, folder)


def _there(root: Path, file: Path) -> bool:
    return file.is_file() and inside_quietly(root, file)
