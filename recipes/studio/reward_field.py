"""The field for a reward's text: it completes names, and shows errors next to it."""

import gradio as gr

from recipes.studio.completing import COMPLETE, WORDS
from recipes.studio.session import Studio
from recipes.studio.showing import FAULTS, said

__all__ = ["reward_field"]


def reward_field(studio: Studio, value: str, label: str, name: str) -> gr.Dropdown:
    """Return a field for a reward, with its error below it.

    Args:
        studio: checks the text.
        value: the initial text.
        label: label of the field.
        name: its id on the page; the id of its error is `NAME-error`.
    """
    field = gr.Dropdown(
        list(dict.fromkeys([value, *WORDS])), value=value, allow_custom_value=True,
        label=label, elem_id=name, num_choices_shown=None,
    )  # fmt: skip
    error = gr.Markdown(elem_id=f"{name}-error", elem_classes="beside")
    typed = f"document.querySelector('#{name} input').value"
    field.key_up(
        None, None, field, show_progress="hidden",
        js=f"() => ({{__type__: 'update', choices: ({COMPLETE})({typed}).map((t) => [t, t])}})",
    )  # fmt: skip

    def check(text: str | None) -> str:
        try:
            studio.reward(text or "")
        except FAULTS as problem:
            return said(problem)
        return ""

    field.change(check, field, error, show_progress="hidden", trigger_mode="always_last")
    return field
