"""The Tune page: start, watch, stop and resume a run of `steer finetune`."""

import atexit
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

import steer
from recipes.studio.ask import whole_number
from recipes.studio.figures import curves, front_of
from recipes.studio.places import inside, inside_quietly
from recipes.studio.reward_field import reward_field
from recipes.studio.session import Studio
from recipes.studio.showing import FAULTS, crisp, gallery, said, title
from recipes.studio.tuning import READINGS, Tunings, readings

__all__ = ["page"]


def page(studio: Studio) -> gr.Textbox:
    """Lay out the page, and return the field for the run folder."""
    tunings = Tunings()
    atexit.register(tunings.close)
    with gr.Row():
        with gr.Column(min_width=300):
            folder = gr.Textbox(label="Run folder", value="tuned", elem_id="tune-folder")
            reward = reward_field(studio, "clip", "Reward", "tune-reward")
            prompts = gr.Textbox(label="Prompts, one per line (empty: the model's own)", lines=2,
                                 elem_id="tune-prompts")  # fmt: skip
            objective = gr.Dropdown(label="Objective", choices=list(steer.OBJECTIVES),
                                    value="direct")  # fmt: skip
            with gr.Row():
                steps = gr.Number(label="Steps", value=200, precision=0, elem_id="tune-steps")
                every = gr.Number(label="Check every", value=20, precision=0,
                                  elem_id="tune-every")  # fmt: skip
                rate = gr.Number(label="Learning rate", value=0.001, elem_id="tune-rate")
            with gr.Row():
                start = gr.Button("Start or resume", variant="primary", elem_id="tune-go")
                stop = gr.Button("Stop", variant="stop", elem_id="tune-stop")
            error = gr.Markdown(elem_id="tune-error")
        with gr.Column(scale=2, min_width=320):
            state = gr.Markdown("No run.", elem_id="tune-state")
            title("Checks of the run; a coloured band is an alarm")
            plot = gr.Plot(
                show_label=False, elem_id="tune-plot", elem_classes="drawn", format="png"
            )
            alarms = gr.Markdown(elem_id="tune-alarms")
            title("The last sheet: without adapters, then with them")
            sheet = gr.Image(
                show_label=False, elem_id="tune-sheet", height=320, format="png",
                interactive=False, buttons=["fullscreen", "download"],
            )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=300):
            text = gr.Textbox(label="Prompt", value="a bird", elem_id="front-prompt")
            front = gr.Button("Show the front", elem_id="front-go")
            refused = gr.Markdown(elem_id="front-error")
            scale = gr.Slider(
                0, 1, 1, step=0.25, label="Scale of the adapters: 0 is the model without them",
                elem_id="lora-scale",
            )  # fmt: skip
            at_scale = gr.Markdown(elem_id="at-scale")
        with gr.Column(scale=2, min_width=320):
            scaled = gallery("The same seeds at this scale", "scaled")
            title("Reward against the distance to the model without adapters")
            chart = gr.Plot(
                show_label=False, elem_id="front-plot", elem_classes="drawn", format="png"
            )
    kept = gr.State({})
    timer = gr.Timer(2)

    def begin(name: str, wanted: str, asked: str, how: str, n: int, k: int, lr: float) -> str:
        try:
            studio.reward(wanted)
            options = {
                "model": studio.model, "reward": wanted, "objective": how,
                "steps": whole_number("steps", n), "check_every": whole_number("check every", k),
                "learning_rate": lr, "progress": "false",
            }  # fmt: skip
            lines = [line.strip() for line in asked.splitlines() if line.strip()]
            if lines:
                options["prompts"] = json.dumps(lines)
            tunings.start(inside(studio.root, name), options)
        except FAULTS as problem:
            return said(problem)
        return ""

    def halt(name: str) -> str:
        try:
            tunings.stop(inside(studio.root, name))
        except FAULTS as problem:
            return said(problem)
        return ""

    def watch(name: str, said_before: str) -> tuple[Any, ...]:
        try:
            path = inside(studio.root, name)
        except ValueError as problem:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), said(problem)
        checks = readings(path) if inside_quietly(studio.root, path / READINGS) else []
        at = f"at step {checks[-1]['step']}" if checks else "before its first check"
        word = "Finished" if (path / "finished.json").is_file() else "Stopped"
        line = f"Running, {at}." if tunings.running(path) else f"{word}, {at}."
        if not path.exists() and not tunings.running(path):
            line = "No run."
        found = "".join(
            f"- step {check['step']}: {said(alarm)}\n"
            for check in checks for alarm in check.get("alarms", [])
        )  # fmt: skip
        sheets = sorted((path / "sheets").glob("[0-9]*.png"))
        seen = bool(sheets) and inside_quietly(studio.root, sheets[-1])
        last = Image.open(sheets[-1]).convert("RGB") if seen else None
        failed = tunings.error(path)
        return (
            line, curves(checks) if checks else None, found, last,
            said(failed) if failed else said_before or "",
        )  # fmt: skip

    def measured(
        name: str, factor: float, wanted: str, prompt: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        tab = str(request.session_hash)
        found: dict[float, Any] = {}
        try:
            path = inside(studio.root, name)
            if tunings.running(path):
                raise ValueError("this run is at work: stop it first, or wait for its end")
            scorer = studio.fresh(wanted)
            from recipes.studio.fronts import adapters_of, scales_of

            best = adapters_of(studio.root, path) != path
            note = "the adapters of `best`: the run was stopped before it wrote its last" * best

            yield {}, *[gr.skip()] * 4, "waiting for a turn"
            ended = studio.begun(tab, "tune")
            scales = scales_of(studio.flow, studio.judge, scorer, studio.root, path, prompt)
            for one in studio.in_turn(scales, ended):
                found[one.scale] = one
                yield found, *shown(found, factor), gr.skip(), f"scale {one.scale:g} is drawn"
                if ended.is_set():
                    break
            most = max(found)
            nearest = min(found, key=lambda s: abs(s - factor))
            slider = gr.Slider(maximum=max(1.0, most), value=nearest)
            yield found, *shown(found, nearest), slider, note
        except FAULTS as problem:
            yield found, *[gr.skip()] * 4, said(problem)

    def shown(found: dict[float, Any], factor: float) -> tuple[Any, Any, str]:
        if not found:
            return gr.skip(), gr.skip(), "press *Show the front* first"
        one = found[min(found, key=lambda s: abs(s - factor))]
        pictures = [
            (crisp(image), f"{r:.3g}") for image, r in zip(one.images, one.rewards, strict=True)
        ]
        entries = [found[s].entry for s in sorted(found)]
        told = ", ".join(
            f"{key} {one.entry[key]:.3g}"
            for key in ("reward", "judge", "diversity", "kid") if key in one.entry
        )  # fmt: skip
        alarms = "".join(f"; {said(name)}" for name in one.entry["alarms"])
        return pictures, front_of(entries, one.scale), f"At scale {one.scale:g}: {told}{alarms}"

    asked = [folder, reward, prompts, objective, steps, every, rate]
    start.click(begin, asked, error, show_progress="hidden")
    stop.click(halt, folder, error, show_progress="hidden")
    timer.tick(watch, [folder, error], [state, plot, alarms, sheet, error],
               show_progress="hidden")  # fmt: skip
    outputs = [kept, scaled, chart, at_scale, scale, refused]
    front.click(measured, [folder, scale, reward, text], outputs, show_progress="hidden")
    scale.input(shown, [kept, scale], [scaled, chart, at_scale], show_progress="hidden",
                trigger_mode="always_last")  # fmt: skip
    folder.change(lambda: ({}, [], None, ""), None, [kept, scaled, chart, at_scale])
    return folder
