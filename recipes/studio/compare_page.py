"""The Compare page: methods at equal network calls, shown row by row as they finish."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

import steer
from recipes.commands import ENTRIES
from recipes.studio.ask import whole_number
from recipes.studio.figures import compared
from recipes.studio.places import plain_method
from recipes.studio.reward_field import reward_field
from recipes.studio.session import Studio
from recipes.studio.showing import FAULTS, crisp, gallery, said, title

__all__ = ["page"]

COLUMNS = ["method", "calls", "reward", "judge", "seconds"]
WIDTHS = ["36%", "15%", "17%", "16%", "16%"]


def page(studio: Studio) -> None:
    """Lay out the page."""
    with gr.Row():
        with gr.Column(min_width=300):
            prompts = gr.Textbox(label="Prompts, one per line", value="fox\nbird", lines=2)
            reward = reward_field(studio, "clip", "Reward", "compare-reward")
            methods = gr.Textbox(label="Methods, one per line", value="\n".join(ENTRIES), lines=4,
                                 elem_id="compare-methods")  # fmt: skip
            seed = gr.Number(label="Seed", value=0, precision=0)
            with gr.Row():
                start = gr.Button("Compare", variant="primary", elem_id="compare-go")
                stop = gr.Button("Stop", variant="stop")
            error = gr.Markdown(elem_id="compare-error")
        with gr.Column(scale=2, min_width=320):
            table = gr.Dataframe(
                headers=COLUMNS,
                elem_id="compare-table",
                column_widths=WIDTHS,
                interactive=False,
                wrap=True,
            )
            title("Reward against network calls per picture")
            plot = gr.Plot(
                show_label=False, elem_id="compare-plot", elem_classes="drawn", format="png"
            )
            sheet = gallery("The best of each method", "compare-sheet")

    def run(
        asked: str, wanted: str, lines: str, number: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        rows: list[list[Any]] = []
        shown: list[Any] = []
        tab = str(request.session_hash)
        try:
            names = [line.strip() for line in asked.splitlines() if line.strip()]
            wished = [line.strip() for line in lines.splitlines() if line.strip()]
            if not names:
                raise ValueError("write a prompt, or several, a line each")
            if not wished:
                raise ValueError("write a method, or several, a line each, such as fmrg-j:steps=4")
            drawn_from = whole_number("seed", number)
            scorer = studio.fresh(wanted)
            import torch  # loaded only after the page is shown

            from recipes.entries import entry, equal_calls, finals, paid
            from recipes.methods import method
            from recipes.studio.jobs import NO_PICTURES
            from steer.flow import flat_prompts
            from steer.pictures import to_pil
            from steer.reward import score

            chosen = [entry(plain_method(line, studio.allow_files)) for line in wished]
            entries = equal_calls(chosen, scorer.differentiable, studio.flow)
            ended, left_out = studio.begun(tab, "compare"), []

            def rows_of() -> Iterator[tuple[list[Any], Any]]:
                for one in entries:
                    if ended.is_set():
                        return

                    def halted(population: steer.Population, label: str = one.label) -> None:
                        if ended.is_set() and population.time < 1:
                            population.stop()
                            left_out.append(label)

                    result = steer.sample(
                        studio.flow, scorer, names, one.particles, one.steps,
                        method(one.method), seed=drawn_from, progress=False, **one.options,
                        callback=halted,
                    )  # fmt: skip
                    if left_out:  # its reward does not belong to this number of calls
                        return
                    if result.images is None:
                        raise ValueError(NO_PICTURES)
                    made, got = finals(one, result, drawn_from)
                    judged, k = float("nan"), made.shape[1]
                    if studio.judge is not None:
                        texts = flat_prompts(names, len(names) * k)
                        with torch.no_grad():
                            judged = float(score(studio.judge, made.flatten(0, 1), texts).mean())
                    row = [one.label, round(paid(one, result)), round(float(got.mean()), 3),
                           round(judged, 3), round(result.costs["seconds"], 2)]  # fmt: skip
                    yield row, made[range(len(names)), got.argmax(1)]

            if studio.busy:
                yield gr.skip(), gr.skip(), gr.skip(), studio.busy
            for row, made in studio.in_turn(rows_of(), ended):
                rows.append(row)
                shown += [(crisp(to_pil(x)), row[0]) for x in made]
                yield rows, compared(rows), shown, ""
            if ended.is_set() and not rows and not left_out:
                yield gr.skip(), gr.skip(), gr.skip(), "stopped before the first row"
            if left_out:
                note = f"stopped: the row of {left_out[0]} was not finished, and is left out"
                yield gr.skip(), gr.skip(), gr.skip(), note
        except FAULTS as problem:
            yield gr.skip(), gr.skip(), gr.skip(), said(problem)

    def halt(request: gr.Request) -> None:
        studio.halt(str(request.session_hash), "compare")

    start.click(run, [prompts, reward, methods, seed], [table, plot, sheet, error],
                concurrency_limit=None)  # fmt: skip
    stop.click(halt, queue=False)
