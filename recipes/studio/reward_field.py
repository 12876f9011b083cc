"""The field for a reward's text: it completes names, and says beside itself what is wrong."""

from typing import Any

import gradio as gr

from recipes.studio.completing import completions
from recipes.studio.session import Studio
from recipes.studio.showing import FAULTS, said

__all__ = ["reward_field"]


def reward_field(studio: Studio, value: str, label: str, name: str) -> gr.Dropdown:
    """Return a field for a reward, with its error below it.

    Args:
        studio: says what is wrong with a text.
        value: the text that it begins with.
        label: of the field.
        name: its id on the page; that of its error is `NAME-error`.
    """
    field = gr.Dropdown(
        list(dict.fromkeys([value, *completions("")])), value=value, allow_custom_value=True,
        label=label, elem_id=name, num_choices_shown=None,
    )  # fmt: skip
    error = gr.Markdown(elem_id=f"{name}-error", elem_classes="beside")

    def complete(event: gr.KeyUpData) -> Any:
        return gr.Dropdown(choices=completions(event.input_value))

    def check(text: str | None) -> str:
        try:
            studio.reward(text or "")
        except FAULTS as problem:
            return said(problem)
        return ""

    field.key_up(complete, None, field, show_progress="hidden", trigger_mode="always_last",
                 queue=False)  # fmt: skip
    field.change(check, field, error, show_progress="hidden", trigger_mode="always_last")
    return field
