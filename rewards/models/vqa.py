"""What a vision-language model answers when it is asked about a picture."""

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.messages import reason
from rewards.models.backbone import Backbone, once, stamp
from rewards.models.hub import Source, home
from rewards.models.prompts import one_each
from steer.reward import Reward, clamp01

__all__ = ["NEEDS", "QUESTION", "SOURCE", "VQA", "VisionLanguage"]

SOURCE = Source(
    "Qwen/Qwen2-VL-2B-Instruct",
    ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"),
    licence="Apache-2.0",
    size="4.4 GB",
)
"""The weights of the default model; any other of its kind has such files as well."""

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
"""The question of VQAScore."""

ROWS = 1024
"""Questions whose tokens a model keeps."""


NEEDS = (Source(SOURCE.repo, ("config.json", "preprocessor_config.json", "tokenizer.json")),)
"""What the default options need that does not come along."""


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
        question: what is asked, "{}" standing for the prompt; without "{}" no prompts are needed.
        answer: what is to be answered, as the model would write it, its space in front of it
            where its template ends without one; "{}" stands for the prompt here too.
        contrast: an answer that it is weighed against. In a reward's text a bare Yes or No, in
            any case, is "Yes" or "No"; for another spelling write it in quotes: answer='yes'.
        dtype: of the network: float32, bfloat16 or float16; None: as it is stored.
        compile: compile the network.
        checkpoint: recompute its blocks in the backward pass, for less memory.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an answer without tokens, a model of another kind, a processor of pictures
            that the gradient does not survive, or a model that cannot be had: says what to
            download and where to put it.
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
                raise ValueError(f"{option}='' says nothing: give it a word, as 'Yes'")
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


