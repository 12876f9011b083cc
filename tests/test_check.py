"""`check-reward` finds each fault that it claims to see, and passes what is sound."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rewards
from recipes.cli import main
from rewards.check import CHECKS, check
from rewards.pixels import PixelReward
from steer.reward import Reward, clamp01, wrap


def light(x):
    return x.mean((1, 2, 3))


class Reduced(PixelReward):
    def measure(self, x):
        return light(x).mean()


class NotFinite(PixelReward):
    """0 / 0 on a flat picture."""

    def measure(self, x):
        centred = x - x.mean((1, 2, 3), keepdim=True)
        return light(centred.abs()) / centred.abs().amax((1, 2, 3))


class Root(PixelReward):
    """Finite everywhere, but its slope is not, on a black picture."""

    def measure(self, x):
        return x.square().sum((1, 2, 3)).sqrt()


class Drawing(PixelReward):
    def measure(self, x):
        return light(x + 0.1 * torch.randn_like(x))


class Batch(PixelReward):
    def measure(self, x):
        return light(x) - light(x).mean()


class Detached(PixelReward):
    def measure(self, x):
        return light(x.detach())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class WrongGradient(PixelReward):
    def measure(self, x):
        return light(Doubled.apply(x))


class Rounded(PixelReward):
    def measure(self, x):
        return light((x * 8).round() / 8 + 0 * x)


class Saturated(PixelReward):
    def measure(self, x):
        return (1e4 * light(x)).sigmoid() + 0 * light(x)


class Single(Reward):
    """Float32 by name: it cannot be moved."""

    def forward(self, images, prompts=None, metadata=None):
        return clamp01(images).flatten(1) @ torch.full((images[0].numel(),), 1e-3)


class Sum(PixelReward):
    """Counts pixels."""

    def measure(self, x):
        return x.sum((1, 2, 3))


class Hard(Reward):
    def forward(self, images, prompts=None, metadata=None):
        return light(images.clamp(0, 1))


class InPlace(Reward):
    def forward(self, images, prompts=None, metadata=None):
        if not images.requires_grad:
            images.clamp_(0, 1)
        return light(clamp01(images))


class DeafToPrompts(PixelReward):
    def forward(self, images, prompts=None, metadata=None):
        if prompts is None:
            raise ValueError("give prompts")
        return super().forward(images)

    def measure(self, x):
        return light(x)


class Crossed(PixelReward):
    """Asks every picture the first prompt."""

    def forward(self, images, prompts=None, metadata=None):
        return light(clamp01(images)) * len(prompts[0])


class Leaky(PixelReward):
    """Its gradient reaches the next picture."""

    def measure(self, x):
        y = light(x)
        return y + 0.5 * (y.roll(1) - y.roll(1).detach())


class Adversary(PixelReward):
    """A template of noise that no one sees."""

    def measure(self, x):
        g = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, x.shape[1:], generator=g).to(x) * 2 - 1
        return light(x * signs) * 30


class Trainable(PixelReward):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def measure(self, x):
        return self.scale * light(x)


class Uncopied(PixelReward):
    def __init__(self):
        super().__init__()
        self.stream = (i for i in range(3))  # generators cannot be copied

    def measure(self, x):
        return light(x)


class Seeding(PixelReward):
    def measure(self, x):
        torch.manual_seed(0)
        return light(x)


class Secretly(PixelReward):
    """Says that it has no gradient, and has."""

    differentiable = False

    def measure(self, x):
        return light(x)


BAD = {
    Reduced: {"shape"},
    NotFinite: {"finite", "finite gradient"},
    Root: {"finite gradient"},
    Drawing: {"determinism"},
    Batch: {"batch"},
    Detached: {"differentiable"},
    WrongGradient: {"finite difference"},
    Rounded: {"gradient"},
    Saturated: {"gradient"},
    Single: {"double"},
    Hard: {"clamp"},
    InPlace: {"in place"},
    DeafToPrompts: {"prompts"},
    Crossed: {"prompts"},
    Leaky: {"rows"},
    Trainable: {"parameters"},
    Uncopied: {"copy"},
    Seeding: {"generators"},
    Secretly: {"differentiable"},
}
"""Reward -> what must fail. Faults that follow from it may show beside it, see `BESIDE`."""

BESIDE = {
    Drawing: {"generators", "batch", "prompts", "clamp", "copy", "double", "finite difference"},
    NotFinite: {"gradient"},
    Batch: {"rows", "copy", "gradient", "finite difference"},
    Saturated: {"range"},
    Leaky: {"finite difference"},
    Crossed: {"batch"},
}

WARNED = {Sum: "resolution", Adversary: "high frequencies", Single: "float16"}
"""Properties to know of, which are no breach."""


def failures(report):
    return {f.name for f in report.findings if f.verdict == "fail"}


@pytest.mark.parametrize("made", BAD, ids=lambda c: c.__name__)
def test_bad_rewards_are_caught(made):
    prompts = ["a", "owl", "animal"] if made is Crossed else None
    report = check(made(), prompts, size=16)
    found = failures(report)
    assert not report.ok
    assert BAD[made] <= found
    assert found <= BAD[made] | BESIDE.get(made, set())
    for name in BAD[made]:
        assert report[name].line.count(" ") > 3  # says what, and the mend


@pytest.mark.parametrize("made", WARNED, ids=lambda c: c.__name__)
def test_properties_are_warned_of(made):
    report = check(made(), size=32)
    assert report[WARNED[made]].verdict == "warn"


def test_noise_that_no_one_sees_is_found():
    report = check(Adversary(), size=32)
    assert report.ok
    assert report["unseen change"].verdict == "warn"
    assert report["unseen change"].figures["survival"] < 0.3
    assert check(wrap(lambda x: light(clamp01(x))), size=32)["unseen change"].verdict == "pass"


def quadratic(images):
    return -(clamp01(images) - 0.4).square().mean((1, 2, 3))


def worded(images, prompts):
    words = torch.tensor([float(len(p)) for p in prompts], device=images.device)
    return light(clamp01(images)) * words.to(images)


GOOD = {
    "brightness": lambda: rewards.load("brightness"),
    "colour": lambda: rewards.load("colour:name=red"),
    "contrast": lambda: rewards.load("contrast"),
    "symmetry": lambda: rewards.load("symmetry"),
    "layout": lambda: rewards.load("layout:region=left"),
    "jpeg": lambda: rewards.load("jpeg"),
    "clip": lambda: rewards.load("clip"),
    "sum": lambda: rewards.load("0.7*brightness + 0.3*saturation"),
    "least": lambda: rewards.load("min(brightness, augmented(contrast, views=2), smooth=0.1)"),
    "callable": lambda: wrap(quadratic),
    "prompted": lambda: wrap(worded),
    "pil": lambda: wrap(lambda seen: [p.getpixel((0, 0))[0] for p in seen], pil=True),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_rewards_pass(name):
    reward = GOOD[name]()
    report = check(reward, size=32)
    assert report.ok, [f for f in report.findings if f.verdict == "fail"]
    assert [f.name for f in report.findings] == list(CHECKS)
    if not reward.differentiable:
        assert report["finite difference"].verdict == "skip"


def test_own_pictures_and_what_is_refused():
    images = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    report = check(quadratic, images=images)
    assert report.size == (24, 40)
    with pytest.raises(ValueError, match="divide bytes by 255"):
        check(quadratic, images=images * 255)
    with pytest.raises(ValueError, match="8 pixels or more"):
        check(quadratic, size=4)
    with pytest.raises(ValueError, match="no prompts in the list"):
        check(quadratic, [], size=16)
    with pytest.raises(ValueError, match="unknown check"):
        report["fnite"]


def test_the_caller_keeps_the_random_state():
    state = torch.get_rng_state()
    check(Drawing(), size=16)
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def good(images):\n    return -(images.clamp(0, 1) + images - images.detach()"
        " + images.detach() * 0).square().mean((1, 2, 3))\n\n\n"
        "def bad(images):\n    return images.mean()\n"
    )
    monkeypatch.chdir(tmp_path)


def test_the_command_says_it_by_its_exit_code(own, capsys):
    assert main(["check-reward", "brightness", "--size", "16"]) == 0
    assert "brightness keeps the contract" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["check-reward", "mine.py:bad", "--size", "16"])
    assert stop.value.code == 1
    assert "one number per image" in " ".join(capsys.readouterr().out.split())
    assert main(["check-reward", "brightnes"]) == 2
    assert "did you mean brightness" in capsys.readouterr().err


def test_the_command_prints_json_alone(own, capsys):
    assert main(["check-reward", "jpeg", "--size", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert {f["name"] for f in told["findings"]} == set(CHECKS)
    with pytest.raises(SystemExit):
        main(["check-reward", "mine.py:bad", "--size", "16", "--json"])
    assert not json.loads(capsys.readouterr().out)["ok"]


def test_prompts_come_from_a_file_or_a_list(tmp_path, capsys, monkeypatch):
    (tmp_path / "p.txt").write_text("a cat\nan owl\n")
    (tmp_path / "asking.py").write_text(
        "def asking(images, prompts):\n"
        "    return images.new_tensor([len(p) for p in prompts]) * images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    for given in (str(tmp_path / "p.txt"), '["a cat", "an owl"]'):
        name = "asking.py:asking"
        with pytest.raises(SystemExit):  # it does not clamp
            main(["check-reward", name, "--size", "16", "--prompts", given, "--json"])
        assert json.loads(capsys.readouterr().out)["prompts"][:2] == ["a cat", "an owl"]


def test_a_blur_is_a_blur():
    from rewards.check import _blurred

    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(_blurred(x).std()) < 0.6 * float(x.std())
    assert torch.allclose(_blurred(torch.ones(1, 3, 8, 8)), torch.ones(1, 3, 8, 8))
    assert F.mse_loss(_blurred(x).mean((2, 3)), x.mean((2, 3))) < 1e-2
