"""The figures of `steer eval` as a table on the terminal."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from recipes.figures import Estimate
from recipes.terminal import say

__all__ = ["show"]


def show(metrics: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("figure", "at", "value", title=f"model {escape(metrics['model'])}")
    retrieval = metrics["retrieval_1_of_100"]
    for k, share in retrieval["rate"].items():
        name = f"{k} steps" if k.isdigit() else k
        error = retrieval["standard_error"][k]
        ratio = retrieval["relative_to_real"].get(k)
        beside = f"  ({ratio:.0%} of real)" if ratio is not None else ""
        table.add_row("retrieval, 1 of 100", name, f"{share:.3f} ± {error:.3f}{beside}")
    for figure in ("style_binding", "colour_binding"):
        for who, shares in metrics[figure].items():
            for what, share in shares.items():
                if what != "pictures":
                    row = f"{who}: {what}"
                    table.add_row(figure.replace("_", " "), row, str(Estimate(**share)))
    for at, value in metrics["kernel_distance"].items():
        spread = f"{value['mean']:.4f} (spread {value['spread']:.4f})"
        table.add_row("kernel distance (KID)", at, spread)
    for breadth, values in metrics["diversity"].items():
        for who in ("model", "real"):
            table.add_row("diversity", f"{breadth}: {who}", str(Estimate(**values[who])))
    for what, value in metrics["nearest_training_distance"].items():
        table.add_row("nearest training picture", what, f"{value:.3f}")
    for what, share in metrics["memorisation"]["share_nearer"].items():
        table.add_row("nearer than 95% of real ones", what, str(Estimate(**share)))
    for at, value in metrics["composition_error"].items():
        table.add_row("composition error", at, f"{value:.3f}")
    for start, values in metrics["lagrangian_residual"].items():
        for t, value in values.items():
            table.add_row("Lagrangian residual", f"{start} at {t}", f"{value:.3f}")
    say(table)