class VisionLanguage(Backbone):
    """A vision-language model with its processor, asked one question a picture.

    Pictures go through the processor's own image processor as tensors. Whether the gradient
    survives that, and whether it sees what a picture file would show, is tried once at the start.

    Args:
        model: of `AutoModelForImageTextToText`.
        processor: its processor.
        checkpoint: recompute the blocks in the backward pass.
        **execution: see `Backbone`.

    Raises:
        ValueError: the model is of another kind, or its processor does not fit; says how.
    """

    def __init__(
        self, model: nn.Module, processor: Any, *, checkpoint: bool = False, **execution: Any
    ) -> None:
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{name} reads the question in one network and answers in another: vqa:model= "
                "takes models that go on from pictures and text, as LLaVA or Qwen2-VL"
            )
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"the processor of {name}, {type(processor).__name__}, reads no pictures: the "
                "folder must hold preprocessor_config.json or processor_config.json of the model"
            )
        super().__init__(model, nn.Identity(), **execution)  # type: ignore[arg-type]
        self.processor = processor
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._suffix = 1 if "paligemma" in model.config.model_type else 0
        self._rows: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        self._options, self._keys = self._seen()
        self._try()
        if checkpoint:
            _checkpoint_blocks(model)

    def log_probability(
        self, images: Tensor, questions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """Return the log-probability of each answer, (n,) in nats."""
        tokens = [self._answer(text) for text in answers]
        logs = self._logs(images, questions, [t[:-1] for t in tokens])
        return _sums(logs, tokens)

    def log_odds(
        self,
        images: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        others: Sequence[str],
    ) -> Tensor:
        """Return `log p(answer) - log p(other)`, (n,); one pass where it suffices."""
        first = [self._answer(text) for text in answers]
        second = [self._answer(text) for text in others]
        before, instead = ([t[:-1] for t in tokens] for tokens in (first, second))
        logs = self._logs(images, questions, before)
        again = logs if before == instead else self._logs(images, questions, instead)
        return _sums(logs, first) - _sums(again, second)

    def _logs(
        self, images: Tensor, questions: Sequence[str], before: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return log softmax after each question and after each token of `before`.

        Rows are padded on the right, so no row's positions depend on another's: (n, 1 + longest
        of before, vocabulary).
        """
        shape = images.shape[-2:]
        rows = [self._row(text, *shape) for text in questions]
        lengths = [len(row["input_ids"]) for row in rows]
        total = max(n + len(b) for n, b in zip(lengths, before, strict=True))
        inputs = {}
        for key in rows[0]:
            fill = self._pad if key == "input_ids" else 0
            whole = torch.full((len(rows), total), fill, dtype=rows[0][key].dtype)
            for i, (row, n, b) in enumerate(zip(rows, lengths, before, strict=True)):
                whole[i, :n] = row[key]
                more = {"input_ids": torch.tensor(b, dtype=whole.dtype), "attention_mask": 1}
                whole[i, n : n + len(b)] = more.get(key, self._suffix * (key == "token_type_ids"))
            inputs[key] = whole.to(self.device)
        steps = 1 + max(map(len, before))
        places = torch.tensor(lengths)[:, None] - 1 + torch.arange(steps)
        places = places.clamp(max=total - 1)
        kept = places.unique()
        if self._selects:
            inputs["logits_to_keep"] = kept.to(self.device)
            places = torch.searchsorted(kept, places)
        with torch.autocast(self.device.type, enabled=False):
            pixels = self._pixels(images.to(self.device))
            pixels = {
                k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype)
                for k, v in pixels.items()
            }
            logits = self.model(**inputs, **pixels, use_cache=False).logits
        each = torch.arange(len(rows), device=logits.device)[:, None]
        logits = logits[each, places.to(logits.device)]
        return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)

    def _answer(self, text: str) -> list[int]:
        tokens = list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise ValueError(f"the answer {text!r} has no tokens: give it a word, as 'Yes'")
        return tokens

    @property
    def _pad(self) -> int:
        tokenizer = self.processor.tokenizer
        found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(i for i in found if i is not None)

    def _text(self, question: str) -> tuple[str, dict[str, Any]]:
        """Put a question and the picture's place into the processor's chat template."""
        processor = self.processor
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            bos = processor.tokenizer.bos_token
            return text, {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        token = getattr(processor, "image_token", None)
        if token is None:
            raise ValueError(
                f"{type(processor).__name__} has neither a chat template nor a token for "
                "pictures: put the model's chat_template.jinja into its folder"
            )
        return f"{token}\n{question}", {}

    def _process(self, pictures: Tensor, question: str) -> dict[str, Tensor]:
        """Process one picture (1, 3, h, w) and one question as the processor does, no gradient."""
        text, options = self._text(question)
        scaled = {"do_rescale": False} if pictures.is_floating_point() else {}
        out = self.processor(
            images=[list(pictures)], text=[text], return_tensors="pt", **options, **scaled
        )
        return dict(out)

    def _row(self, question: str, height: int, width: int) -> dict[str, Tensor]:
        """Return the tokens of a question about a picture of this size: name -> (length,)."""
        key = question, height, width
        if key not in self._rows:
            out = self._process(torch.zeros(1, 3, height, width), question)
            row = {k: v[0] for k, v in out.items() if k not in {*self._keys, "labels"}}
            strange = [k for k, v in row.items() if v.shape != row["input_ids"].shape]
            if strange:
                raise ValueError(
                    f"{type(self.processor).__name__} gives {strange[0]!r}, which vqa does not "
                    "know how to batch: choose a model such as LLaVA, Qwen2-VL or SmolVLM"
                )
            self._rows = dict([*self._rows.items(), (key, row)][-ROWS:])
        return self._rows[key]

    def _seen(self) -> tuple[dict[str, Any], list[str]]:
        """Return with what options the processor calls its image processor, and what both give."""
        reader, options = self.processor.image_processor, {}
        own = reader.preprocess

        def preprocess(images: Any, *args: Any, **given: Any) -> Any:
            options.update(given)
            return own(images, *args, **given)

        reader.preprocess = preprocess
        try:
            keys = list(self._process(torch.zeros(1, 3, 64, 64), "?"))
        finally:
            del reader.preprocess
        options |= {"do_rescale": False, "return_tensors": "pt"}
        found = reader([[torch.zeros(3, 64, 64)]], **options)
        return options, [key for key in keys if key in found]

    def _pixels(self, images: Tensor) -> dict[str, Tensor]:
        """Preprocess images (n, 3, h, w) in [0, 1] -> the model's inputs, with their gradient."""
        x = clamp01(images)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        out = self.processor.image_processor([[picture] for picture in x], **self._options)
        return {key: out[key] for key in self._keys}

    def _try(self) -> None:
        """See that the gradient survives, and that tensors and files give the same pixels."""
        name = type(self.processor.image_processor).__name__
        ramp = torch.linspace(0.1, 0.9, 96)
        one = torch.stack(
            [ramp[:, None] * ramp, ramp[:, None].expand(96, 96), ramp.expand(96, 96)]
        )
        bytes_ = (torch.stack([one, one.flip(0, 2)]) * 255).round().to(torch.uint8)
        x = (bytes_ / 255).requires_grad_()
        advice = "choose a model whose image processor is backed by torchvision"
        try:
            with torch.enable_grad():
                found = self._pixels(x)
        except Exception as error:
            raise ValueError(
                f"{name} takes no tensors with a gradient ({reason(error)}): {advice}"
            ) from error
        if not any(v.requires_grad for v in found.values()):
            raise ValueError(f"the gradient does not survive {name}: {advice}")
        each = [self._process(b[None], "?") for b in bytes_]
        for key, value in found.items():
            theirs = torch.cat([out[key] for out in each]).to(value.dtype)
            if theirs.shape != value.shape or (theirs - value).abs().double().mean() > 0.03:
                raise ValueError(
                    f"{name} makes another {key!r} of tensors in [0, 1] than of a picture file: "
                    f"{advice}"
                )


def _word(answer: str | bool) -> str:
    """Return the answer; YAML reads a bare Yes as true."""
    return {True: "Yes", False: "No"}[answer] if isinstance(answer, bool) else str(answer)


def _sums(logs: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Sum the log-probabilities of each row's tokens, (n, longest, vocabulary) -> (n,)."""
    rows = [logs[i, range(len(t)), t].sum() for i, t in enumerate(tokens)]
    return torch.stack(rows)


def _checkpoint_blocks(model: nn.Module) -> None:
    """Let every block of every tower be recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks to recompute: leave checkpoint out"
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore


def _folder(model: str | Path | None) -> Path:
    """Return the folder of a model: a path that was given, or a hub id's."""
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

    try:
        return Path(snapshot_download(repo, allow_patterns=list(SOURCE.files)))
    except Exception as error:
        source = SOURCE if repo == SOURCE.repo else Source(repo, SOURCE.files)
        raise ValueError(
            f"the weights of 'vqa' are not here, and {repo} cannot be had from the hub "
            f"({type(error).__name__}: {reason(error)}). Download its {source.place}, or say "
            "where they are: vqa:model=PATH"
        ) from error


def _model(model: str | Path | None, **execution: Any) -> VisionLanguage:
    """Return the model, once per folder and execution."""
    folder = _folder(model)

    def make() -> VisionLanguage:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            network, info = AutoModelForImageTextToText.from_pretrained(
                folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ValueError(
                f"cannot load the vision-language model in {str(folder)!r}: {reason(error)}. It "
                f"must hold all {', '.join(SOURCE.files)} of the model's page"
            ) from error
        lacking = sorted(info["missing_keys"])
        if lacking:
            raise ValueError(
                f"the files in {str(folder)!r} lack {len(lacking)} weights of "
                f"{type(network).__name__} ({lacking[0]} and so on): give those that its page "
                "publishes, unchanged"
            )
        return VisionLanguage(network, processor, **execution)

    return once(("vqa", *stamp(folder), *sorted(execution.items())), make)
