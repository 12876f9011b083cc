"""Log-probability of a vision-language model's answer to a question about a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.models.hub import Source, home
from rewards.models.instances import once, stamp
from rewards.models.prompts import one_each
from rewards.models.vision_language import VisionLanguage
from rewards.models.weights import refuse_lacking
from rewards.trust import may_fetch, refuse_fetch
from steer.reward import Reward, reason

__all__ = ["NEEDS", "QUESTION", "SOURCE", "VQA"]

SOURCE = Source(
    "Qwen/Qwen2-VL-2B-Instruct",
    ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"),
    licence="Apache-2.0",
    size="4.4 GB",
)
"""The weights of the default model; any other of its kind has such files as well."""

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
"""The question of VQAScore."""

NEEDS = (Source(SOURCE.repo, ("config.json", "preprocessor_config.json", "tokenizer.json")),)
"""What the default options need and the package does not contain."""


class VQA(Reward):
    """`log p(answer | image, question)`, in (-inf, 0] nats (Lin et al. 2024, arXiv 2404.01291).

    The sum over the answer's tokens of `log softmax(logits)[token]`, the model having read the
    picture, the question in its chat template and the tokens before. The end of the turn is not
    part of the answer. With `contrast` it is `log p(answer) - log p(contrast)`, the log-odds, in
    (-inf, inf): answers of which neither is likely no longer count against the picture.

    Known hack: a picture may show the prompt as written words, or noise that only this model
    reads; counts and places are read loosely. Check with another model.

    Args:
        model: a folder that transformers saved, or a hub id, of a model that goes on from
            pictures and text (`AutoModelForImageTextToText`): LLaVA, Qwen2-VL, SmolVLM,
            PaliGemma and their like. Default: Qwen/Qwen2-VL-2B-Instruct.
        question: the question, with "{}" as placeholder for the prompt; without "{}" no prompts
            are needed.
        answer: what is to be answered, as the model would write it, its space in front of it where
            its template ends without one; "{}" is the placeholder here, too.
        contrast: an answer that it is weighed against. In a reward's text a bare Yes or No, in
            any case, is "Yes" or "No"; for another spelling write it in quotes: answer='yes'.
        dtype: dtype of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the network.
        checkpoint: recompute its blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an answer without tokens, a model of another kind, a processor of pictures that
            the gradient does not survive, or a model that cannot be loaded: the message says what
            to download and where to put it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        question: str = QUESTION,
        answer: str | bool = "Yes",
        contrast: str | bool | None = None,
        dtype: str | None = None,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.question, self.answer = question, _word(answer)
        self.contrast = None if contrast is None else _word(contrast)
        for option, text in (("answer", self.answer), ("contrast", self.contrast)):
            if text == "":
                raise ValueError(f"{option}='' is empty: give a word such as 'Yes'")
        self.backbone = _model(model, dtype=dtype, compile=compile, checkpoint=checkpoint)

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Any] | None = None,
    ) -> Tensor:
        """Score images (n, 3, h, w) in [0, 1], with one prompt each where any is used -> (n,).

        Raises:
            ValueError: no prompts where the question needs them, or not one for each image.
        """
        texts = [self.question, self.answer, self.contrast or ""]
        if any("{}" in text for text in texts):
            prompts = one_each(images, prompts, "the reward 'vqa'")
        else:
            prompts = [""] * len(images)
        questions, answers, others = ([t.replace("{}", p) for p in prompts] for t in texts)
        if self.contrast is None:
            return self.backbone.log_probability(images, questions, answers).to(images.device)
        return self.backbone.log_odds(images, questions, answers, others).to(images.device)


def _word(answer: str | bool) -> str:
    """Return the answer as text, since YAML reads a bare Yes as true."""
    return {True: "Yes", False: "No"}[answer] if isinstance(answer, bool) else str(answer)


def _folder(model: str | Path | None) -> Path:
    """Return the folder of a model: the given path, or the folder of a hub id."""
    repo = SOURCE.repo if model is None else str(model)
    if Path(repo).is_dir():
        return Path(repo)
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise FileNotFoundError(
            f"no folder {repo!r}: vqa:model= takes a folder that exists, or a hub id org/name"
        )
    mine = home() / repo
    if (mine / "config.json").is_file():
        return mine
    from huggingface_hub import snapshot_download

    here = not may_fetch()
    try:
        files = list(SOURCE.files)
        return Path(snapshot_download(repo, allow_patterns=files, local_files_only=here))
    except Exception as error:
        refuse_fetch("vqa", repo)
        source = SOURCE if repo == SOURCE.repo else Source(repo, SOURCE.files)
        raise ValueError(
            f"the weights of 'vqa' are not on this machine, and {repo} cannot be downloaded from "
            f"the hub ({type(error).__name__}: {reason(error)}). Download its {source.place}, or "
            "give their location: vqa:model=PATH"
        ) from error


def _model(model: str | Path | None, **execution: Any) -> VisionLanguage:
    """Return the model, once per folder and execution."""
    folder = _folder(model)

    def make() -> VisionLanguage:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

        try:
            network, info = AutoModelForImageTextToText.from_pretrained(
                folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            # below torchvision 0.27, transformers resizes by Lanczos with PIL, which has no
            # gradient; torchvision then resizes by bicubic instead
            processor.image_processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, backend="torchvision"
            )
        except Exception as error:
            raise ValueError(
                f"cannot load the vision-language model in {str(folder)!r}: {reason(error)}. It "
                f"must hold all {', '.join(SOURCE.files)} of the model's page"
            ) from error
        refuse_lacking(info["missing_keys"], network, folder)
        return VisionLanguage(network, processor, **execution)

    return once(("vqa", *stamp(folder), *sorted(execution.items())), make)
