"""HPS v2: human preference for a picture, given a prompt, by a CLIP tuned on rankings."""

from pathlib import Path
from typing import Any

from rewards.models.cosine import Cosine
from rewards.models.hub import Source, folder_of, state
from rewards.models.instances import once, stamp
from rewards.models.preprocess import Preprocess
from rewards.models.towers import OpenClip
from rewards.models.weights import fill
from steer.reward import unknown

__all__ = ["NEEDS", "SOURCES", "HPSv2"]

SOURCES = {
    "2.1": Source("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), "Apache-2.0", "2 GB"),
    "2.0": Source("xswu/HPSv2", ("HPS_v2_compressed.pt",), "Apache-2.0", "2 GB"),
}
"""Version -> its published weights."""

ARCHITECTURE = "ViT-H-14"
"""open_clip's architecture of the published weights."""


NEEDS = (SOURCES["2.1"],)
"""What the default options need and the package does not contain."""


class HPSv2(Cosine):
    """`cos(image features, text features)`, in [-1, 1], about 0.2 to 0.35 for generated pictures.

    Wu et al. 2023, arXiv 2306.09341; the authors' tables have it times 100. Scores compare
    pictures of one prompt.

    A picture is fitted by its longer side and the rest filled with black, as the authors do; a
    square one fills all of it.

    Known hack: over-saturated, smooth, high-contrast pictures score higher for any prompt, more so
    with 2.1; also measure a reward that does not use the prompt.

    Args:
        version: "2.1" or "2.0".
        model: the checkpoint, a file or the folder that holds it: a .pt with the key "state_dict"
            in the layout of open_clip's ViT-H-14, or such weights as .safetensors.
        dtype: of the network: float32, bfloat16 or float16; None: float32, as the authors have it.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown version, weights of another layout, or weights that cannot be
            loaded; the message says what to download and where to put it.
    """

    def __init__(
        self,
        version: str = "2.1",
        model: str | Path | None = None,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        version = str(version).removeprefix("v")
        if version not in SOURCES:
            raise unknown("version of hpsv2", version, SOURCES)
        place = folder_of(model, SOURCES[version], "hpsv2")
        file = place / SOURCES[version].files[0] if place.is_dir() else place
        execution = {"dtype": dtype, "compile": compile, "checkpoint": checkpoint}
        if not file.is_file():
            raise FileNotFoundError(
                f"no {file.name} in {str(place)!r}: hpsv2:model= takes the checkpoint or the "
                f"folder that holds it; download it from {SOURCES[version].page}"
            )
        key = ("hpsv2", ARCHITECTURE, stamp(file), *execution.values())
        super().__init__(once(key, lambda: _backbone(file, execution)))


def _backbone(file: Path, execution: dict[str, Any]) -> OpenClip:
    import open_clip
    from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    weights = state(file, "hpsv2", "model")
    weights.pop("attn_mask", None)  # a constant that older versions stored
    model = open_clip.create_model(ARCHITECTURE, pretrained=None)
    fill(model, weights, file, "hpsv2")
    size = model.visual.image_size
    preprocess = Preprocess(size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, fit="pad")
    return OpenClip(model, open_clip.get_tokenizer(ARCHITECTURE), preprocess, **execution)
