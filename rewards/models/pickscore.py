"""PickScore: which picture people prefer for a prompt, by a CLIP tuned on their choices."""

from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.models.cosine import Cosine
from rewards.models.hub import Source, folder_of
from rewards.models.instances import once, stamp
from rewards.models.preprocess import Preprocess
from rewards.models.towers import Transformers
from rewards.models.weights import pretrained

__all__ = ["NEEDS", "SOURCE", "PickScore"]

SOURCE = Source(
    "yuvalkirstain/PickScore_v1",
    ("config.json", "model.safetensors"),
    licence="see its page",
    size="3.9 GB",
)
"""The published weights."""


NEEDS = (SOURCE,)
"""What the default options need and the package does not contain."""


class PickScore(Cosine):
    """`e^a cos(image features, text features)` with the a of training, `e^a` about 100.

    Kirstain et al. 2023, arXiv 2305.01569. In [-e^a, e^a], for pictures of generators about 16 to
    26; the softmax of two pictures' scores is the chance that people prefer each, so a point is a
    nat. Scores compare pictures of one prompt.

    Known hack: saturated, glossy, centred pictures with extra detail score higher for any prompt;
    also measure a reward that does not use the prompt.

    Args:
        model: a folder or hub id org/name with config.json and model.safetensors in the layout of
            transformers' CLIPModel. Default: PickScore v1.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the tower of pictures.
        checkpoint: recompute the tower's blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: weights of another layout, or weights that cannot be loaded; the
            message says what to download and where to put it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        folder = folder_of(model, SOURCE, "pickscore")
        execution = {"dtype": dtype, "compile": compile, "checkpoint": checkpoint}
        key = ("pickscore", stamp(folder), *execution.values())
        backbone = once(key, lambda: _backbone(folder, execution))
        super().__init__(backbone)
        self.scale = backbone.scale


def _backbone(folder: Path, execution: dict[str, Any]) -> Transformers:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from transformers import CLIPModel

    model = pretrained(CLIPModel, folder, "pickscore")
    size = model.config.vision_config.image_size
    encode = SimpleTokenizer(context_length=model.config.text_config.max_position_embeddings)

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": encode(texts)}  # padding follows the end token: causal

    preprocess = Preprocess(size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return Transformers(model, tokens, preprocess, **execution)
