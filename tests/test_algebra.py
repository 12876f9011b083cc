"""Rewards made of rewards: their formulas, their texts, what they share, what they learn."""

import copy
import math

import pytest
import torch
from torch import nn

import rewards
import steer
from rewards.combine.algebra import Batched, Capped, Ensemble, Minimum, Product
from rewards.combine.augment import Augmented
from rewards.combine.normalised import Normalised
from rewards.combine.placed import Placed
from rewards.models.backbone import Backbone
from rewards.models.preprocess import Preprocess
from rewards.pixels.colour import Brightness, Colour
from rewards.pixels.tone import Contrast
from rewards.testing import RewardContract
from steer.reward import Reward, leaves, term_gradients, term_scores, wrap
from steer.sampling.calibrate import learn


def pictures(n=4, side=16, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


A, B, C = Brightness(), Colour("red"), Contrast()
MADE = {
    "minimum": lambda: Minimum(A, B, smooth=0.1),
    "product": lambda: Product(A, B, at=[0.4, -0.5], width=0.1),
    "capped": lambda: Capped(A, at=0.5, soft=0.05),
    "ensemble": lambda: Ensemble(A, B, penalty=0.5),
    "normalised": lambda: Normalised(A),
    "placed": lambda: Placed(A, "cpu"),
    "augmented": lambda: Augmented(A, views=3, noise=0.1),
    "batched": lambda: Batched(A + 2 * B, size=2),
    "nested": lambda: rewards.load(
        "0.5*min(brightness, 2*(colour:name=red + contrast)) - 1*contrast"
    ),
}


@pytest.mark.parametrize("name", MADE)
class TestContract(RewardContract):
    @pytest.fixture(autouse=True)
    def _made(self, name):
        self.name = name

    def create_reward(self):
        return copy.deepcopy(MADE[self.name]())


def test_each_is_its_formula():
    x = pictures()
    a, b = A(x), B(x)
    assert torch.equal(Minimum(A, B)(x), torch.minimum(a, b))
    for i in range(4):
        soft = -0.1 * math.log(math.exp(-a[i] / 0.1) + math.exp(-b[i] / 0.1))
        assert float(Minimum(A, B, smooth=0.1)(x)[i]) == pytest.approx(soft, abs=1e-5)
        chance = 1.0
        for value, at, width in ((float(a[i]), 0.4, 0.1), (float(b[i]), -0.5, 0.2)):
            chance *= 1 / (1 + math.exp(-(value - at) / width))
        made = Product(A, B, at=[0.4, -0.5], width=[0.1, 0.2])(x)[i]
        assert float(made) == pytest.approx(math.log(chance), abs=1e-5)
        mean, std = float(a[i] + b[i]) / 2, abs(float(a[i] - b[i])) / 2
        found = float(Ensemble(A, B, penalty=2)(x)[i])
        assert found == pytest.approx(mean - 2 * std, abs=1e-5)
        capped = 0.5 - 0.05 * math.log(1 + math.exp((0.5 - float(a[i])) / 0.05))
        assert float(Capped(A, at=0.5, soft=0.05)(x)[i]) == pytest.approx(capped, abs=1e-5)
    assert torch.equal(Capped(A, at=0.5)(x), a.clamp(max=0.5))


def test_nothing_is_gained_beyond_a_cap():
    x = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(Capped(A, at=0.0)(x).sum(), x)
    assert float(gradient.abs().max()) == 0


def test_gradient_free_terms_make_it_gradient_free():
    assert not rewards.load("min(brightness, jpeg)").differentiable
    assert not rewards.load("batched(jpeg, size=2)").differentiable
    assert rewards.load("batched(jpeg, size=2)")(pictures()).shape == (4,)


def test_texts_become_what_they_say():
    x = pictures()
    a, b = A(x), B(x)
    for text, expected in {
        "min(brightness, colour:name=red)": torch.minimum(a, b),
        "2*(brightness + colour:name=red)": 2 * (a + b),
        "min(brightness, 0.5*(colour:name=red + brightness))": torch.minimum(a, (a + b) / 2),
        "capped(colour:name=red, at=-0.57)": b.clamp(max=-0.57),
        "product(brightness, colour:name=red, at=[0.4, -0.5], width=0.1)": Product(
            A, B, at=[0.4, -0.5], width=0.1
        )(x),
        "BRIGHTNESS": a,
        "layout:region=left": rewards.load("layout", region="left")(x),
        "min(layout:region=left, brightness) - 2*brightness": torch.minimum(
            rewards.load("layout", region="left")(x), a
        )
        - 2 * a,
    }.items():
        assert torch.allclose(rewards.load(text)(x), expected, atol=1e-6), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min(clip", "a bracket is not closed"),
        ("capped(brightness)", "needs at="),
        ("capped(brightness, 0.3)", "written at=..."),
        ("capped(brightness, jpeg, at=1)", "takes one reward"),
        ("maxi(brightness)", "did you mean min"),
        ("min", "combines rewards"),
        ("min(brightness, foo=3)", "has the options smooth"),
        ("min(brightness, smooth=-1)", "must not be negative"),
        ("min(brightness, smooth=red)", "cannot take"),
        ("product(brightness, at=[1, 2])", "one for all, or one each"),
        ("product(brightness, width=0)", "above zero"),
        ("normalised(brightness, decay=1)", "decay must be in"),
        ("batched(brightness, size=0)", "size must be"),
        ("augmented(brightness, views=0)", "views must be"),
        ("augmented(brightness, crop=1)", "crop must be"),
        ("min(brightness, unheard)", "unknown reward 'unheard'"),
    ],
)
def test_errors_say_how_to_mend(text, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[")):
        rewards.load(text)


def test_leaves_are_scored_by_themselves():
    made = rewards.load("0.5*min(brightness, colour:name=red) + normalised(contrast)")
    x = pictures()
    assert [type(leaf).__name__ for leaf in leaves(made)] == ["Brightness", "Colour", "Contrast"]
    scores = term_scores(made, x)
    assert torch.equal(scores["Brightness"], A(x))
    assert torch.equal(scores["Contrast"], C(x))


def test_gradients_of_terms_are_what_each_adds():
    made, x = rewards.load("0.5*brightness - 3*contrast"), pictures()
    found = term_gradients(made, x)
    for name, reward, weight in (("Brightness", A, 0.5), ("Contrast", C, 3)):
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(reward(y).sum(), y)
        assert torch.allclose(found[name], weight * g.flatten(1).norm(dim=1), rtol=1e-5)
    parts = term_gradients(rewards.load("batched(brightness, size=2) + contrast"), x)
    assert all(float(share.min()) > 0 for share in parts.values())
    least = rewards.load("min(brightness, 10 * contrast + 100 * brightness)")
    shares = term_gradients(least, x)
    assert float(shares["Contrast"].max()) == 0  # the other one is the least
    assert set(term_gradients(rewards.load("brightness + jpeg"), x)) == {"Brightness"}


def test_micro_batches_change_no_score_and_no_gradient():
    whole, x = A + 2 * B, pictures(5)
    seen = []

    class Seen(Reward):
        def forward(self, images, prompts=None, metadata=None):
            seen.append((len(images), prompts, metadata))
            return whole(images)

    y, z = (x.clone().requires_grad_() for _ in range(2))
    upstream = torch.arange(5.0)
    scores = Batched(Seen(), 2)(y, list("abcde"), list(range(5)))
    scores.backward(upstream)
    whole(z).backward(upstream)
    assert torch.allclose(scores, whole(z))
    assert torch.allclose(y.grad, z.grad)
    assert seen == [(2, ["a", "b"], [0, 1]), (2, ["c", "d"], [2, 3]), (1, ["e"], [4])]


def test_micro_batches_hold_one_chunk_for_the_backward_pass():
    def kept(reward):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            reward(pictures(8).requires_grad_())
        return sum(sizes)

    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3), nn.GELU())
    deep = wrap(lambda x: net(x).mean((1, 2, 3)))
    chunk = 2 * (kept(deep) / 8)
    assert kept(deep) > 8 * pictures(1).numel() * 2
    # the hooks see every chunk go by; what stays is the gradient
    scores = Batched(deep, 2)(x := pictures(8).requires_grad_())
    assert sum(t.numel() for t in scores.grad_fn.saved_tensors) == x.numel() < 4 * chunk


