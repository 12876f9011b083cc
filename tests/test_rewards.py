"""Every embedded reward keeps the contract and equals a slow reference; names are resolved."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import rewards
from rewards.models.clip import EMBEDDED, Clip
from rewards.pixels.colour import Brightness, Colour
from rewards.pixels.jpeg import Jpeg
from rewards.testing import RewardContract
from steer.reward import Reward, score

TEXTS = ["red apple", "a cat", "food", "flat fox", "green frog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random open_clip model, saved in the layout of any open_clip checkpoint."""
    import open_clip
    import safetensors.torch

    path = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 24, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config)
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if k != "attn_mask"},
        path / "open_clip_model.safetensors",
    )
    return path


class TestColour(RewardContract):
    def create_reward(self):
        return Colour("red")


class TestBrightness(RewardContract):
    def create_reward(self):
        return Brightness()


class TestJpeg(RewardContract):
    def create_reward(self):
        return Jpeg()


class TestEmbeddedClip(RewardContract):
    tolerance = 1e-4

    def create_reward(self):
        return Clip()

    def prompts(self):
        return TEXTS


class TestSum(RewardContract):
    def create_reward(self):
        return rewards.load("0.7*brightness - 0.3*colour:name=blue")


class TestAnyOpenClipFolder(RewardContract):
    tolerance = 1e-4

    @pytest.fixture(autouse=True)
    def _folder(self, folder):
        self.folder = folder

    def create_reward(self):
        return Clip(self.folder)

    def prompts(self):
        return TEXTS


def test_colour_is_the_formula():
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 4, 4, generator=g)
    for image, found in zip(images, Colour("#ff8000")(images), strict=True):
        total, weights = 0.05 * 16, 0.05 * 16
        for pixel in image.flatten(1).T:
            r, gr, b = pixel.tolist()
            distance = (((r - 1) ** 2 + (gr - 128 / 255) ** 2 + b**2) / 3) ** 0.5
            weight = min(1.0, (1 - min(r, gr, b)) / 0.25)
            total, weights = total + weight * distance, weights + weight
        assert float(found) == pytest.approx(-total / weights, abs=1e-4)


def test_colour_orders_pictures_and_an_empty_one_is_far():
    square = torch.ones(4, 3, 16, 16)
    for i, rgb in enumerate([(1, 0, 0), (1, 0.5, 0), (0, 0, 1)]):
        square[i, :, 4:12, 4:12] = torch.tensor(rgb, dtype=torch.float)[:, None, None]
    red, orange, blue, empty = Colour("red")(square).tolist()
    assert red > orange > blue > empty
    assert empty == pytest.approx(-1)


def test_brightness_of_primaries():
    images = torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2)
    assert Brightness()(images).tolist() == pytest.approx([0.2126, 0.7152, 0.0722])


def test_jpeg_is_the_file_size():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for image, found in zip(images, Jpeg(quality=80)(images), strict=True):
        file = io.BytesIO()
        array = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(array).save(file, "JPEG", quality=80)
        assert float(found) == pytest.approx(-len(file.getvalue()) / 1000)


def test_clip_is_the_cosine_of_open_clips_features(folder):
    """The reference: open_clip's own transform (PIL) and normalised features."""
    import open_clip

    reward = Clip(folder)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    g = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 24, 24, generator=g).mul(255).round() / 255
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = torch.stack([transform(Image.fromarray(a)) for a in arrays])
    with torch.no_grad():
        a = model.eval().encode_image(pixels, normalize=True)
        b = model.encode_text(tokenizer(TEXTS), normalize=True)
    assert torch.allclose(reward(images, TEXTS), (a * b).sum(-1), atol=1e-5)


