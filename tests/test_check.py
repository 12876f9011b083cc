"""`check` finds each fault that it claims to see, and lets good rewards pass."""

import json
import threading

import pytest
import torch
from torch import nn

import rewards
from recipes.cli import main
from rewards.checking import CHECKS, PROMPTS, check
from rewards.checking.gradients import blurred
from rewards.models.clip import Clip
from rewards.pixels.reference import Similarity
from steer.reward import Reward, clamp01, wrap

SIZE = 32


def faults(report):
    return {f.name for f in report.findings if f.verdict == "fail"}


def warned(report):
    return {f.name for f in report.findings if f.verdict == "warn"}


class Pixels(Reward):
    """A reward of pixels that is in order: the mean red."""

    def forward(self, images, prompts=None, metadata=None):
        return self.measure(clamp01(images), prompts)

    def measure(self, x, prompts):
        return x[:, 0].mean((1, 2))


class Reduced(Pixels):
    def measure(self, x, prompts):
        return x.mean()


class Integers(Pixels):
    differentiable = False

    def measure(self, x, prompts):
        return (x.mean((1, 2, 3)) * 255).long()


class Raises(Pixels):
    def measure(self, x, prompts):
        raise RuntimeError("no such layer\nand more")


class Standardised(Pixels):
    """No number on flat pictures: 0 / 0."""

    def measure(self, x, prompts):
        y = x.mean(1).flatten(1)
        z = y - y.mean(1, keepdim=True)
        return (z[:, ::2] / z.detach().std(1, keepdim=True)).mean(1)


class Root(Pixels):
    """An infinite gradient at black."""

    def measure(self, x, prompts):
        return x.square().mean((1, 2, 3)).sqrt()


class Noisy(Pixels):
    def measure(self, x, prompts):
        return super().measure(x, prompts) + 0.1 * torch.randn(len(x))


class Draws(Pixels):
    """It scores well, and moves the generator that the run draws from."""

    def measure(self, x, prompts):
        torch.rand(1)
        return super().measure(x, prompts)


class Seeds(Pixels):
    """It seeds everybody's draws."""

    def measure(self, x, prompts):
        torch.manual_seed(0)
        return super().measure(x, prompts)


class Normed(Pixels):
    """Batch norm that stayed in training."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)

    def measure(self, x, prompts):
        return self.norm(x)[:, 0].tanh().mean((1, 2))


class Advantage(Pixels):
    def measure(self, x, prompts):
        scores = super().measure(x, prompts)
        return scores - scores.mean()


class Leaks(Pixels):
    """The same scores, and a gradient to the next picture."""

    def measure(self, x, prompts):
        scores = super().measure(x, prompts)
        return scores + 0.5 * (scores.roll(1) - scores.roll(1).detach())


class Positional(Pixels):
    """The first of a batch is favoured."""

    def measure(self, x, prompts):
        return super().measure(x, prompts) + 0.1 * (torch.arange(len(x)) == 0)


class Detached(Pixels):
    def measure(self, x, prompts):
        return super().measure(x, prompts).detach()


class Undeclared(Pixels):
    differentiable = False


class _Flipped(torch.autograd.Function):
    factor = -1.0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _Flipped.factor * gradient


class Backwards(Pixels):
    factor = -1.0

    def measure(self, x, prompts):
        _Flipped.factor = self.factor
        return super().measure(_Flipped.apply(x), prompts)


class Scaled(Backwards):
    factor = 1.5


class _Forgets(torch.autograd.Function):
    """Its backward pass leaves out the upstream gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean((1, 2, 3))

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x / x[0].numel()


class Forgets(Pixels):
    def measure(self, x, prompts):
        return _Forgets.apply(x)


class Rounded(Pixels):
    """Bytes: the gradient is zero."""

    def measure(self, x, prompts):
        return super().measure((255 * x).round() / 255, prompts)


class Saturated(Pixels):
    """Every ordinary picture is far up the sigmoid."""

    def measure(self, x, prompts):
        return (1e4 * super().measure(x, prompts)).sigmoid()


class Constant(Pixels):
    def measure(self, x, prompts):
        return 1 + 0 * super().measure(x, prompts)


class Attribute(Pixels):
    """A tensor that is no buffer stays behind when the reward is moved."""

    def __init__(self):
        super().__init__()
        self.weights = torch.tensor([0.5, 0.3, 0.2])

    def measure(self, x, prompts):
        return x.mean((2, 3)) @ self.weights


