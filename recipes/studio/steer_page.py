"""The Steer page: the controls, the unguided pictures, the live strip and the curve."""

import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
import pandas
from PIL import Image

import steer
from recipes.studio.ask import Ask
from recipes.studio.reward_field import reward_field
from recipes.studio.session import Studio
from recipes.studio.showing import FAULTS, crisp, gallery, heard, said, title

if TYPE_CHECKING:
    from recipes.studio.jobs import Shown

__all__ = ["Steering", "page", "table"]

CURVE = ["network calls a picture", "mean", "scale"]
REDRAWN = 1.0
"""Minimum seconds between two drawn steps: drawing takes processor time from the sampler."""

PLOTTED = 3 * REDRAWN
"""Minimum seconds between two drawings of the curve during a run."""

REWARD = "0.7*clip + 0.3*colour:name=red"


class Steering(NamedTuple):
    """Elements of this page that other pages fill in.

    Attributes:
        controls: prompts, reward, method, pictures a prompt, steps, seed, options.
        strip: strip of pictures.
        message: line below the buttons.
        name: name of the folder to save to.
    """

    controls: list[Any]
    strip: gr.Gallery
    message: gr.Markdown
    name: gr.Textbox


def page(studio: Studio, whole: gr.Blocks) -> Steering:
    """Lay out the page, and return the elements that other pages fill in."""
    methods = [name for name in steer.METHODS if name != "none"]
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            prompts = gr.Textbox(
                "a fruit", label="Prompts, one per line", lines=2, elem_id="prompts"
            )
            reward = reward_field(
                studio, REWARD, "Reward: a name, or a sum with weights", "reward"
            )
            method = gr.Dropdown(methods, value="fmrg-j", label="Method", elem_id="method")
            options = gr.Textbox(
                "", label="Options, as {scale: 0.3, brake: 0.8}", elem_id="options"
            )
            with gr.Row():
                particles = gr.Slider(1, 16, 4, step=1, label="Pictures",
                                      elem_id="particles", min_width=120)  # fmt: skip
                steps = gr.Slider(1, 32, 8, step=1, label="Steps", elem_id="steps",
                                  min_width=120)  # fmt: skip
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=80)
            cost = gr.Markdown(elem_id="cost")
            with gr.Row():
                start = gr.Button("Steer", variant="primary", elem_id="start")
                pause = gr.Button("Pause", elem_id="pause")
                go_on = gr.Button("Go on", elem_id="go-on")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
            message = gr.Markdown(elem_id="message")
            with gr.Group():
                name = gr.Textbox("steered", label="Save as a run folder named", elem_id="name")
                save = gr.Button("Save", elem_id="save")
            kept = gr.Markdown(elem_id="saved")
        with gr.Column(scale=2, min_width=300):
            before = gallery("Unguided, the same noise", "before")
            strip = gallery(
                "What the reward sees now. Press Pause, click what to keep, then Go on", "strip",
                allow_preview=False,
            )  # fmt: skip
            chosen = gr.State([])
            marked = gr.Markdown(elem_id="marked")
            with gr.Row():
                with gr.Column(min_width=260):
                    title("The same seed before and after")
                    slider = gr.ImageSlider(
                        type="pil", format="png", show_label=False, elem_id="twin",
                        buttons=[],
                    )  # fmt: skip
                with gr.Column(min_width=260):
                    title("Reward, and at a pause and the end the held-out reward")
                    plot = gr.LinePlot(
                        x=CURVE[0], y=CURVE[1], color=CURVE[2], height=300, show_label=False,
                        elem_id="plot", color_title=" ",
                        color_map={"reward": "#0072b2", "held-out": "#e69f00"},
                    )  # fmt: skip
    with gr.Row():
        command = gr.Code(
            label="As a command", language="shell", elem_id="command", wrap_lines=True,
            lines=3, max_lines=8, interactive=False,
        )  # fmt: skip
        python = gr.Code(
            label="As Python", language="python", elem_id="python", wrap_lines=True, lines=3,
            max_lines=8, interactive=False,
        )  # fmt: skip
    controls = [prompts, reward, method, particles, steps, seed, options]

    def told(*given: Any) -> str:
        ask = Ask.of(*given)
        try:
            studio.reward(ask.reward)
        except FAULTS:
            return ""  # the error is shown next to the reward
        return f"This will cost {studio.cost(ask)}."

    gr.on(
        [whole.load, *(control.change for control in controls)], heard(told, 0), controls, cost,
        show_progress="hidden", trigger_mode="always_last",
    )  # fmt: skip

    def run(request: gr.Request, *given: Any) -> Iterator[tuple[Any, ...]]:
        keep_as_they_are = [gr.skip()] * 8
        try:
            ask = Ask.of(*given)
            out = f"{studio.root.name}/steered"
            place = studio.device
            texts = ask.command(studio.model, out, place), ask.python(studio.model, place)
            first: list[Image.Image] = []
            curve: list[dict[str, Any]] = []
            tab, drawn, plotted = str(request.session_hash), 0.0, 0.0
            newest: Shown | None = None
            waiting = False  # whether the newest step has not been drawn yet
            for kind, value in studio.run(tab, ask):
                if kind == "step":
                    newest, waiting = value, True
                    if not math.isnan(value.reward):
                        of = len(value.pictures)
                        curve.append(_point(value.calls, value.reward, of, "reward"))
                    if time.monotonic() - drawn < REDRAWN:
                        continue
                if waiting and newest is not None:
                    waiting, drawn = False, time.monotonic()
                    points = gr.skip()
                    if kind != "step" or drawn - plotted > PLOTTED:
                        points, plotted = table(curve), drawn
                    yield (
                        gr.skip(), _strip(newest), gr.skip(), points, gr.skip(), gr.skip(),
                        [], "", f"step {newest.step} of {newest.total}",
                    )  # fmt: skip
                if kind == "step":
                    continue
                if kind == "waiting":
                    yield *keep_as_they_are, value
                elif kind == "unguided":
                    first = [crisp(image) for image in value]
                    # a plot only knows the colours of its first points, so both are among them
                    curve = [_point(0, math.nan, 0, "reward"), _point(0, math.nan, 0, "held-out")]
                    yield first, [], None, None, *texts, [], "", "steering"
                elif kind == "message":
                    yield *keep_as_they_are, value
                elif kind == "paused":
                    yield (
                        *keep_as_they_are,
                        "paused: click the pictures to keep, then press Go on",
                    )
                elif kind == "judged":
                    curve += [_point(*one, "held-out") for one in value]
                    yield (
                        *[gr.skip()] * 3, table(curve),
                        *[gr.skip()] * 5,
                    )  # fmt: skip
                else:
                    from recipes.studio.jobs import start_of  # loads torch, so not at the start

                    best = int(value.rewards.flatten().argmax())
                    ended = gr.skip()  # shown by the last step, unless there were more prompts
                    if newest is None or value.rewards.numel() > len(newest.pictures):
                        ended = [
                            (crisp(steer.pictures.to_pil(x)), f"{float(r):.4g}")
                            for x, r in zip(
                                value.images.flatten(0, 1), value.rewards.flatten(), strict=True
                            )
                        ]
                    pair = (
                        first[start_of(value, best, ask.particles)],
                        crisp(steer.pictures.to_pil(value.images.flatten(0, 1)[best])),
                    )  # fmt: skip
                    calls = ask.particles * len(ask.prompts) * value.nfe
                    bill = f"done: {calls:.0f} network calls in {value.costs['seconds']:.1f} s"
                    notes = "".join(f"\n\n{text}" for text in value.warnings)
                    yield (
                        gr.skip(), ended, pair, table(curve),
                        gr.skip(), gr.skip(), [], "", bill + notes,
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
            return gr.skip()  # the run itself reports its state

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
    return Steering(controls, strip, message, name)


def _strip(shown: "Shown") -> list[tuple[Image.Image, str]]:
    pairs = zip(shown.images, shown.captions, strict=True)
    return [(crisp(image), caption) for image, caption in pairs]


def _point(calls: float, mean: float, pictures: int, scale: str) -> dict[str, Any]:
    return {**dict(zip(CURVE, (calls, mean, scale), strict=True)), "pictures": pictures}


def table(points: list[dict[str, Any]]) -> pandas.DataFrame:
    """Return the data of the plot: one mean for each number of calls, over all groups of prompts.

    Args:
        points: means of single groups, with the number of `pictures`.
    """
    calls, mean, scale = CURVE
    told = pandas.DataFrame(points, columns=[*CURVE, "pictures"])
    told["sum"] = told[mean] * told["pictures"]
    sums = told.groupby([calls, scale], sort=False, as_index=False)[["sum", "pictures"]]
    found = sums.sum(min_count=1)
    found[mean] = found["sum"] / found["pictures"]
    return found[CURVE]
