"""Run folders: pictures, a captioned grid, scores and metrics. Whole or absent."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from steer.sample import Result

__all__ = [
    "Row",
    "captioned_grid",
    "refuse_existing",
    "save_result",
    "slug",
    "to_pil",
    "whole_folder",
    "write_atomically",
]

Row = tuple[str, Tensor, Sequence[str]]
"""A row of a grid: its title, images (n, 3, h, w) and a caption for each."""


@contextmanager
def whole_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a scratch folder that becomes `folder` when the block ends well, and else vanishes.

    Raises:
        FileExistsError: the folder exists, and `overwrite` is not set.
    """
    refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        refuse_existing(folder, overwrite)  # somebody may have made it meanwhile
        if not folder.exists():
            os.replace(scratch, folder)
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, aside / folder.name)
        try:
            os.replace(scratch, folder)
        except OSError:
            os.replace(aside / folder.name, folder)
            raise
        finally:
            shutil.rmtree(aside)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise if there is something that would be overwritten unasked."""
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"{folder} exists already, and is left as it is: choose another folder, or say "
            "overwrite (--overwrite on the command line)"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whatever happens."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image (3, h, w), nominally in [0, 1], into 8 bits: clamped here, and only here."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def slug(text: str, length: int = 40) -> str:
    """Make a file name of a text.

    >>> slug("A red, red apple!")
    'a_red_red_apple'
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:length] or "empty"


def captioned_grid(rows: Sequence[Row], size: int = 96) -> Image.Image:
    """Draw rows of pictures with a caption under each and a title above each row.

    Args:
        rows: (title, images, captions), of any lengths.
        size: the side of a picture in pixels; small pictures are enlarged without smoothing.
    """
    font = ImageFont.load_default(12)
    gap, line = 6, 16
    columns = max(len(images) for _, images, _ in rows)
    titles = [int(font.getlength(title)) for title, _, _ in rows]
    width = max(columns * (size + gap) + gap, max(titles) + 2 * gap)
    row_height = size + 2 * line + gap
    sheet = Image.new("RGB", (width, len(rows) * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, images, captions) in enumerate(rows):
        top = i * row_height + gap
        draw.text((gap, top), title, fill="black", font=font)
        for j, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = gap + j * (size + gap)
            kind = Image.Resampling.NEAREST if image.shape[-1] <= size else None
            picture = to_pil(image).resize((size, size), kind)
            sheet.paste(picture, (left, top + line))
            box = (left - 1, top + line - 1, left + size, top + line + size)
            draw.rectangle(box, outline="#dddddd")
            while caption and font.getlength(caption) > size:
                caption = caption[:-1]
            draw.text((left, top + line + size + 1), caption, fill="#444444", font=font)
    return sheet


def numbers(value: Any) -> Any:
    """Turn tensors into lists, and what is not finite into None, for JSON."""
    if isinstance(value, Tensor):
        return numbers(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(v) for v in value]
    return value


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process so far, in MB, on each kind of device in use."""
    import resource

    peaks = {"cpu_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def metrics(result: "Result") -> dict[str, Any]:
    """Return what `metrics.json` holds."""
    return numbers(
        {
            "method": result.method,
            "seed": result.seed,
            "log_z": result.log_z,
            "ess": result.ess,
            "temperature": result.temperature,
            "reward_mean": result.rewards.mean(-1),
            "reward_best": result.rewards.amax(-1),
            "nfe_per_particle": result.nfe,
            **result.costs,
            "trace": result.trace,
            "peak_memory": peak_memory(),
        }
    )


def save_result(
    result: "Result",
    folder: Path,
    overwrite: bool = False,
    *,
    unguided: "Result | None" = None,
    keep: str = "all",
    terms: dict[str, Tensor] | None = None,
    gradients: dict[str, Tensor] | None = None,
    files: dict[str, str] | None = None,
) -> Path:
    """Write a result as a run folder.

    Args:
        result: what `steer.sample` returned.
        folder: where to.
        overwrite: whether an existing folder is replaced.
        unguided: the same seeds without guidance, drawn beside it in the grid.
        keep: "all" particles or the "best" of each prompt go to `images/`.
        terms: the reward's terms by name, shaped as its rewards, for `scores.jsonl`.
        gradients: likewise, the norm of what each term adds to the reward's gradient.
        files: further text files by name.

    Raises:
        ValueError: the samples have no pixels.
        FileExistsError: the folder exists, and `overwrite` is not set.
    """
    if result.images is None:
        raise ValueError(
            "these samples have no pixels, so there are no pictures to save: keep result.x, for "
            "instance with safetensors.torch.save_file"
        )
    lead = result.rewards.ndim == 2
    prompts = list(result.prompts) if lead and result.prompts else [result.prompts or ""]
    asked = result.reward_prompts or prompts
    asked = [asked] * len(prompts) if isinstance(asked, str) else list(asked)

    def rows(v: Tensor) -> Tensor:
        return v if lead else v[None]

    images, rewards, log_w, best = map(
        rows, (result.images, result.rewards, result.log_w, result.best)
    )
    with whole_folder(folder, overwrite) as scratch:
        (scratch / "images").mkdir()
        lines, grid = [], []
        for i, prompt in enumerate(prompts):
            text = str(prompt)
            for j in range(images.shape[1]):
                name = f"images/{i:04d}_{slug(text)}_{j:02d}.png"
                kept = keep == "all" or j == int(best[i])
                if kept:
                    to_pil(images[i, j]).save(scratch / name)
                line = {
                    "prompt": text,
                    "reward_prompt": asked[i],
                    "seed": result.seed,
                    "particle": j,
                    "image": name if kept else None,
                    "reward": float(rewards[i, j]),
                    "terms": {k: float(rows(v)[i, j]) for k, v in (terms or {}).items()},
                    "gradients": {k: float(rows(v)[i, j]) for k, v in (gradients or {}).items()},
                    "log_w": float(log_w[i, j]),
                    "best": j == int(best[i]),
                }
                lines.append(json.dumps(numbers(line), ensure_ascii=False))
            shown = slice(0, 8)
            if unguided is not None and unguided.images is not None:
                plain, plain_rewards = rows(unguided.images)[i], rows(unguided.rewards)[i]
                captions = [f"{r:.3g}" for r in plain_rewards[shown].tolist()]
                grid.append((f"{text!r} unguided", plain[shown], captions))
            captions = [f"{r:.3g}" for r in rewards[i, shown].tolist()]
            question = "" if asked[i] == prompt else f", the reward asks for {asked[i]!r}"
            grid.append((f"{text!r} {result.method}{question}", images[i, shown], captions))
        captioned_grid(grid).save(scratch / "grid.png")
        (scratch / "scores.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (scratch / "metrics.json").write_text(json.dumps(metrics(result), indent=2) + "\n")
        for name, content in (files or {}).items():
            (scratch / name).write_text(content, encoding="utf-8")
    return folder
