"""Vision-language models as backbones: probability of an answer about a picture."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.backbone import Backbone, recomputed
from steer.reward import clamp01, reason

__all__ = ["ROWS", "VisionLanguage"]

ROWS = 1024
"""Number of questions whose tokens a model caches."""


class VisionLanguage(Backbone):
    """A vision-language model with its processor, with one question per picture.

    Pictures go through the processor's own image processor as tensors. At the start it is checked
    once that the gradient passes through it, and that tensors and picture files give the same
    pixels.

    Args:
        model: a model of `AutoModelForImageTextToText`.
        processor: its processor.
        checkpoint: recompute the blocks in the backward pass.
        **execution: see `Backbone`.

    Raises:
        ValueError: the model is of another kind, or its processor does not fit; the message says
            how.
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
        """Return `log p(answer) - log p(other)`, (n,), in one forward pass if possible."""
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
            raise ValueError(f"the answer {text!r} has no tokens: give a word such as 'Yes'")
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
            self._tell_long(question, row["input_ids"])
            self._rows = dict([*self._rows.items(), (key, row)][-ROWS:])
        return self._rows[key]

    def _tell_long(self, question: str, tokens: Tensor) -> None:
        """Warn, once per question, if it is cut or longer than the model's positions."""
        if question in self._looked_at:
            return
        self._looked_at = dict([*self._looked_at.items(), (question, None)][-ROWS:])
        shown = question if len(question) <= 60 else f"{question[:60]} ..."
        texts, blank = (question, f"{question} and more"), torch.zeros(1, 3, 64, 64)
        same, more = (self._process(blank, text)["input_ids"][0] for text in texts)
        if torch.equal(same, more):  # further questions are not recorded
            warnings.warn(
                f"the reward 'vqa' reads {len(tokens)} tokens of a question, including those of "
                f"its picture, and this one is longer: its end is ignored in {shown!r}",
                stacklevel=2,
            )
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(tokens) > most:
            warnings.warn(
                f"a question of {len(tokens)} tokens, including those of its picture, is longer "
                f"than the {most} that {type(self.model).__name__} has positions for, so its "
                f"answer is not reliable: {shown!r}",
                stacklevel=2,
            )

    def _seen(self) -> tuple[dict[str, Any], list[str]]:
        """Return the options that the processor gives its image processor, and both outputs."""
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
        """Check that the gradient passes, and that tensors and files give the same pixels."""
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
                    f"{name} makes another {key!r} for tensors in [0, 1] than for a picture file: "
                    f"{advice}"
                )


def _sums(logs: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Sum the log-probabilities of each row's tokens, (n, longest, vocabulary) -> (n,)."""
    rows = [logs[i, range(len(t)), t].sum() for i, t in enumerate(tokens)]
    return torch.stack(rows)


def _checkpoint_blocks(model: nn.Module) -> None:
    """Recompute every block of every tower in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks to recompute: leave checkpoint out"
        )
    recomputed(blocks)