def test_views_are_fixed_and_seeded():
    x = pictures(3, 32)
    a, b = Augmented(C, views=4, noise=0.2), Augmented(C, views=4, noise=0.2, seed=1)
    assert torch.equal(a(x), a(x))
    assert not torch.allclose(a(x), b(x))
    assert torch.equal(a.view(x, 0), x)
    mean = torch.stack([C(a.view(x, i)) for i in range(4)]).mean(0)
    assert torch.allclose(a(x), mean)
    assert {a.view(x, i).shape for i in range(4)} == {x.shape}


def test_normalised_has_mean_zero_and_deviation_one():
    made, x = Normalised(C), pictures(64)
    bare = C(x)
    assert torch.equal(made(x), bare)  # nothing learnt yet
    assert not made.learned
    made.update()
    assert made.learned
    assert float(made(x).mean()) == pytest.approx(0, abs=1e-4)
    assert float(made(x).std(correction=0)) == pytest.approx(1, abs=1e-4)
    half = Normalised(C)
    for part in x.split(10):  # micro-batches: the same scale
        half(part)
    half.update()
    assert torch.allclose(half.statistics, made.statistics)


def test_a_placed_reward_stays_where_it_is():
    """Also as a part of another: pictures come to it, scores and gradients go back."""
    made = rewards.load("0.5*placed(clip, device=cpu) + brightness")
    plain = rewards.load("0.5*clip + brightness")
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    asked = ["a fox", "an owl"]
    made.to("meta")
    scores = made.to(torch.float64)(x, asked)
    torch.testing.assert_close(scores, plain(x, asked))
    (one,) = torch.autograd.grad(scores.sum(), x)
    (two,) = torch.autograd.grad(plain(x, asked).sum(), x)
    torch.testing.assert_close(one, two)
    with pytest.raises(ValueError, match="device 'nowhere' for a reward"):
        rewards.load("placed(brightness, device=nowhere)")


