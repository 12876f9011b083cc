"""Entry points to optional packages, which are imported when a user's arguments need them.

A diffusers pipeline needs `steer.backends`, a reward given as text needs `rewards`, a comparison
or a plot needs `recipes`. Nothing else in this package imports them, and names in data files are
never resolved here.
"""

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.flow import FlowMap
from steer.reward import Reward, wrap

if TYPE_CHECKING:
    from steer.shown import Report

__all__ = ["as_flow", "as_reward", "compare", "evaluate", "is_pipeline", "plot_front"]


def is_pipeline(model: Any) -> bool:
    """Return whether something is a pipeline of diffusers, without importing diffusers."""
    return any(
        kind.__name__ in ("DiffusionPipeline", "ModularPipeline")
        and kind.__module__.partition(".")[0] == "diffusers"
        for kind in type(model).__mro__
    )


def as_flow(model: Any) -> FlowMap:
    """Return the model as a flow map: a flow unchanged, a diffusers pipeline wrapped as a flow.

    Raises:
        TypeError: it is neither; the message says how to make it one.
    """
    if isinstance(model, FlowMap):
        return model
    if is_pipeline(model):
        return importlib.import_module("steer.backends.table").flow_of(model)
    raise TypeError(
        f"a {type(model).__name__} is neither a steer.FlowMap nor a diffusers pipeline: give the "
        "whole pipeline, not its transformer or unet; a name or a folder goes through "
        "steer.load(...); a network of your own through steer.OneTime or a subclass of "
        "steer.FlowMap"
    )


def as_reward(reward: Any, device: Any = None) -> Reward:
    """Return a reward from a reward, a callable, or a reward's text.

    Args:
        reward: "0.5*clip + colour:name=red" and the like go through `rewards.load`.
        device: device for a reward that is created here.
    """
    if not isinstance(reward, str):
        return wrap(reward)
    return importlib.import_module("rewards").load(reward).to(device)


def plot_front(front: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Plot a tuning run's front as a PNG: see `recipes.plots.charts.front`."""
    charts, style = (importlib.import_module(f"recipes.plots.{n}") for n in ("charts", "style"))
    style.save(partial(charts.front, front), out, formats=("png",))


def compare(model: Any, reward: Any, **options: Any) -> "Report":
    """Compare sampling methods at equal network calls: `steer compare`, with a model object.

    Args:
        model: a flow map, a diffusers pipeline, or anything that `steer compare --model` takes.
        reward: its text, see `rewards.load`.
        **options: options of the command, by name: judge, prompts, methods, seeds, out.

    Returns:
        The folder with the table, the figures, the plots and the pictures; a notebook displays it.
    """
    from steer.shown import Report

    run = importlib.import_module("recipes.compare").compare
    return Report(run(model, reward=reward, **{"judge": None, **options}))


def evaluate(model: Any, lora: Any, **options: Any) -> "Report":
    """Compare adapters with their base and with guidance: `steer eval --lora`, on a model.

    Args:
        model: a flow map, a diffusers pipeline, or anything that `steer eval --model` takes.
        lora: folders of adapters that were made for it: one, several, or name -> folder.
        **options: options of the command, by name: reward, prompts, particles, steps, out.

    Returns:
        The folder with the table, the figures, the plots and the pictures; a notebook displays it.
    """
    from steer.shown import Report

    run = importlib.import_module("recipes.tuned").evaluate_tuned
    return Report(run(lora, model, **{"judge": None, **options}))
