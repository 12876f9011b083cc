"""The film of a sampling run, stored with its units and written with its folder."""

import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import steer
from recipes.partial import Partial
from recipes.terminal import console
from steer.film import Film, animation, filmstrip, movie

__all__ = ["Reel", "files_of"]

UNIT = "film"


class Reel:
    """The films of a group of prompts, if they are requested.

    Args:
        wanted: whether films are requested.
        prompts: prompts of the group.
    """

    def __init__(self, wanted: bool, prompts: list[str] | None) -> None:
        self.wanted, self.prompts = wanted, prompts
        self.films: dict[str, Film] = {}

    def of(
        self, title: str, flow: steer.FlowMap, show: Callable[[Any], None] | None = None
    ) -> Callable[[Any], None] | None:
        """Return the callback of a run after each step: that of the film, and `show`."""
        if not self.wanted:
            return show
        film = self.films[title] = Film(flow, self.prompts)

        def both(population: Any) -> None:
            film(population)
            if show is not None:
                show(population)

        return both

    def keep(self, partial: Partial) -> None:
        """Store the films with the run's finished units."""
        if self.wanted:
            tensors = {
                f"{title}/{name}": tensor
                for title, film in self.films.items()
                for name, tensor in film.tensors().items()
            }
            partial.add(UNIT, tensors, {})


def files_of(partial: Partial, titles: Sequence[str]) -> dict[str, bytes]:
    """Return the files of a film, if one was stored; the guided run is the last row.

    They are film.gif and filmstrip.png, and film.mp4 where PyAV is installed.
    """
    if not partial.has(UNIT):
        return {}
    tensors, _ = partial.read(UNIT)
    names = ("times", "images", "rewards")
    films = {t: Film.of({n: tensors[f"{t}/{n}"] for n in names}) for t in [*titles[1:], titles[0]]}
    data = io.BytesIO()
    filmstrip(films).save(data, "PNG")
    files = {"film.gif": animation(films), "filmstrip.png": data.getvalue()}
    if find_spec("av"):
        try:
            files["film.mp4"] = movie(films)
        except RuntimeError as error:  # the run is finished, and its GIF is there
            console().print(f"no film.mp4: {error}", soft_wrap=True)
    return files
