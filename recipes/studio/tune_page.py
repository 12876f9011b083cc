"""The Tune page: start, watch, stop and resume a run of `steer finetune`."""

import atexit
import json
from typing import Any

import gradio as gr
from PIL import Image

import steer
from recipes.inputs import load_model
from recipes.studio.places import inside
from recipes.studio.session import Studio
from recipes.studio.showing import FAULTS, crisp, said
from recipes.studio.tuning import Tunings, curves, readings
from steer.pictures import to_pil

__all__ = ["page"]


def page(studio: Studio) -> None:
    """Lay the page out."""
    tunings = Tunings()
    atexit.register(tunings.close)
    with gr.Row():
        with gr.Column(min_width=300):
            folder = gr.Textbox(label="Run folder", value="tuned", elem_id="tune-folder")
            reward = gr.Textbox(label="Reward", value="clip", elem_id="tune-reward")
            prompts = gr.Textbox(label="Prompts, one a line (empty: the model's own)", lines=2,
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
            plot = gr.Plot(label="Checks; a coloured band is an alarm", elem_id="tune-plot")
            alarms = gr.Markdown(elem_id="tune-alarms")
            sheet = gr.Image(label="Last sheet", elem_id="tune-sheet", height=320)
    with gr.Row():
        scale = gr.Slider(0, 1.5, 1, step=0.25, label="LoRA scale, same seeds",
                          elem_id="lora-scale")  # fmt: skip
        text = gr.Textbox(label="Prompt", value="a bird")
    scaled = gr.Gallery(
        label="The same seeds at this scale", columns=4, height=240, object_fit="contain",
        elem_id="scaled",
    )  # fmt: skip
    refused = gr.Markdown(elem_id="scaled-error")
    timer = gr.Timer(2)

    def begin(name: str, wanted: str, asked: str, how: str, n: int, k: int, lr: float) -> str:
        try:
            studio.reward(wanted)
            options = {
                "model": studio.model, "reward": wanted, "objective": how, "steps": int(n),
                "check_every": int(k), "learning_rate": lr, "progress": "false",
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
        checks = readings(path)
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
        last = (
            None
            if not sheets or sheets[-1].is_symlink()
            else Image.open(sheets[-1]).convert("RGB")
        )
        failed = tunings.error(path)
        return (
            line, curves(checks) if checks else None, found, last,
            said(failed) if failed else said_before or "",
        )  # fmt: skip

    def draw(name: str, factor: float, wanted: str, prompt: str) -> tuple[Any, str]:
        try:
            path = inside(studio.root, name)
            with studio.turn("scale"):
                flow = load_model(studio.model, None, None, path, float(factor), {})
                made = steer.sample(
                    flow, studio.reward(wanted), [prompt], 4, 4, "none", seed=0, progress=False
                )
        except FAULTS as problem:
            return gr.skip(), said(problem)
        assert made.images is not None
        rows = zip(made.images.flatten(0, 1), made.rewards.flatten(), strict=True)
        return [(crisp(to_pil(image)), f"{float(r):.3g}") for image, r in rows], ""

    asked = [folder, reward, prompts, objective, steps, every, rate]
    start.click(begin, asked, error)
    stop.click(halt, folder, error)
    timer.tick(watch, [folder, error], [state, plot, alarms, sheet, error],
               show_progress="hidden")  # fmt: skip
    scale.release(draw, [folder, scale, reward, text], [scaled, refused])