def test_normalised_stands_still_in_evaluation():
    made = Normalised(C)
    made(pictures(8))
    made.update()
    before = made.statistics.clone()
    made.eval()(pictures(8, seed=1) * 0.1)
    made.update()
    assert torch.equal(made.statistics, before)
    made.train()(pictures(8, seed=1) * 0.1)
    made.update()
    assert not torch.equal(made.statistics, before)
    again = Normalised(C)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(pictures(2)), made(pictures(2)))


class Picture(steer.GaussianMixture):
    def decode(self, x):
        return x[:, :, None, None].expand(-1, 3, 4, 4) * 0.1 + 0.5


def toy():
    return Picture(torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, -0.5]]), 0.5)


def test_learning_from_one_jump_samples():
    flow, made = toy(), Normalised(A) + 2 * Normalised(Normalised(B))
    fresh = Normalised(A)
    learn(flow, fresh)
    made(torch.zeros(50, 3, 4, 4))  # what was scored before a run does not count in it
    assert learn(flow, made) == 3 * 128
    assert learn(flow, made) == 0
    assert torch.equal(made.rewards[0].statistics, fresh.statistics)
    inner = made.rewards[1].rewards[0]
    outer = made.rewards[1]
    assert float(outer.std) == pytest.approx(1, abs=0.05)  # of scores that are normalised
    assert not inner.training
    assert float(inner.std) > 0
    with pytest.raises(ValueError, match="the same for all"):
        learn(flow, Normalised(C))
    with pytest.raises(FloatingPointError, match=r"nan for prompt 0, particle 0, a one-jump"):
        learn(flow, Normalised(lambda x: x.mean((1, 2, 3)) * torch.nan))


def test_sampling_learns_first_and_then_stands_still():
    made = Normalised(A) + Normalised(B)
    result = steer.sample(toy(), made, particles=8, steps=4, seed=1)
    assert result.costs["learning_nfe"] == 256
    known = [part.statistics.clone() for part in made.rewards]
    again = steer.sample(toy(), made, particles=8, steps=4, seed=1)
    assert "learning_nfe" not in again.costs
    assert torch.equal(result.x, again.x)
    assert all(torch.equal(a, p.statistics) for a, p in zip(known, made.rewards, strict=True))


class Counted(Backbone):
    calls = 0

    def encode_image(self, x):
        type(self).calls += 1
        return self.model(x.flatten(1))


class Head(Reward):
    def __init__(self, backbone, seed):
        super().__init__()
        self.backbone = backbone
        self.head = torch.randn(5, generator=torch.Generator().manual_seed(seed))

    def forward(self, images, prompts=None, metadata=None):
        return self.backbone.image_features(images) @ self.head.to(images)


def backbone():
    torch.manual_seed(0)
    return Counted(nn.Linear(48, 5), Preprocess(4, [0.5] * 3, [0.5] * 3, "bilinear"))


def test_rewards_on_one_backbone_encode_pictures_once():
    shared = backbone()
    a, b, x = Head(shared, 0), Head(shared, 1), pictures(3)
    total = Minimum(a + b, 2 * a)
    Counted.calls = 0
    y = x.clone().requires_grad_()
    scores = total(y)
    scores.sum().backward()
    assert Counted.calls == 1
    apart = torch.minimum(a(x) + b(x), 2 * a(x))
    assert torch.allclose(scores, apart)
    assert y.grad.abs().sum() > 0
    Counted.calls = 0
    a(x), b(x)  # outside of a sum nothing is remembered
    assert Counted.calls == 2
    x += 0.1  # other pictures in the same tensor
    assert not torch.allclose(total(x), apart)


