"""`Film`: the lookaheads of a sampling run, as a filmstrip and as an animation."""

import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from steer.doors import as_flow
from steer.files import expanded, write_atomically
from steer.flow import device_of
from steer.pictures import captioned_grid, save_picture, side_of
from steer.ranges import above

__all__ = ["Film", "Frame", "animation", "filmstrip", "movie"]

COLUMNS = 9
"""Pictures of a filmstrip."""

LAST = 2000  # milliseconds that the end of an animation stays


class Frame(NamedTuple):
    """One step.

    Attributes:
        time: where the particles are; 0 is noise, 1 data.
        images: their lookaheads, (k, 3, h, w) as bytes.
        rewards: of the particles, (k,); NaN before the first evaluation.
    """

    time: float
    images: Tensor
    rewards: Tensor


class Film:
    """A callback that records the lookaheads `X(t,1,x_t)` of the first particles of one prompt.

    If the method computes lookaheads itself, a frame costs one decoding. If it does not (`none`,
    `best-of-n`, `reno`, `noise-smc`), a frame also costs a network call, which is not included in
    the counts of the run.

    >>> import steer
    >>> flow = steer.load("emoji")
    >>> film = Film(flow, "fox", particles=2)
    >>> _ = steer.sample(flow, "brightness", "fox", particles=4, steps=3, callback=film)
    >>> len(film.frames), tuple(film.frames[0].images.shape), film.strip().height > 100
    (3, (2, 3, 32, 32), True)

    Args:
        flow: the flow map or pipeline that is sampled.
        prompts: those given to `steer.sample`; the first is recorded.
        particles: how many of its particles.

    Attributes:
        frames: one a step.
    """

    def __init__(
        self, flow: Any, prompts: str | Sequence[str] | None = None, particles: int = 4
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        self.flow = as_flow(flow)
        if prompts is not None:
            first = prompts if isinstance(prompts, str) else prompts[0]
            self.flow = self.flow.given([first])
        self.particles, self.frames = particles, list[Frame]()
        self._position: int | None = None

    @torch.no_grad()
    def __call__(self, population: Any) -> None:
        """Keep a step's pictures: `steer.sample(..., callback=film)`.

        Raises:
            ValueError: the flow decodes to no pictures.
        """
        position = population.positions[0]
        if self._position is None:
            self._position = position
        if position != self._position:
            return  # of another prompt
        event = len(self.flow.event_shape)

        def first(value: Tensor, axes: int) -> Tensor:
            return (value[0] if value.ndim - axes == 2 else value)[: self.particles]

        if population.images is not None:
            images = first(population.images, 3)
        elif population.clean is not None:
            images = self.flow.decode(first(population.clean, event))
        else:
            x = first(population.x, event).to(device_of(self.flow))
            images = self.flow.decode(self.flow.lookahead(x, population.time))
        reward = first(population.reward, 0)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "a film needs pictures (n, 3, h, w), and this flow decodes to "
                f"{tuple(images.shape)}: leave the film out"
            )
        pixels = images.float().clamp(0, 1).mul(255).round().byte().cpu()
        self.frames.append(Frame(float(population.time), pixels, reward.float().cpu()))

    def tensors(self) -> dict[str, Tensor]:
        """Return the frames as tensors: times (f,), images (f, k, 3, h, w), rewards (f, k)."""
        times = torch.tensor([f.time for f in self.frames])
        parts = [torch.stack([f[i] for f in self.frames]) for i in (1, 2)]  # type: ignore[misc]
        return {"times": times, "images": parts[0], "rewards": parts[1]}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Film":
        """Return a film from the result of `tensors`."""
        film = cls.__new__(cls)
        parts = (tensors["times"].tolist(), tensors["images"], tensors["rewards"])
        film.frames = [Frame(*parts) for parts in zip(*parts, strict=True)]
        film.particles = tensors["images"].shape[1]
        return film

    def strip(self, particle: int | None = None, columns: int = COLUMNS) -> Image.Image:
        """Return the lookaheads of one particle from left to right: `filmstrip` of this film."""
        return filmstrip({"": self}, particle, columns)

    def gif(self, out: str | Path, milliseconds: int = 200) -> Path:
        """Write the run as an animated GIF, atomically: `animation` of this film.

        Args:
            out: the file.
            milliseconds: how long each step is shown.
        """
        out = expanded(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, animation({"": self}, milliseconds))
        return out

    def mp4(self, out: str | Path, milliseconds: int = 200) -> Path:
        """Write the run as an MP4 file, atomically: `movie` of this film.

        Args:
            out: the file.
            milliseconds: how long each step is shown.

        Raises:
            ModuleNotFoundError: PyAV is not installed.
        """
        out = expanded(out)
        data = movie({"": self}, milliseconds)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data)
        return out

    def save(self, out: str | Path) -> Path:
        """Write the filmstrip as a PNG, atomically."""
        out = expanded(out)
        save_picture(self.strip(), out)
        return out