def test_clip_without_prompts_or_weights_says_the_mend(folder, tmp_path):
    with pytest.raises(ValueError, match="reward_prompts"):
        Clip(folder)(torch.full((1, 3, 8, 8), 0.5))
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        Clip(folder)(torch.full((1, 3, 8, 8), 0.5), ["a", "b"])
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors"):
        Clip(tmp_path)
    whole = (folder / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot load the CLIP"):
        Clip(tmp_path)


def test_a_prompt_that_is_cut_is_told_of_once(folder):
    """The tiny CLIP reads 12 tokens, the begin and end marks among them."""
    import warnings

    reward, images = Clip(folder), torch.full((2, 3, 24, 24), 0.5)
    fits = "one two three four five six seven eight nine ten"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(images, [fits, "a cat"])
        reward(images, [f" {fits} ", "é" * 3])
    long = f"{fits} eleven twelve"
    with pytest.warns(
        UserWarning, match="first 12 tokens .*after '.*nine ten' is ignored in 'one tw"
    ):
        a = reward(images, [long, "a cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.to(torch.float64).to(torch.float32)  # features are forgotten, what was told is not
        reward(images, [long, "a cat"])
    with pytest.warns(UserWarning, match="first 12 tokens") as told:
        Clip(folder, template="a photo of a {}")(images, ["x " * 30_000, f"{fits} eleven"])
    assert len(told) == 2
    assert all(len(str(one.message)) < 300 for one in told)
    assert torch.allclose(a[0], Clip(folder)(images[:1], [fits])[0])


def test_clip_over_views_is_the_mean_of_its_views():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["fox", "cat", "pizza"]
    plain, two, five = Clip(), Clip(views=2), Clip(views=5)
    expected = (plain(images, prompts) + plain(images.flip(-1), prompts)) / 2
    assert torch.allclose(two(images, prompts), expected, atol=1e-5)
    wide = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")
    moved = [wide[..., 4 + a : 36 + a, 4 + b : 36 + b] for a, b in ((2, 2), (-2, -2), (2, -2))]
    expected = torch.stack([plain(x, prompts) for x in (images, images.flip(-1), *moved)]).mean(0)
    assert torch.allclose(five(images, prompts), expected, atol=1e-5)
    noisy = Clip(views=2, noise=0.2)
    assert torch.equal(noisy(images, prompts), noisy(images, prompts))  # fixed for a run
    assert (noisy(images, prompts) - two(images, prompts)).abs().min() > 1e-4
    assert torch.allclose(noisy(images[1:], prompts[1:]), noisy(images, prompts)[1:], atol=1e-5)
    for options, words in (({"views": 9}, "1 to 6"), ({"noise": -1.0}, "not be negative")):
        with pytest.raises(ValueError, match=words):
            Clip(**options)


def test_embedded_clip_reads_pictures():
    from recipes.contrastive import retrieval
    from recipes.data.emoji import load

    emoji, clip = load(), Clip()
    rows = emoji.train[::4]
    found = retrieval(
        lambda x, p: clip.image_features(x) @ clip.text_features(p).T,
        emoji.images[rows],
        [emoji.labels[i] for i in rows],
        emoji.labels,
    )
    assert found > 0.8


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("brightness", [1.0, 0.0]),
        ("0.5*brightness", [0.5, 0.0]),
        ("2 * brightness + 1*brightness", [3.0, 0.0]),
        ("brightness - 0.25*brightness", [0.75, 0.0]),
        ("-1*brightness+2*brightness", [1.0, 0.0]),
        ("1e-1*brightness", [0.1, 0.0]),
        ("colour:name=#ffffff", None),
        ("colour:name=red+jpeg:quality=50", None),
        ("colour:name=blue+jpeg", None),
        ("1.*brightness-0.5*brightness", [0.5, 0.0]),
        ("jpeg:sign=-1", None),
        ("rewards.colour.Brightness", [1.0, 0.0]),
    ],
)
def test_load(spec, expected):
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    reward = rewards.load(spec)
    assert isinstance(reward, Reward)
    scores = score(reward, images)
    if expected is not None:
        assert scores.tolist() == pytest.approx(expected)


def test_load_from_a_file(tmp_path):
    file = tmp_path / "my-rewards.py"
    file.write_text(
        "import steer\n"
        "def half(images): return images.mean((1, 2, 3)) / 2\n"
        "class Scaled(steer.Reward):\n"
        "    def __init__(self, by: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.by = by\n"
        "    def forward(self, images, prompts=None, metadata=None):\n"
        "        return self.by * images.mean((1, 2, 3))\n"
        "ready = Scaled(3.0)\n"
    )
    ones = torch.ones(1, 3, 4, 4)
    for name, value in [("half", 0.5), ("Scaled:by=2", 2.0), ("ready", 3.0), ("Scaled", 1.0)]:
        assert float(rewards.load(f"{file}:{name}")(ones)) == pytest.approx(value)
    assert float(rewards.load(f"{file}:Scaled", by=4)(ones)) == pytest.approx(4)
    assert float(rewards.load(f"2*{file}:half + brightness")(ones)) == pytest.approx(2)
    with pytest.raises(ValueError, match="did you mean half"):
        rewards.load(f"{file}:hafl")
    with pytest.raises(ValueError, match="no option 'bi': it has by"):
        rewards.load(f"{file}:Scaled:bi=2")
    with pytest.raises(ValueError, match="takes no options"):
        rewards.load(f"{file}:half:by=2")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("brigthness", "did you mean brightness"),
        ("colour:name=redd", "unknown colour 'redd': did you mean red"),
        ("colour:nam=red", "no option 'nam': it has name"),
        ("colour:red", "write key=value"),
        ("colour:name=[", "not a plain value"),
        ("brightness:by=2", "no option 'by': it has none"),
        ("brightness +", "cannot read the reward"),
        ("jpeg:quality=0", "1 to 95"),
        ("nopackage.Thing", "cannot load the reward"),
    ],
)
def test_load_says_what_is_wrong(spec, words):
    with pytest.raises(ValueError, match=words):
        rewards.load(spec)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"file\.py:Name"):
        rewards.load("nowhere.py:Thing")


