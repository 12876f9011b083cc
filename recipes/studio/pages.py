"""The whole page: a tab each for steering, rewards, comparing, tuning and run folders."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from recipes.studio import compare_page, rewards_page, runs_page, steer_page, tune_page
from recipes.studio.session import LOADING, Studio
from recipes.studio.showing import FAULTS, said

__all__ = ["CSS", "pages", "theme"]

CSS = """
.said {color: #b3261e}
.dark .said {color: #f2b8b5}
"""


def theme() -> Any:
    """Return a theme that loads no fonts from elsewhere."""
    plain = ["system-ui", "sans-serif"]
    return gr.themes.Soft(font=plain, font_mono=["ui-monospace", "monospace"])


def pages(studio: Studio) -> gr.Blocks:
    """Return the whole page."""
    with gr.Blocks(title="flowsteer studio", analytics_enabled=False) as page:
        gr.Markdown(f"## flowsteer studio: `{studio.model}`, folder `{studio.root.name}`")
        loading = gr.Markdown(elem_id="loading")
        with gr.Tabs() as tabs:
            with gr.Tab("Steer", id="steer"):
                steering = steer_page.page(studio, page)
            with gr.Tab("Rewards", id="rewards"):
                rewards_page.page(studio)
            with gr.Tab("Compare", id="compare"):
                compare_page.page(studio)
            with gr.Tab("Tune", id="tune"):
                folder = tune_page.page(studio)
            with gr.Tab("Runs", id="runs"):
                runs_page.page(studio, page, tabs, steering, folder)

        def wait() -> Iterator[str]:
            if not studio.loading.ready:
                yield LOADING
            try:
                studio.loading.get()
            except FAULTS as error:
                yield said(error)
            else:
                yield ""

        page.load(wait, None, loading, show_progress="hidden", concurrency_limit=None)

        def gone(request: gr.Request) -> None:
            studio.end(str(request.session_hash))

        page.unload(gone)
    return page
