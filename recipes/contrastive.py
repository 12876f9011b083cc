"""Contrastive training of an image tower and a text tower on the emoji captions.

A caption is true of a picture if all its words are among the picture's words. For picture i the
loss is `-log(e^{s_ii} / (e^{s_ii} + sum_{j false for i} e^{s_ij}))`, and the same for captions:
InfoNCE (van den Oord et al. 2018, arXiv 1807.03748), where a caption that happens to be true of
another picture of the batch is not one of its negatives. The same loss over the labels of all
concepts is added, because with in-batch captions alone the network learned fine differences many
times more slowly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.data import recolour
from recipes.data.emoji import STYLES, Emoji
from recipes.data.recolour import HUES, NAMED, plain_label
from steer.reward import Reward
from steer.training.data import generator_of
from steer.training.optim import MuonAdamW, warm_cosine

__all__ = ["ContrastiveTraining", "Pairs", "ascend", "augment", "retrieval"]


def picture_words(emoji: Emoji) -> list[set[str]]:
    """Return the words that are true of each picture."""
    words = []
    for i in range(len(emoji)):
        texts = [emoji.labels[i], emoji.styles[i], emoji.groups[i], emoji.subgroups[i]]
        texts += [*emoji.tags[i], *emoji.colours[i]]
        words.append({w for text in texts for w in text.split()})
    return words


def augment(
    images: Tensor, generator: torch.Generator, *, crop: float, noise: float, colour: float,
    flip: bool = True, erase: float = 0.0, blur: float = 0.0,
) -> Tensor:  # fmt: skip
    """Crop, shift, flip, jitter, blur, cut out and add noise, at random for each picture.

    Args:
        images: (n, 3, h, w) in [0, 1].
        generator: generator of all random numbers.
        crop: the scale of the view is 1 ± crop, and it is shifted by up to as much.
        noise: largest standard deviation of the noise.
        colour: largest relative change of brightness, contrast and single channels.
        flip: whether half of them are mirrored.
        erase: share of pictures with a grey square cut out.
        blur: share of pictures that are blurred.
    """
    n, _, h, w = images.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    theta = torch.zeros(n, 2, 3)
    scale = 1 + crop * (2 * uniform(n) - 1)
    mirror = torch.where(uniform(n) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    turn = 0.5 * crop * (2 * uniform(n) - 1)
    theta[:, 0, 0], theta[:, 0, 1] = scale * mirror, -turn
    theta[:, 1, 0], theta[:, 1, 1] = turn * mirror, scale
    theta[:, :, 2] = 1.5 * crop * (2 * uniform(n, 2) - 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # white outside
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where((uniform(n) < blur)[:, None, None, None], soft, x)
    gain = 1 + colour * (2 * uniform(n, 3, 1, 1) - 1) * 0.5
    x = (x - 0.5) * (1 + colour * (2 * uniform(n, 1, 1, 1) - 1)) + 0.5
    x = x * gain + 0.5 * colour * (2 * uniform(n, 1, 1, 1) - 1)
    if erase:
        rows, columns = torch.arange(h)[:, None], torch.arange(w)
        top, left, side = uniform(3, n, 1, 1)
        side = 4 + 6 * side
        hole = (rows >= top * h) & (rows < top * h + side)
        hole = hole & (columns >= left * w) & (columns < left * w + side)
        hole = hole & (uniform(n, 1, 1) < erase)
        x = torch.where(hole[:, None], uniform(n, 3, 1, 1), x)
    x = x + noise * uniform(n, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    return x.clamp(0, 1)


class Pairs:
    """Sample the batch of a step: augmented pictures, captions, and which captions are true.

    With each caption comes a twisted one, in which the colour or style is replaced, so that the
    network has to use these words.

    Args:
        emoji: the data.
        index: indices of the pictures to use.
        batch_size: pairs per step.
        seed: with the step, it fixes the batch.
        change: (images, generator) -> augmented images.
        recoloured: fraction of pictures that are recoloured.
    """

    def __init__(
        self,
        emoji: Emoji,
        index: Tensor,
        batch_size: int,
        seed: int,
        change: Callable[[Tensor, torch.Generator], Tensor],
        recoloured: float = 0.35,
    ) -> None:
        self.emoji, self.index, self.change = emoji, index, change
        self.batch_size, self.seed, self.recoloured = batch_size, seed, recoloured
        self.other = recolour.load()
        self.words = picture_words(emoji)
        concepts = emoji.concepts
        self.labels = list(dict.fromkeys([*concepts, *map(plain_label, concepts)]))

    def __call__(self, step: int) -> tuple[Tensor, list[str], Tensor, Tensor, Tensor]:
        """Return the pictures (n, 3, 32, 32) of a step, and two lists of texts to discriminate.

        The first has their n captions and n twisted ones, with a matrix (n, 2 n) of whether text j
        is true of picture i. The second has each picture's index (n,) in `labels`, with a matrix
        (n, k) for all labels.
        """
        generator = generator_of(self.seed, step, 4)
        chosen = torch.randint(len(self.index), (self.batch_size,), generator=generator)
        pictures, captions, own, words = [], [], [], []
        for i in self.index[chosen].tolist():
            turned = float(torch.rand((), generator=generator)) < self.recoloured
            colour = self.other.draw(i, generator) if turned else None
            label = self.emoji.labels[i]
            if colour is None:
                pictures.append(self.emoji.images[i])
                captions.append(self.emoji.captions(i, generator))
                own.append(self.labels.index(label))
                words.append(self.words[i])
            else:
                pictures.append(self.other.picture(i, colour))
                captions.append(self.other.captions(i, colour, generator))
                own.append(self.labels.index(plain_label(label)))
                words.append({*self.words[i]} - NAMED | {colour})
        texts = captions + [twisted(caption, generator) for caption in captions]
        changed = self.change(torch.stack(pictures), generator)
        places = torch.tensor(own)
        return changed, texts, _true(words, texts), places, _true(words, self.labels)


def _true(words: Sequence[set[str]], texts: Sequence[str]) -> Tensor:
    """Return whether all words of text j are true of picture i, (n, k)."""
    bags = [set(text.split()) for text in texts]
    return torch.tensor([[bag <= known for bag in bags] for known in words])


def twisted(caption: str, generator: torch.Generator) -> str:
    """Replace the colour or style in a caption; if it names none, add a random one."""

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    words = caption.split()
    for place, word in enumerate(words):
        for family in (list(HUES), sorted({w for s in STYLES.values() for w in s.split()})):
            if word in family:
                words[place] = pick([w for w in family if w != word])
                return " ".join(dict.fromkeys(words))
    return " ".join([pick(list(HUES) + list(STYLES.values())), caption])


def contrast(similarity: Tensor, truth: Tensor, own: Tensor | None = None) -> Tensor:
    """Return the loss of scaled similarities (n, k), rows pictures and columns texts.

    Without `own`, the first n texts are the pictures' captions; the remaining ones are further
    negatives.

    Args:
        similarity: scaled cosines.
        truth: whether text j is true of picture i, (n, k).
        own: index of each picture's own text (n,). Default: text i belongs to picture i, and the
            loss is symmetric.
    """
    target = torch.arange(len(truth)) if own is None else own
    left_out = truth.clone()
    left_out[torch.arange(len(truth)), target] = False
    s = similarity.masked_fill(left_out.to(similarity.device), -torch.inf)
    target = target.to(s.device)
    if own is not None:
        return F.cross_entropy(s, target)
    n = len(truth)
    return (F.cross_entropy(s, target) + F.cross_entropy(s[:, :n].T, target)) / 2


class ContrastiveTraining(L.LightningModule):
    """Train two towers; all random numbers of step k are a function of (seed, k).

    Args:
        network: what is trained.
        encode_image: network, images -> unit vectors.
        encode_text: network, captions -> unit vectors.
        log_scale: the logarithm of the similarities' scale.
        batches: samples the batch of each step.
        steps: length of the run; the rate follows a cosine to zero over it.
        rate: learning rate of Muon on the matrices, and of AdamW on the rest.
    """

    def __init__(
        self,
        network: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Sequence[str]], Tensor],
        log_scale: nn.Parameter,
        batches: Pairs,
        *,
        steps: int,
        rate: float = 2e-3,
    ) -> None:
        super().__init__()
        self.network, self.batches, self.steps = network, batches, steps
        self.encode_image, self.encode_text, self.log_scale = encode_image, encode_text, log_scale
        self.rate = rate

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of the batch that belongs to the global step."""
        images, captions, truth, own, all_truth = self.batches(self.global_step)
        pictures = self.encode_image(images.to(self.device))
        texts = self.encode_text([*captions, *self.batches.labels])
        similarity = self.log_scale.clamp(max=math.log(50)).exp() * pictures @ texts.T
        among, all_labels = similarity.float().split(
            [len(captions), len(texts) - len(captions)], 1
        )
        loss = contrast(among, truth) + contrast(all_labels, all_truth, own)
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Muon and AdamW, 50 steps up, then a cosine to zero."""
        tables = [
            p
            for m in self.network.modules()
            for name, p in m.named_parameters(recurse=False)
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) or "positional" in name
        ]
        optimizer = MuonAdamW(
            self.network.parameters(), muon=self.rate, adamw=self.rate, embeddings=tables
        )
        return {"optimizer": optimizer, "lr_scheduler": warm_cosine(optimizer, self.steps)}


@torch.no_grad()
def retrieval(
    similarity: Callable[[Tensor, list[str]], Tensor],
    images: Tensor,
    labels: Sequence[str],
    candidates: Sequence[str],
    choices: int = 100,
    seed: int = 0,
) -> float:
    """Return how often a picture's own label scores highest of `choices` captions.

    Args:
        similarity: (images, prompts) -> (n, p).
        images: (n, 3, h, w) in [0, 1].
        labels: each picture's label.
        candidates: the labels from which the other captions are sampled.
        choices: number of captions to choose from.
        seed: seed of that sampling.
    """
    names = list(dict.fromkeys(candidates))
    scores = similarity(images, names)
    own = torch.tensor([names.index(label) for label in labels])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(images), len(names), generator=generator)
    draws[torch.arange(len(images)), own] = 2.0  # its own label is always included
    among = torch.zeros_like(draws, dtype=torch.bool)
    among.scatter_(1, draws.topk(min(choices, len(names)), 1).indices, True)
    best = scores.float().cpu().masked_fill(~among, -torch.inf).argmax(1)
    return float((best == own).float().mean())


def ascend(
    reward: Reward, images: Tensor, prompts: Sequence[str], steps: int = 20, length: float = 0.4
) -> Tensor:
    """Ascend a reward from images (n, 3, h, w) by steps of a fixed length -> images.

    `x <- x + length * g / |g|`, clamped to [0, 1]. A reward whose gradient depends on the drawing
    moves a noisy picture towards a clean one; an adversarial gradient only adds a pattern.
    """
    x = images.clone()
    for _ in range(steps):
        x.requires_grad_()
        (g,) = torch.autograd.grad(reward(x, prompts).sum(), x)
        norm = g.flatten(1).norm(dim=1)[:, None, None, None]
        x = (x.detach() + length * g / (norm + 1e-12)).clamp(0, 1)
    return x