class Locked(Pixels):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Sum(Pixels):
    def measure(self, x, prompts):
        return x[:, 0].sum((1, 2))


class Corner(Pixels):
    """A crop in absolute pixels."""

    def measure(self, x, prompts):
        return x[:, 0, 8:16, 8:16].mean((1, 2))


class OneSize(Pixels):
    def measure(self, x, prompts):
        if x.shape[-2:] != (SIZE, SIZE):
            raise ValueError(f"pictures must be {SIZE} x {SIZE}")
        return super().measure(x, prompts)


class Stranded(Pixels):
    def forward(self, images, prompts=None, metadata=None):
        return self.measure(images.clamp(0, 1), prompts)


class Unclamped(Pixels):
    def forward(self, images, prompts=None, metadata=None):
        return self.measure(images, prompts)


class InPlace(Pixels):
    def forward(self, images, prompts=None, metadata=None):
        scores = self.measure(clamp01(images), prompts)
        images.zero_()
        return scores


class ClampsInPlace(Pixels):
    """It changes what is out of range, and nothing else."""

    differentiable = False

    def forward(self, images, prompts=None, metadata=None):
        return self.measure(images.detach().clamp_(0, 1), prompts)


class Prompted(Pixels):
    """A prompt's length says how much red counts."""

    def measure(self, x, prompts):
        if prompts is None:
            raise ValueError("give prompts")
        weights = torch.tensor([len(self.of(prompts, i)) for i in range(len(x))]).to(x)
        return super().measure(x, prompts) * weights / 10

    def of(self, prompts, i):
        return prompts[i]


class Ignores(Prompted):
    def of(self, prompts, i):
        return "a cat"


class First(Prompted):
    def of(self, prompts, i):
        return prompts[0]


class Reversed(Prompted):
    def of(self, prompts, i):
        return prompts[-1 - i]


class Template(Pixels):
    """What it likes is one pattern of noise."""

    def __init__(self):
        super().__init__()
        pattern = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3))
        self.register_buffer("pattern", pattern)

    def measure(self, x, prompts):
        h, w = x.shape[-2:]
        return (x * self.pattern[:, :h, :w].to(x)).mean((1, 2, 3))


class Trainable(Pixels):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def measure(self, x, prompts):
        return self.weight * super().measure(x, prompts)


BAD = {
    Reduced: {"shape"},
    Integers: {"shape"},
    Raises: {"shape"},
    Standardised: {"finite", "finite gradient"},
    Root: {"finite gradient"},
    Noisy: {"determinism", "generators"},
    Draws: {"generators"},
    Seeds: {"generators"},
    Normed: {"batch", "rows"},
    Advantage: {"batch", "rows"},
    Positional: {"batch"},
    Leaks: {"rows"},
    Detached: {"differentiable"},
    Undeclared: {"differentiable"},
    Backwards: {"finite difference"},
    Scaled: {"finite difference"},
    Forgets: {"rows"},
    Rounded: {"gradient"},
    Saturated: {"range", "gradient"},
    Constant: {"range", "gradient"},
    Attribute: {"double"},
    Locked: {"copy"},
    Stranded: {"clamp"},
    Unclamped: {"clamp"},
    InPlace: {"in place"},
    ClampsInPlace: {"in place"},
    Ignores: {"prompts"},
    First: {"prompts"},
    Reversed: {"prompts"},
    Trainable: {"parameters"},
}
"""A bad reward -> the checks that fail it, and no others do."""


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_a_fault_is_found_by_its_check(bad):
    report = check(bad(), size=SIZE)
    assert faults(report) == BAD[bad]
    assert not report.ok
    for finding in report.findings:  # all say something, and in one line
        assert finding.line
        assert "\n" not in finding.line


WARNED = {
    Sum: {"resolution"},
    Corner: {"resolution"},
    OneSize: {"resolution"},
    Attribute: {"bfloat16", "float16"},
    Template: {"high frequencies", "unseen change", "resolution"},
}


@pytest.mark.parametrize("odd", WARNED, ids=lambda odd: odd.__name__)
def test_a_property_is_warned_of(odd):
    report = check(odd(), size=SIZE)
    assert warned(report) == WARNED[odd]
    assert not faults(report) - {"double"}


