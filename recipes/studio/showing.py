"""Display of pictures and errors on the page."""

import functools
import logging
import math
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

__all__ = ["FAULTS", "crisp", "gallery", "heard", "said", "title"]

FAULTS = Exception
"""What a page shows beside what caused it, instead of gradio's own notice."""

SENTENCES = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError)
"""Errors by which the library refuses something; their message is enough."""

SIDE = 192
"""Small pictures are shown at a multiple of their size with at least this many pixels per side."""


def crisp(image: Image.Image) -> Image.Image:
    """Return a small picture enlarged by a whole number, without smoothing."""
    times = max(1, math.ceil(SIDE / max(image.size)))
    size = image.width * times, image.height * times
    return image if times == 1 else image.resize(size, Image.Resampling.NEAREST)


def title(text: str) -> gr.Markdown:
    """Add a title above the next element; gradio's own labels would cover the pictures."""
    return gr.Markdown(f"**{text}**", elem_classes="title")


def gallery(text: str, name: str, **more: Any) -> gr.Gallery:
    """Return a titled gallery of small pictures, four in a row.

    Args:
        text: the title.
        name: its id on the page.
        more: further arguments of `gr.Gallery`.
    """
    title(text)
    return gr.Gallery(
        columns=4, height="auto", object_fit="contain", format="png", show_label=False,
        elem_id=name, elem_classes="pictures", buttons=["download_all"], interactive=False, **more,
    )  # fmt: skip


def said(error: Exception | str) -> str:
    """Return the message of an error for the page, as the library wrote it.

    Any other error is shown with its kind, and its traceback is logged.
    """
    text = str(error)
    if isinstance(error, Exception) and not isinstance(error, SENTENCES):
        logging.getLogger(__name__).error("unexpected error", exc_info=error)
        text = f"{type(error).__name__}: {text}"
    return f"<span class='said'>{escape(text)}</span>"


def heard(f: Callable[..., Any], empty: int) -> Callable[..., Any]:
    """Let a handler return an error as its last output, after `empty` unchanged outputs."""

    @functools.wraps(f)
    def handler(*given: Any) -> Any:
        try:
            return f(*given)
        except FAULTS as error:
            return (*[gr.skip()] * empty, said(error)) if empty else said(error)

    return handler