def test_options_for_a_sum_are_refused():
    with pytest.raises(ValueError, match="into its terms"):
        rewards.load("brightness + jpeg", quality=3)


def test_wrapped_functions_take_what_they_ask_for():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    one = rewards.wrap(lambda images: images.mean((1, 2, 3)))
    two = rewards.wrap(lambda images, prompts: torch.tensor([float(len(p)) for p in prompts]))
    assert one(images, ["a", "bb"]).shape == (2,)
    assert two(images, ["a", "bb"]).tolist() == [1, 2]
    assert rewards.wrap(one) is one
    with pytest.raises(TypeError, match="callable"):
        rewards.wrap(3)


def test_names_are_what_exists():
    assert set(rewards.NAMES) == {
        "clip", "colour", "brightness", "jpeg", "contrast", "saturation", "sharpness",
        "smoothness", "symmetry", "antisymmetry", "layout", "similarity", "siglip", "pickscore",
        "hpsv2", "imagereward", "mps", "aesthetic", "vqa", "classifier", "fashion",
        "lpips", "dino", "remote", "inpaint", "upscale", "deblur",
    }  # fmt: skip
    assert all("\n" not in line for line in rewards.NAMES.values())


def test_import_is_light():
    heavy = [
        "open_clip", "transformers", "lightning", "peft", "diffusers", "torchvision", "timm",
        "torchmetrics", "huggingface_hub", "httpx2", "starlette", "uvicorn",
    ]  # fmt: skip
    code = f"import sys, rewards; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_fit_their_budget():
    import steer

    zoos = [EMBEDDED.parent, Path(steer.__file__).with_name("zoo")]
    weights = [f for zoo in zoos for f in zoo.rglob("*.safetensors")]
    # the map, the CLIP, the judge, a pipeline's four; of fashion map, posterior map, reward, judge
    assert len(weights) == 11
    fashion = [f for f in weights if "fashion" in f.as_posix().split("zoo")[1]]
    assert len(fashion) == 4
    assert sum(f.stat().st_size for f in fashion) < 6e6
    assert sum(f.stat().st_size for f in weights) < 42e6