def test_no_check_is_without_a_bad_reward():
    """Each is set off by one of the above; speed and memory have no fault, devices need two."""
    seen = set().union(*BAD.values(), *WARNED.values())
    assert set(CHECKS) - seen == {"speed", "memory", "devices"}


@pytest.mark.parametrize(
    "text",
    [
        "brightness", "contrast", "saturation", "sharpness", "smoothness", "symmetry",
        "antisymmetry", "layout:region=left", "colour", "jpeg", "0.7*brightness+0.3*symmetry",
        "min(brightness, augmented(contrast, views=2), smooth=0.1)",
    ],
)  # fmt: skip
def test_good_ones_pass(text):
    report = check(rewards.load(text), size=SIZE)
    assert not faults(report)
    odd = {"sharpness": {"high frequencies", "unseen change"}}
    if "augmented" in text:  # its resize has no half types on a CPU
        assert warned(report) <= {"bfloat16", "float16"}
        return
    sized = {"sharpness", "smoothness", "jpeg"}  # what they measure goes by the pixel
    assert warned(report) == odd.get(text, set()) | ({"resolution"} if text in sized else set())
    assert (report["gradient"].verdict == "skip") == (text == "jpeg")


def test_clip_passes_and_is_asked_default_prompts():
    report = check(Clip(), size=SIZE)
    assert not faults(report)
    assert not warned(report)
    assert report.prompts[: len(PROMPTS)] == PROMPTS
    assert report["prompts"].figures["effect"] > 0.1
    assert report["finite difference"].figures["error"] < 1e-6
    assert report["memory"].figures["reward_mb"] == pytest.approx(23.2, abs=0.1)


def test_prompts_are_asked_for_rows():
    report = check(Prompted(), size=SIZE)
    assert report.ok
    assert report["prompts"].verdict == "pass"
    given = check(Prompted(), "a very long description of a cat", size=SIZE)
    assert given.ok
    assert set(given.prompts) == {"a very long description of a cat"}
    assert check(Pixels(), size=SIZE)["prompts"].verdict == "skip"
    assert check(Pixels(), ["a", "b"], size=SIZE)["prompts"].verdict == "warn"


def test_a_callable_and_one_with_prompts_pass():
    assert check(lambda x: clamp01(x).square().mean((1, 2, 3)), size=SIZE).ok

    def longest(images, prompts):
        lengths = torch.tensor([len(p) for p in prompts]).to(images)
        return clamp01(images).mean((1, 2, 3)) * lengths

    report = check(longest, size=SIZE)
    assert report.ok
    assert report.reward == "longest"
    assert report["prompts"].verdict == "pass"


def test_a_remote_like_reward_passes_without_gradient():
    """Numbers from outside: bytes go there, floats come back."""

    def call(images):
        pixels = (255 * images.detach().clamp(0, 1)).round().byte().cpu().numpy()
        return torch.tensor([float(p.mean()) for p in pixels], device=images.device)

    report = check(wrap(call, differentiable=False), size=SIZE)
    assert report.ok
    assert check(wrap(lambda seen: [p.getpixel((9, 9))[0] for p in seen], pil=True), size=SIZE).ok
    skipped = {"finite gradient", "gradient", "rows", "finite difference", "high frequencies"}
    for name in skipped | {"unseen change"}:
        assert report[name].verdict == "skip"
        assert "no gradient" in report[name].line


