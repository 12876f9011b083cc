"""The Rewards page: scores of pictures, gradient maps, and the check of a reward."""

from typing import Any

import gradio as gr

from recipes.studio.reward_field import reward_field
from recipes.studio.session import Studio
from recipes.studio.showing import crisp, gallery, heard

__all__ = ["page"]


def page(studio: Studio) -> None:
    """Lay out the page."""
    with gr.Row():
        with gr.Column(min_width=300):
            files = gr.File(
                file_count="multiple", file_types=["image"], label="Pictures", elem_id="pictures"
            )
            reward = reward_field(studio, "colour:name=red", "Reward", "looked-reward")
            prompt = gr.Textbox(label="What it is asked", elem_id="asked")
            look = gr.Button("Score", variant="primary", elem_id="score")
            check = gr.Button("Check this reward", elem_id="check")
            message = gr.Markdown(elem_id="rewards-message")
        with gr.Column(scale=2, min_width=300):
            table = gr.Dataframe(
                headers=["picture", "reward"], interactive=False, elem_id="scores"
            )
            maps = gallery("The pictures, and how strongly each pixel changes the reward", "maps")
            report = gr.Markdown(elem_id="report")

    def scored(names: list[str] | None, text: str, asked: str) -> tuple[Any, ...]:
        scorer = studio.reward(text)
        from recipes.studio.looking import looked_at  # loads torch
        from steer.flow import device_of

        found = looked_at(scorer, names or [], asked, device_of(studio.flow))
        rows = [[name, round(value, 6)] for name, value, _, _ in found]
        shown: list[Any] = []
        for name, _, image, heat in found:
            shown.append((crisp(image), name))
            if heat is not None:
                shown.append((crisp(heat), "its gradient"))
        return rows, shown, ""

    look.click(heard(scored, 2), [files, reward, prompt], [table, maps, message])

    def checked(text: str) -> tuple[str, str]:
        scorer = studio.reward(text)
        from recipes.studio.looking import report_of

        return report_of(scorer), ""

    check.click(heard(checked, 1), reward, [report, message])
