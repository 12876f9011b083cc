"""The whole page, with one tab each for steering, rewards, comparing, tuning and run folders."""

from typing import Any

import gradio as gr

from recipes.studio import compare_page, rewards_page, runs_page, steer_page, tune_page
from recipes.studio.session import LOADING, Studio
from recipes.studio.showing import FAULTS, said

__all__ = ["CSS", "pages", "theme"]

CSS = """
.said {color: #b3261e}
.dark .said {color: #f2b8b5}
.block.title {margin-bottom: -8px; overflow: visible !important}
.pictures .grid-wrap {min-height: 60px !important}
#command .cm-scroller, #python .cm-scroller {min-height: 60px !important}
.drawn img {max-width: min(100%, 640px); margin: auto}
@media (max-width: 500px) {
  .pictures .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
  #compare-table th *, #compare-table .body-cell * {
    font-size: .62rem !important; padding: 0 !important
  }
  #compare-table th, #compare-table .body-cell {padding: 6px 2px !important}
  #compare-table th *, #compare-table .body-cell:not(:first-child) * {
    white-space: nowrap !important
  }
}
.pictures .caption-label {white-space: normal; max-width: 96%; font-size: .75rem; padding: 1px 5px}
.beside:not(:has(p)), #loading:not(:has(p)) {display: none}
#report table {font-size: .85rem}
#report th, #report td {padding: 4px 8px; word-break: normal; overflow-wrap: normal}
#report td:first-child, #report td:nth-child(2) {white-space: nowrap}
"""


def theme() -> Any:
    """Return a theme that does not load fonts from other sites."""
    plain = ["system-ui", "sans-serif"]
    return gr.themes.Soft(font=plain, font_mono=["ui-monospace", "monospace"])


def pages(studio: Studio) -> gr.Blocks:
    """Return the whole page."""
    with gr.Blocks(title="flowsteer studio", analytics_enabled=False) as page:
        gr.Markdown(f"## flowsteer studio: `{studio.model}`, folder `{studio.root.name}`")
        loading = gr.Markdown(LOADING, elem_id="loading")
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

        def wait() -> str:
            try:
                studio.loading.get()
            except FAULTS as error:
                return said(error)
            return ""

        page.load(wait, None, loading, show_progress="hidden", concurrency_limit=None)

        def gone(request: gr.Request) -> None:
            studio.end(str(request.session_hash))

        page.unload(gone)
    return page