def test_a_backbone_is_frozen_whatever_the_caller_says():
    made = Head(backbone(), 0)
    made.train()
    assert not made.backbone.model.training
    assert not any(p.requires_grad for p in made.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            made.backbone.image_features(pictures()), made.backbone.image_features(pictures())
        )
        inside = made.backbone.image_features(pictures())
    assert torch.equal(inside, made.backbone.image_features(pictures()))
    assert inside.dtype == torch.float32


def slow_resize(x, size, fit):
    """Pillow's own resize of 8-bit pictures, for comparison."""
    import numpy as np
    from PIL import Image

    out = []
    for picture in x:
        array = (picture.permute(1, 2, 0).numpy() * 255).round().astype("uint8")
        image = Image.fromarray(array)
        w, h = image.size
        if fit == "squash":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            scale = (max if fit == "crop" else min)(size / h, size / w)
            fitted = int if fit == "crop" else round  # as torchvision and open_clip do
            w, h = fitted(w * scale), fitted(h * scale)
            image = image.resize((w, h), Image.Resampling.BICUBIC)
            ground = Image.new("RGB", (size, size))
            ground.paste(image, ((size - w) // 2, (size - h) // 2))
            if fit == "crop":
                left, top = (w - size) // 2, (h - size) // 2
                ground = image.crop((left, top, left + size, top + size))
            image = ground
        out.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return torch.stack(out)


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_preprocessing_is_pillows(fit):
    coarse = pictures(3, 6)
    x = torch.nn.functional.interpolate(coarse, (40, 56), mode="bilinear")
    made = Preprocess(24, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], fit=fit)
    found = made.resized(x)
    assert found.shape == (3, 3, 24, 24)
    slow = slow_resize(x, 24, fit)
    assert float((found - slow).abs().max()) < 2.5 / 255  # Pillow rounds to bytes twice
    normal = (found - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor(
        [0.2, 0.3, 0.4]
    )[:, None, None]
    assert torch.allclose(made(x), normal)


def test_preprocessing_keeps_the_gradient_of_white():
    made = Preprocess(8, [0.5] * 3, [0.5] * 3)
    x = torch.ones(1, 3, 16, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(made(x).sum(), x)
    assert float(gradient.min()) > 0


class Scorer:
    def score(self, pixels, prompts):
        return pixels.mean((1, 2, 3))[:, None] * len(prompts[0])


def test_objects_with_a_score():
    made = wrap(Scorer())
    x = pictures(3)
    assert torch.allclose(made(x, ["ab"] * 3), 2 * x.mean((1, 2, 3)))
    assert made.differentiable

    class Module(nn.Module, Scorer):
        def forward(self, x):
            raise AssertionError("its score is what is asked")

    assert torch.allclose(wrap(Module())(x, ["abc"] * 3), 3 * x.mean((1, 2, 3)))


def test_scores_with_information():
    made = wrap(lambda images, prompts: (images.mean((1, 2, 3)), {"any": "thing"}))
    assert made(pictures(3)).shape == (3,)


def test_pil_functions_are_gradient_free():
    made = wrap(lambda seen, prompts: [p.size[0] + p.getpixel((0, 0))[0] for p in seen], pil=True)
    assert not made.differentiable
    x = torch.zeros(2, 3, 5, 7)
    x[1, 0] = 1.0
    assert made(x.requires_grad_()).tolist() == [7, 7 + 255]
    assert not made(x).requires_grad
    with pytest.raises(ValueError, match="no gradient"):
        wrap(lambda seen: seen, differentiable=True, pil=True)


def test_functions_say_for_themselves_that_they_have_no_gradient():
    def steps(images):
        return images.round().mean((1, 2, 3))

    steps.differentiable = False
    assert not wrap(steps).differentiable
    assert wrap(steps, differentiable=True).differentiable


def test_torchmetrics_score_each_picture():
    from torchmetrics.image import TotalVariation

    made, x = wrap(TotalVariation()), pictures(3).requires_grad_()
    scores = made(x)
    slow = [-float((p.diff(dim=-1).abs().sum() + p.diff(dim=-2).abs().sum()).detach()) for p in x]
    assert scores.tolist() == pytest.approx(slow, rel=1e-4)  # lower is better, so negated
    assert made.differentiable
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert gradient.abs().sum() > 0


def test_what_is_no_reward_is_refused():
    with pytest.raises(TypeError, match="or has a method score, got int"):
        wrap(3)