def filmstrip(
    films: Mapping[str, Film], particle: int | None = None, columns: int = COLUMNS
) -> Image.Image:
    """Draw the lookaheads of runs with the same seed, one row per run, time from left to right.

    Args:
        films: title -> film. If the only title is empty, there is no line for it.
        particle: index of the particle. Default: the one with the highest final reward in the last
            film.
        columns: pictures per row: evenly spaced steps, including the last.

    Raises:
        ValueError: a film without a frame, or no such particle.
    """
    chosen = _best(films) if particle is None else particle
    rows = []
    for title, film in films.items():
        frames = _some(_frames(film), columns)
        if not 0 <= chosen < len(frames[0].rewards):
            raise ValueError(
                f"there is no particle {chosen}: the film has {len(frames[0].rewards)}, from 0 on"
            )
        images = torch.stack([f.images[chosen] for f in frames]).float() / 255
        rows.append((title, images, [_caption(f, chosen, True) for f in frames]))
    return captioned_grid(rows, side_of(rows[0][1]))


def animation(
    films: Mapping[str, Film], milliseconds: int = 200, size: int | None = None
) -> bytes:
    """Return an animated GIF of runs with the same seeds, one row per run.

    Args:
        films: title -> film.
        milliseconds: how long each step is shown.
        size: the side of a picture in pixels. Default: as in grids.

    Raises:
        ValueError: a film without a frame, a time that is not above zero.
    """
    above("milliseconds", milliseconds)
    pages = _pages(films, size)
    # one palette for all pages, from the last and the first, so that constant pixels do not
    # flicker
    both = Image.new("RGB", (pages[0].width, 2 * pages[0].height))
    both.paste(pages[-1], (0, 0))
    both.paste(pages[len(pages) // 2], (0, pages[0].height))
    palette = both.quantize(128, Image.Quantize.MEDIANCUT)
    indexed = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    data = io.BytesIO()
    indexed[0].save(
        data, "GIF", save_all=True, append_images=indexed[1:], loop=0, optimize=True,
        duration=[milliseconds] * (len(pages) - 1) + [LAST],
    )  # fmt: skip
    return data.getvalue()


def movie(films: Mapping[str, Film], milliseconds: int = 200, size: int | None = None) -> bytes:
    """Return runs of the same seeds as an MP4 (H.264), a row each; the end stays two seconds.

    Args:
        films: title -> film.
        milliseconds: how long each step is shown.
        size: the side of a picture in pixels. Default: as in grids.

    Raises:
        ValueError: a film without a frame, a time that is not above zero.
        RuntimeError: this PyAV has no encoder for H.264.
        ModuleNotFoundError: PyAV is not installed.
    """
    above("milliseconds", milliseconds)
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "an MP4 needs PyAV, which is not installed: pip install 'flowsteer[video]', or write "
            "a GIF"
        ) from error
    pages = _pages(films, size)
    pages += [pages[-1]] * round(LAST / milliseconds - 1)
    data = io.BytesIO()
    # both sides have an even number of pixels, because colours have half the resolution
    sides = pages[0].width + pages[0].width % 2, pages[0].height + pages[0].height % 2
    with av.open(data, "w", format="mp4") as file:
        try:
            stream = file.add_stream("libx264", Fraction(1000) / Fraction(milliseconds))
        except (ValueError, av.FFmpegError) as error:
            raise RuntimeError(
                f"this PyAV cannot write H.264 ({error}): install PyAV's own wheel, pip install "
                "av, or write a GIF"
            ) from error
        stream.width, stream.height = sides
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for page in pages:
            whole = Image.new("RGB", sides, "white")
            whole.paste(page, (0, 0))
            file.mux(stream.encode(av.VideoFrame.from_image(whole)))
        file.mux(stream.encode())
    return data.getvalue()


def _pages(films: Mapping[str, Film], size: int | None) -> list[Image.Image]:
    """Draw a page for each step with a row for each film, all in the same layout."""
    every = {title: _frames(film) for title, film in films.items()}
    steps = max(map(len, every.values()))
    side = size or side_of(next(iter(every.values()))[0].images)
    pages = []
    for i in range(steps):
        rows = []
        for title, frames in every.items():
            frame = frames[min(i, len(frames) - 1)]
            captions = [_caption(frame, j, False) for j in range(len(frame.rewards))]
            rows.append((title, frame.images.float() / 255, captions))
        pages.append(captioned_grid(rows, side))
    return pages


def _frames(film: Film) -> list[Frame]:
    if not film.frames:
        raise ValueError(
            "this film has no frames yet: pass it to steer.sample(..., callback=film) first"
        )
    return film.frames


def _some(frames: Sequence[Frame], most: int) -> list[Frame]:
    """Return at most this many frames, evenly spaced and including the last."""
    most = min(max(most, 1), len(frames))
    if most == 1:
        return [frames[-1]]
    return [frames[round(i * (len(frames) - 1) / (most - 1))] for i in range(most)]


def _best(films: Mapping[str, Film]) -> int:
    last = _frames(list(films.values())[-1])[-1].rewards
    return int(last.nan_to_num(nan=-torch.inf).argmax())


def _caption(frame: Frame, particle: int, timed: bool) -> str:
    reward = float(frame.rewards[particle])
    seen = "" if reward != reward else f"{reward:.3g}"
    return f"t={frame.time:.2f}  {seen}".strip() if timed else seen
