"""The picture and the animation at the top of the README.

There are four noise samples per prompt, the first four of seed 0, without selection: on the left
the model's unguided pictures, on the right its pictures guided by a reward that asks for something
else.

    python -m benchmarks.readme --out docs
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import steer
from steer.files import write_atomically
from steer.pictures import save_picture, to_pil

SCENES = (
    ("a bird", "a red bird", "clip + 0.5*colour:name=red"),
    ("an animal", "a purple cat", "clip:views=4,noise=0.2"),
    ("a plant", "a sunflower", "clip:views=4,noise=0.2"),
)
"""The prompt of the model, what the reward asks for, and the reward."""

COUNT, SIDE, GAP, ARROW, HEAD = 4, 96, 8, 120, 34
WIDTH = 2 * COUNT * (SIDE + GAP) + ARROW + 2 * GAP
LARGEST = 1_500_000  # bytes of the animation


class Scene(NamedTuple):
    """Films of one prompt, without and with guidance."""

    asked: str
    reward: str
    plain: steer.Film
    guided: steer.Film


def filmed(steps: int) -> list[Scene]:
    """Return the films of all scenes."""
    flow, made = steer.load("emoji"), []
    for prompt, wanted, reward in SCENES:
        films = []
        for method in ("none", "fmrg-j"):
            films.append(steer.Film(flow, prompt, COUNT))
            steer.sample(
                flow, reward, prompt, COUNT, steps, method, reward_prompts=wanted,
                callback=films[-1],
            )  # fmt: skip
        made.append(Scene(prompt, wanted, *films))
    return made


def row(sheet: Image.Image, top: int, scene: Scene, left: Tensor, right: Tensor) -> None:
    """Draw a scene's pictures on a sheet: left (k, 3, h, w) as bytes, an arrow, right."""
    draw = ImageDraw.Draw(sheet)
    place = GAP
    for images in (left, right):
        for image in images:
            picture = to_pil(image.float() / 255).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(picture, (place, top))
            draw.rectangle((place - 1, top - 1, place + SIDE, top + SIDE), outline="#d8d8d8")
            place += SIDE + GAP
        place += ARROW
    start = GAP + COUNT * (SIDE + GAP)
    middle, end = top + SIDE // 2 + 8, start + ARROW - 14
    font = ImageFont.load_default(16)
    draw.text((start + (ARROW - GAP) // 2, middle - 16), f"“{scene.reward}”",
              fill="#1a1a1a", font=font, anchor="ms")  # fmt: skip
    draw.line((start + 6, middle, end - 8, middle), fill="#0072B2", width=4)
    draw.polygon([(end - 12, middle - 9), (end + 2, middle), (end - 12, middle + 9)],
                 fill="#0072B2")  # fmt: skip


def headed(height: int, left: str, right: str) -> Image.Image:
    """Return an empty sheet with a heading above each side."""
    sheet = Image.new("RGB", (WIDTH, height + HEAD), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    half = COUNT * (SIDE + GAP)
    for text, start in ((left, GAP), (right, GAP + half + ARROW)):
        draw.text((start, HEAD - 10), text, fill="#1a1a1a", font=font, anchor="ls")
    return sheet


def still(scenes: list[Scene]) -> Image.Image:
    """Draw the last pictures of all scenes, one row each."""
    each = SIDE + 3 * GAP
    sheet = headed(each * len(scenes), "the model alone", "the same noise, steered by a reward")
    for i, scene in enumerate(scenes):
        ends = (film.frames[-1].images for film in (scene.plain, scene.guided))
        row(sheet, HEAD + i * each, scene, *ends)
    return sheet


def moving(scenes: list[Scene], milliseconds: int = 320, end: int = 1900) -> bytes:
    """Return an animation of one scene after the other, as a GIF."""
    pages: list[Image.Image] = []
    times: list[int] = []
    for scene in scenes:
        for plain, guided in zip(scene.plain.frames, scene.guided.frames, strict=True):
            title = f"prompt: {scene.asked}"
            page = headed(SIDE + 2 * GAP, title, f"reward {float(guided.rewards.mean()):.2f}")
            row(page, HEAD, scene, plain.images, guided.images)
            pages.append(page)
            times.append(milliseconds)
        times[-1] = end
    each = len(pages) // len(scenes)
    both = Image.new("RGB", (WIDTH, len(scenes) * pages[0].height))
    for i in range(len(scenes)):
        both.paste(pages[(i + 1) * each - 1], (0, i * pages[0].height))
    palette = both.quantize(96, Image.Quantize.MEDIANCUT)
    first, *rest = (page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages)
    data = io.BytesIO()
    first.save(data, "GIF", save_all=True, append_images=rest, duration=times, loop=0,
               optimize=True)  # fmt: skip
    return data.getvalue()


def outputs(steps: int) -> Iterator[tuple[str, Image.Image | bytes]]:
    """Yield each file's name and its content."""
    scenes = filmed(steps)
    yield "readme.png", still(scenes)
    yield "steering.gif", moving(scenes)


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("outputs/readme"))
    args = parser.parse_args()
    for name, content in outputs(args.steps):
        if isinstance(content, bytes):
            if len(content) > LARGEST:
                raise SystemExit(f"{name} has {len(content)} bytes, more than {LARGEST}")
            write_atomically(args.out / name, content)
        else:
            save_picture(content, args.out / name)
        print(args.out / name)


if __name__ == "__main__":
    main()