def test_pictures_may_be_given(tmp_path):
    images = torch.rand(4, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    given = images.clone()
    report = check(Pixels(), images=images)
    assert report.ok
    assert report.size == (24, 16)
    assert torch.equal(images, given)
    assert report["range"].figures["spread"] == pytest.approx(
        float(images[:, 0].mean((1, 2)).std(unbiased=False)), rel=1e-5
    )


def test_the_caller_s_generator_stays():
    before = torch.get_rng_state()
    check(Noisy(), size=SIZE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reward_stays_as_it_is():
    reward = Template()
    before = {k: v.clone() for k, v in reward.state_dict().items()}
    check(reward, size=SIZE)
    after = reward.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_a_blur_is_a_blur():
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(blurred(x).std()) < 0.6 * float(x.std())
    assert torch.allclose(blurred(torch.ones(1, 3, 8, 8)), torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(blurred(x).mean((2, 3)), x.mean((2, 3)), atol=0.03, rtol=0)


def test_figures_are_what_they_say():
    report = check(Pixels(), size=SIZE)
    seen = report["range"].figures
    assert (seen["min"], seen["max"]) == (0, 1)
    assert report["resolution"].figures["rank_half"] == pytest.approx(1)
    assert report["memory"].figures["backward_mb"] == 0  # a linear one keeps nothing
    assert report["unseen change"].figures["gain"] < 0.1
    template = check(Template(), size=SIZE)["high frequencies"].figures
    assert template["share"] == pytest.approx(template["white_noise"], abs=0.05)
    red = check(Backwards(), size=SIZE)["finite difference"].figures
    assert red["slope_to_gradient"] == pytest.approx(-1, abs=1e-6)
    scaled = check(Scaled(), size=SIZE)["finite difference"].figures
    assert scaled["slope_to_gradient"] == pytest.approx(1 / 1.5, abs=1e-6)


def test_a_reward_that_is_not_moved_to_doubles_is_differenced_in_float32():
    report = check(Attribute(), size=SIZE)
    assert report["finite difference"].verdict == "pass"
    assert "float32" in report["finite difference"].line
    backwards = check(type("Both", (Backwards, Locked), {})(), size=SIZE)
    assert faults(backwards) == {"copy", "finite difference"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size must be"),
        ({"images": torch.rand(1, 3, 8, 8)}, "n >= 2"),
        ({"images": 2 + torch.rand(2, 3, 8, 8)}, r"in \[0, 1\]"),
        ({"prompts": []}, "no prompts"),
        ({"device": "cudda"}, "'cudda' cannot be used here"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        check(Pixels(), **options)


def test_unknown_check_has_the_nearest_names():
    with pytest.raises(ValueError, match="did you mean gradient"):
        check(Pixels(), size=SIZE)["gradeint"]


def test_similarity_passes(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), "royalblue").save(tmp_path / "blue.png")
    assert not faults(check(Similarity(tmp_path / "blue.png"), size=SIZE))


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import steer\n\n\ndef mean(images):\n    return images.mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_prints_a_table(here, capsys):
    assert main(["check-reward", "brightness", "--size", "16"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CHECKS)
    assert "brightness keeps the contract: " in out.splitlines()[-1]


def test_command_fails_a_bad_reward(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["check-reward", "mine.py:mean", "--size=16"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "mine.py:mean breaks the contract: 1 pass, 1 fail" in out.splitlines()[-1]


@pytest.mark.parametrize(
    "words", [["brightness", "--json"], ["--json", "brightness"], ["brightness", "--json=true"]]
)
def test_command_prints_json_alone(here, capsys, words):
    assert main(["check-reward", *words, "--size", "16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["reward"] == "brightness"
    assert [f["name"] for f in report["findings"]] == list(CHECKS)
    with pytest.raises(SystemExit):
        main(["check-reward", "mine.py:mean", "--size=16", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert "one number per image" in report["findings"][0]["line"]


def test_command_reads_prompts(here, capsys):
    (here / "prompts.txt").write_text("a fox\na frog\n")
    (here / "asks.py").write_text(
        "def asks(images, prompts):\n"
        "    assert set(prompts) - {'a cat'}\n"
        "    return images.clamp(0, 1).mean((1, 2, 3))\n"
    )
    words = ["check-reward", "asks.py:asks", "--json", "--size=16", "--prompts"]
    for given in ("prompts.txt", '["a fox", "a frog"]'):
        with pytest.raises(SystemExit):  # they are ignored, and the clamp strands
            main([*words, given])
        report = json.loads(capsys.readouterr().out)
        assert report["prompts"][:3] == ["a fox", "a frog", "a fox"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["brightnes"], "did you mean brightness"),
        (["nowhere.py:Mine"], "no file nowhere.py"),
        (["brightness", "--sizes", "16"], "did you mean size"),
        (["brightness", "--size", "2"], "size must be"),
        (["brightness", "--device", "cudda"], "cannot be used here"),
        (["brightness", "--prompts", "none.txt"], "no prompts file"),
    ],
)
def test_command_tells_mistakes_of_use(here, capsys, words, message):
    assert main(["check-reward", *words]) == 2
    assert message in capsys.readouterr().err
