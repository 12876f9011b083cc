"""The Runs page: run folders below the studio's folder, which can be opened on their page."""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from recipes.studio.ask import options_text
from recipes.studio.places import inside, inside_quietly, runs_in
from recipes.studio.restoring import restored, shown_of
from recipes.studio.session import Studio
from recipes.studio.showing import crisp, heard, said, title
from recipes.studio.steer_page import Steering

__all__ = ["page"]

TEXTS = ("config.yaml", "run.json", "command.txt")


def page(
    studio: Studio, whole: gr.Blocks, tabs: gr.Tabs, steering: Steering, tuned: gr.Textbox
) -> None:
    """Lay out the page.

    Args:
        studio: the state behind the page.
        whole: the whole page, of which this is a tab.
        tabs: the tabs, of which one is selected when a run is opened.
        steering: the Steer page, on which a sampling run is opened.
        tuned: the field for the folder of a tuning run.
    """
    with gr.Row():
        with gr.Column(min_width=300):
            folder = gr.Dropdown(
                runs_in(studio.root), value=None, label="Run folder", elem_id="folder"
            )
            with gr.Row():
                again = gr.Button("Look again", elem_id="again")
                back = gr.Button("Open it", variant="primary", elem_id="restore")
            message = gr.Markdown(elem_id="runs-message")
        with gr.Column(scale=2, min_width=300):
            title("Its grid")
            grid = gr.Image(
                show_label=False, elem_id="grid", format="png", height=420, interactive=False,
                buttons=["fullscreen", "download"],
            )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=300):
            figures = gr.JSON(label="metrics.json", max_height=420)
        with gr.Column(min_width=300):
            config = gr.Code(
                label="config.yaml, or run.json", language="yaml", elem_id="config",
                wrap_lines=True, max_lines=24, interactive=False,
            )  # fmt: skip

    def looked(name: str | None) -> tuple[Any, ...]:
        if not name:
            return None, None, "", ""
        place = inside(studio.root, name)
        picture, metrics = place / "grid.png", place / "metrics.json"
        return (
            Image.open(picture) if _there(studio.root, picture) else None,
            json.loads(metrics.read_text()) if _there(studio.root, metrics) else None,
            "\n".join((place / t).read_text() for t in TEXTS if _there(studio.root, place / t)),
            "",
        )

    folder.change(heard(looked, 3), folder, [grid, figures, config, message])

    outputs = [*steering.controls, steering.strip, steering.message, steering.name, tuned, tabs]

    def opened(name: str | None) -> tuple[Any, ...]:
        if not name:
            raise ValueError("choose a run folder first")
        place = inside(studio.root, name)
        if _there(studio.root, place / "run.json"):
            return *[gr.skip()] * (len(outputs) - 2), name, gr.Tabs(selected="tune"), ""
        found = restored(studio.root, place, studio.model, studio.device)
        ask = found.ask
        note = f"opened {name}: {found.note}"
        return (
            "\n".join(ask.prompts), ask.reward, ask.method,
            gr.Slider(value=ask.particles, maximum=max(16, ask.particles)),
            gr.Slider(value=ask.steps, maximum=max(32, ask.steps)),
            ask.seed, options_text(ask.options),
            [(crisp(Image.open(f)), caption) for f, caption in shown_of(studio.root, place)],
            said(note) if found.lost else note, f"{place.name}-again", gr.skip(),
            gr.Tabs(selected="steer"), "",
        )  # fmt: skip

    back.click(heard(opened, len(outputs)), folder, [*outputs, message])

    def listed() -> Any:
        return gr.Dropdown(choices=runs_in(studio.root), value=None)

    again.click(listed, None, folder, queue=False)
    whole.load(listed, None, folder)


def _there(root: Path, file: Path) -> bool:
    return file.is_file() and inside_quietly(root, file)
