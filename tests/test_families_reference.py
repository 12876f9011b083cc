"""Rewards against a reference picture or a class, on tiny or random networks of real classes."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import rewards
from rewards.models import hub
from rewards.models.classifier import Classifier
from rewards.models.dino import Dino
from rewards.models.hub import Source
from rewards.models.lpips import NETS, Lpips
from rewards.models.preprocess import Preprocess
from rewards.testing import RewardContract

DIM, HEADS, SIDE, PATCH = 32, 2, 28, 7


def pictures(n=3, height=40, width=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, height, width, generator=g)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "reference.png"
    array = (pictures(1, 48, 48, seed=9)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(array).save(path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWSTEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(url, *args, **kwargs):
    raise OSError("no network")


class KinkedContract(RewardContract):
    """The contract of networks with rectifiers and maxima: narrower differences."""

    tolerance = 1e-4

    def test_gradient_agrees_with_finite_differences(self):
        """Along a random direction, between the kinks."""
        reward = copy.deepcopy(self.create_reward()).double()
        x = (0.2 + 0.6 * self.images().double()).requires_grad_()
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        (gradient,) = torch.autograd.grad(reward(x, self.prompts()).sum(), x)
        with torch.no_grad():
            up, down = (reward(x + d * 1e-7 * v, self.prompts()) for d in (1, -1))
        slope = (up - down) / 2e-7
        assert torch.allclose(slope, (gradient * v).flatten(1).sum(1), rtol=1e-3, atol=1e-5)


# classifier


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    """Random weights of timm's smallest network, and the words for its three classes."""
    import timm

    folder = tmp_path_factory.mktemp("timm")
    model = seeded(lambda: timm.create_model("test_resnet", num_classes=3))
    safetensors.torch.save_file(model.state_dict(), folder / "mine.safetensors")
    (folder / "names.txt").write_text("tabby, tabby cat\nred_fox\ncup\n")
    return folder


class TestClassifierOfTimm(KinkedContract):
    @pytest.fixture(autouse=True)
    def _folder(self, timm_file):
        self.folder = timm_file

    def create_reward(self):
        weights, names = self.folder / "mine.safetensors", self.folder / "names.txt"
        return Classifier("timm:test_resnet", weights, names=names)

    def prompts(self):
        return ["tabby", "Red fox", "cup", "tabby cat", "tabby, tabby cat"]


class TestClassifierOfOnesOwn(RewardContract):
    def create_reward(self):
        layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.Tanh(), nn.Linear(16, 4)]
        return Classifier(seeded(lambda: nn.Sequential(*layers[:1], *_linear())), target=2)


def _linear():
    return nn.Linear(3 * 32 * 32, 16), nn.Tanh(), nn.Linear(16, 4)


def logs(logits):
    """Log softmax by hand, in doubles."""
    return [[x - math.log(sum(map(math.exp, row))) for x in row] for row in logits.tolist()]


def test_timm_scores_are_log_softmax_of_its_logits(timm_file):
    import timm
    from torchvision import transforms

    weights, names = timm_file / "mine.safetensors", timm_file / "names.txt"
    reward = Classifier("timm:test_resnet", weights, names=names)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(safetensors.torch.load_file(weights))
    images = pictures(3, 220, 200)
    cfg = model.pretrained_cfg
    side = cfg["input_size"][-1]
    mode = transforms.InterpolationMode(cfg["interpolation"])
    pipeline = transforms.Compose([
        transforms.Resize(int(side / cfg["crop_pct"]), mode),
        transforms.Lambda(lambda x: x.clamp(0, 1)),
        transforms.CenterCrop(side),
        transforms.Normalize(cfg["mean"], cfg["std"]),
    ])  # fmt: skip
    with torch.no_grad():
        expected = logs(model(pipeline(images)).double())
    found = reward(images, ["cup", "red fox", "tabby"])
    assert found.tolist() == pytest.approx(
        [row[i] for row, i in zip(expected, (2, 1, 0), strict=True)], abs=1e-4
    )
    assert (found < 0).all()
    fixed = Classifier("timm:test_resnet", weights, target="red fox", names=names)
    assert fixed.backbone is reward.backbone
    assert fixed(images).tolist() == pytest.approx([row[1] for row in expected], abs=1e-4)


def test_timm_folder_and_published_weights(tmp_path, monkeypatch):
    """A folder in timm's layout with its own words; a published tag from the folder of weights."""
    import timm

    model = seeded(lambda: timm.create_model("test_resnet", num_classes=2))
    settings = {k: v for k, v in model.pretrained_cfg.items() if k not in {"url", "hf_hub_id"}}
    config = {"architecture": "test_resnet", "num_classes": 2, "label_names": ["n0", "n1"]}
    config |= {"pretrained_cfg": {**settings, "num_classes": 2}}
    config |= {"label_descriptions": {"n0": "ant", "n1": "bee"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    reward = rewards.load(f"rewards.classifier.Classifier:model=timm:{tmp_path},target=bee")
    assert reward.names == ["ant", "bee"]
    assert Classifier(tmp_path, target="ant").backbone.names == ["ant", "bee"]
    with torch.no_grad():
        expected = model.eval()(reward.backbone.preprocess(pictures())).log_softmax(-1)[:, 1]
    assert torch.allclose(reward(pictures()), expected, atol=1e-5)

    whole = seeded(lambda: timm.create_model("test_resnet"))
    home = hub.home() / "timm" / "test_resnet.r160_in1k"
    home.mkdir(parents=True)
    safetensors.torch.save_file(whole.state_dict(), home / "model.safetensors")
    named = Classifier("timm:test_resnet", target="tabby cat")
    assert (named.target, len(named.names)) == (281, 1000)
    assert Classifier("timm:test_resnet", "r160_in1k", target=281).backbone.model is not None
    with pytest.raises(ValueError, match=r"ambiguous \(134 .* and 517"):
        named.index("crane")


def test_classifier_execution_changes_the_cost_alone(tmp_path):
    import timm

    file = tmp_path / "vit.safetensors"
    model = seeded(lambda: timm.create_model("test_vit", num_classes=3))
    safetensors.torch.save_file(model.state_dict(), file)
    names, x = ["a", "b", "c"], pictures(2).requires_grad_()
    kinds = [{}, {"checkpoint": True}, {"dtype": "bfloat16"}]
    made = [Classifier("timm:test_vit", file, 1, names, **options) for options in kinds]
    assert len({id(reward.backbone) for reward in made}) == 3
    plain, careful, half = (torch.autograd.grad(r(x).sum(), x)[0] for r in made)
    assert torch.allclose(plain, careful, atol=1e-7)
    assert torch.nn.functional.cosine_similarity(plain.flatten(), half.flatten(), dim=0) > 0.9
    assert made[2](x).dtype == torch.float32


def test_torchvision_scores_are_log_softmax_of_its_logits(tmp_path):
    from torchvision import models

    model = seeded(lambda: models.squeezenet1_1(num_classes=5)).eval()
    file = tmp_path / "mine.pth"
    torch.save(model.state_dict(), file)
    names = ["a", "b", "c", "d", "e"]
    reward = Classifier("torchvision:squeezenet1_1", file, target="d", names=names)
    images = pictures(2, 325, 260)  # fitted to 320x256
    transform = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    with torch.no_grad():
        expected = logs(model(transform(images)).double())
    assert reward(images).tolist() == pytest.approx([row[3] for row in expected], abs=1e-4)
    with pytest.raises(ValueError, match="do not fit torchvision's squeezenet1_1 with 1000"):
        Classifier("torchvision:squeezenet1_1", file, target=3)


def test_torchvision_publishes_names_and_files(tmp_path, monkeypatch):
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refused)
    name = models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/", 1)[-1]
    cached = tmp_path / "hub" / "checkpoints" / name
    with pytest.raises(ValueError, match=r"classifier:weights=FILE") as caught:
        Classifier("torchvision:squeezenet1_1", target="tabby")
    assert f"put it at {cached}" in str(caught.value)
    model = seeded(models.squeezenet1_1)
    torch.save(model.state_dict(), cached)
    reward = Classifier("torchvision:squeezenet1_1", target="tabby")
    assert reward.target == 281
    assert reward.backbone.preprocess.fitted == (256, 256)
    assert reward.backbone.preprocess.size == (224, 224)


def test_classifier_of_a_file(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))\n"
    )
    weights = {"2.weight": torch.tensor([[1.0, 0, 0], [0, 2, 0]]), "2.bias": torch.zeros(2)}
    torch.save(weights, tmp_path / "net.pth")
    reward = Classifier(f"{file}:tiny", tmp_path / "net.pth", target=0)
    image = torch.tensor([0.9, 0.3, 0.5])[None, :, None, None].expand(1, 3, 8, 8)
    expected = 0.9 - math.log(math.exp(0.9) + math.exp(0.6))
    assert float(reward(image)) == pytest.approx(expected, abs=1e-5)
    file.write_text("from collections import OrderedDict as tiny")
    with pytest.raises(
        ValueError, match="neither a module nor a function that returns one, but OrderedDict"
    ):
        Classifier(f"{file}:tiny", target=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "timm:test_resnett"}, "unknown model 'test_resnett' of timm: did you mean"),
        ({"weights": "r160"}, r"unknown weights 'test_resnet.r160' of timm: did you mean"),
        ({"model": "torchvision:resnet81"}, "of torchvision: did you mean resnet18"),
        ({"model": "torchvision:resnet18", "weights": "IMAGENET"}, "Known: IMAGENET1K_V1"),
        ({"model": "keras:x"}, "give timm:NAME, torchvision:NAME, file.py:Name"),
        ({}, r"Download model.safetensors from .*timm/test_resnet.r160_in1k.*classifier:weights="),
        ({"target": "tabbi"}, "unknown class 'tabbi': did you mean tabby"),
        ({"target": 3}, "class 3 is out of range: give 0 to 2"),
        ({"dtype": "half"}, "unknown dtype"),
    ],
)
def test_classifier_errors_say_the_mend(timm_file, options, words):
    mine = "target" in options or "dtype" in options
    if mine:
        options = {
            "weights": timm_file / "mine.safetensors", "names": timm_file / "names.txt", **options,
        }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        Classifier(**{"model": "timm:test_resnet", **options})


def test_classifier_asks_for_what_it_lacks(timm_file, tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    image = torch.full((1, 3, 2, 2), 0.5)
    with pytest.raises(ValueError, match="reward 'classifier' without a target"):
        Classifier(module)(image)
    with pytest.raises(ValueError, match="no names for its classes"):
        Classifier(module, target="cat")
    with pytest.raises(ValueError, match=r"must give \(n, classes\)"):
        Classifier(module, target=2)(image)
    with pytest.raises(FileNotFoundError, match="classifier:weights="):
        Classifier("timm:test_resnet", tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="names="):
        Classifier(module, names=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot load timm's 'test_resnet'"):
        Classifier("timm:test_resnet", timm_file / "mine.safetensors")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot read the weights"):
        Classifier("timm:test_resnet", tmp_path / "bad.pth")


# lpips


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """Random weights of a trunk, as torchvision would publish them."""
    from torchvision import models

    files = {}

    def make(net):
        if net not in files:
            files[net] = tmp_path_factory.mktemp("trunk") / f"{net}.pth"
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                shapes = getattr(models, NETS[net][0])().features.state_dict()
            g = torch.Generator().manual_seed(0)
            weights = {}
            for key, value in shapes.items():
                spread = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
                weights[f"features.{key}"] = spread * torch.randn(value.shape, generator=g)
            torch.save(weights, files[net])
        return files[net]

    return make


class TestLpips(KinkedContract):
    @pytest.fixture(autouse=True)
    def _files(self, reference, trunk):
        self.reference, self.trunk = reference, trunk("squeeze")

    def create_reward(self):
        return Lpips(self.reference, net="squeeze", trunk=self.trunk)


TAPS = {
    "alex": [1, 4, 7, 9, 11],
    "vgg": [3, 8, 15, 22, 29],
    "squeeze": [1, 4, 7, 9, 10, 11, 12],
}
"""The layers of torchvision's `features` whose outputs are compared."""


@pytest.mark.parametrize("net", NETS)
def test_lpips_is_the_formula(net, reference, trunk):
    import torchmetrics.functional.image.lpips as theirs
    from torchvision import models

    images = pictures(2, 48, 48)
    reward = Lpips(reference, net=net, trunk=trunk(net))
    other = rewards.pixels.read(reference, "image")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        features = getattr(models, NETS[net][0])().features
    weights = torch.load(trunk(net), weights_only=True)
    weights = {k.removeprefix("features."): v for k, v in weights.items()}
    features.load_state_dict(weights, assign=True)
    folder = theirs.__file__.replace("lpips.py", "lpips_models")
    heads = torch.load(f"{folder}/{net}.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    with torch.no_grad():
        a, b = ((2 * x - 1 - shift[:, None, None]) / scale[:, None, None] for x in (images, other))
        total, at = torch.zeros(2), 0
        for i, layer in enumerate(features.eval()[: TAPS[net][-1] + 1]):
            a, b = layer(a), layer(b)
            if i in TAPS[net]:
                u, v = (x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in (a, b))
                w = heads[f"lin{at}.model.1.weight"][0, :, 0, 0]
                assert (w >= 0).all()
                total += ((u - v).square().mean((2, 3)) * w).sum(1)
                at += 1
            a, b = a.clone(), b.clone()
    assert at == len(TAPS[net])
    assert (total > 0.01).all()
    assert torch.allclose(reward(images), -total, atol=1e-4)
    assert float(reward(other)) == pytest.approx(0, abs=1e-6)


def test_lpips_stretches_and_shares(reference, trunk):
    images = pictures(2, 20, 26)
    reward = Lpips(reference, net="alex", trunk=trunk("alex"), size=48)
    plain = Lpips(reference, net="alex", trunk=trunk("alex"))
    assert plain.backbone is reward.backbone
    bigger = torch.nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True)
    assert torch.allclose(reward(images), plain(bigger), atol=1e-6)
    with pytest.raises(ValueError, match="20x26 are too small for 'alex', which takes 31x31"):
        plain(images)
    with pytest.raises(ValueError, match="size=20 is too small for 'alex': give 31"):
        Lpips(reference, net="alex", trunk=trunk("alex"), size=20)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_takes_its_smallest_side(net, reference, trunk):
    smallest = NETS[net][2]
    reward = Lpips(reference, net=net, trunk=trunk(net))
    assert torch.isfinite(reward(pictures(1, smallest, smallest))).all()


def test_lpips_errors_say_the_mend(reference, trunk, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refused)
    with pytest.raises(
        ValueError, match=r"Download https://.*alexnet.*lpips:trunk=FILE"
    ) as caught:
        Lpips(reference)
    assert str(tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth") in str(caught.value)
    with pytest.raises(ValueError, match="unknown net 'alexnet': did you mean alex"):
        Lpips(reference, net="alexnet")
    with pytest.raises(ValueError, match="holds no weights of torchvision's vgg16"):
        Lpips(reference, net="vgg", trunk=trunk("squeeze"))
    with pytest.raises(FileNotFoundError, match=r"image=picture\.png"):
        Lpips(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="lpips:trunk="):
        Lpips(reference, trunk=tmp_path / "none.pth")
    cached = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.write_bytes(trunk("alex").read_bytes())
    assert float(Lpips(reference)(pictures(1, 48, 48))) < 0.5


# dino


def dinov2(registers=0, **options):
    import transformers as t

    kind = t.Dinov2WithRegistersConfig if registers else t.Dinov2Config
    more = {"num_register_tokens": registers} if registers else {}
    config = kind(
        hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, mlp_ratio=2,
        image_size=SIDE, patch_size=PATCH, layerscale_value=0.5, **more, **options,
    )  # fmt: skip
    model = seeded(lambda: t.AutoModel.from_config(config))
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def dinos(tmp_path_factory):
    from transformers import BitImageProcessor

    folders = {}
    for name, registers in (("plain", 0), ("registers", 3)):
        folders[name] = tmp_path_factory.mktemp(name)
        dinov2(registers).save_pretrained(folders[name])
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": SIDE, "width": SIDE}}
        BitImageProcessor(**size, do_center_crop=True).save_pretrained(folders[name])
    return folders


class TestDino(RewardContract):
    tolerance = 1e-4

    @pytest.fixture(autouse=True)
    def _files(self, reference, dinos):
        self.reference, self.folder = reference, dinos["plain"]

    def create_reward(self):
        return Dino(self.reference, self.folder)


class TestDinoOfPatches(TestDino):
    def create_reward(self):
        return Dino(self.reference, self.folder, pool="mean")


@torch.no_grad()
def vit(weights, x, registers):
    """A DINOv2 of two blocks by its state dict: preprocessed pictures (n, 3, s, s) -> tokens."""
    w = dict(weights)

    def linear(h, name):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h, name):
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    n, side = len(x), SIDE // PATCH
    patches = x.reshape(n, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5)
    kernel = w["embeddings.patch_embeddings.projection.weight"].flatten(1)
    h = patches.reshape(n, side * side, -1) @ kernel.T
    h = h + w["embeddings.patch_embeddings.projection.bias"]
    h = torch.cat([w["embeddings.cls_token"].expand(n, -1, -1), h], 1)
    h = h + w["embeddings.position_embeddings"]
    if registers:
        extra = w["embeddings.register_tokens"].expand(n, -1, -1)
        h = torch.cat([h[:, :1], extra, h[:, 1:]], 1)
    for i in range(2):
        p = f"encoder.layer.{i}"
        a = norm(h, f"{p}.norm1")
        q, k, v = (
            linear(a, f"{p}.attention.attention.{s}").reshape(n, -1, HEADS, DIM // HEADS)
            for s in ("query", "key", "value")
        )
        attention = torch.einsum("nqhd,nkhd->nhqk", q, k) / (DIM // HEADS) ** 0.5
        mixed = torch.einsum("nhqk,nkhd->nqhd", attention.softmax(-1), v).reshape(n, -1, DIM)
        h = h + w[f"{p}.layer_scale1.lambda1"] * linear(mixed, f"{p}.attention.output.dense")
        m = nn.functional.gelu(linear(norm(h, f"{p}.norm2"), f"{p}.mlp.fc1"))
        h = h + w[f"{p}.layer_scale2.lambda1"] * linear(m, f"{p}.mlp.fc2")
    return norm(h, "layernorm")


@pytest.mark.parametrize("kind", ["plain", "registers"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_dino_is_the_cosine_of_a_plain_vit(kind, pool, dinos, reference):
    reward = Dino(reference, dinos[kind], pool=pool)
    images, registers = pictures(3), 3 if kind == "registers" else 0
    weights = safetensors.torch.load_file(dinos[kind] / "model.safetensors")
    other = rewards.pixels.read(reference, "image")
    both = []
    for x in (images, other):
        tokens = vit(weights, reward.backbone.preprocess(x), registers)
        both.append(tokens[:, 0] if pool == "cls" else tokens[:, 1 + registers :].mean(1))
    a, b = both
    expected = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert torch.allclose(reward(images), expected, atol=1e-4)
    assert float(reward(other)) == pytest.approx(1, abs=1e-5)


def test_dino_sees_what_its_processor_sees(dinos):
    """Against transformers' own image processor, which cuts the centre out of a larger picture."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(dinos["plain"])
    images = (pictures(2, 40, 48) * 255).round() / 255
    found = Preprocess.of_processor(processor)(images)
    expected = processor(list(images), do_rescale=False, return_tensors="pt")["pixel_values"]
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.02


def test_dino_rewards_share_the_network_and_its_work(dinos, reference):
    images = pictures(2)
    cls, mean = (Dino(reference, dinos["plain"], pool=p) for p in ("cls", "mean"))
    assert cls.backbone is mean.backbone
    expected = cls(images) + mean(images)
    calls = []
    handle = cls.backbone.model.register_forward_hook(lambda *a: calls.append(1))
    total = (cls + mean)(images)
    handle.remove()
    assert torch.allclose(total, expected, atol=1e-6)
    assert len(calls) == 1
    careful = Dino(reference, dinos["plain"], checkpoint=True)
    gradients = []
    for reward in (cls, careful):
        x = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(reward(x).sum(), x)[0])
    assert torch.allclose(*gradients, atol=1e-6)
    half = Dino(reference, dinos["plain"], dtype="bfloat16")
    assert torch.allclose(half(images), cls(images), atol=0.05)


def test_dino_errors_say_the_mend(dinos, reference, tmp_path):
    from transformers import AutoImageProcessor

    with pytest.raises(
        ValueError, match=r"Download config.json, model.safetensors.*dino:model=PATH"
    ):
        Dino(reference)
    with pytest.raises(ValueError, match="unknown pool 'class': did you mean cls"):
        Dino(reference, dinos["plain"], pool="class")
    with pytest.raises(FileNotFoundError, match="dino:model="):
        Dino(reference, "/nowhere/at/all")
    with pytest.raises(ValueError, match="cannot load the vision transformer"):
        Dino(reference, tmp_path)
    whole = dinov2()
    kept = {k: v for k, v in whole.state_dict().items() if "layer.1.norm1" not in k}
    whole.save_pretrained(tmp_path, state_dict=kept)
    AutoImageProcessor.from_pretrained(dinos["plain"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 2 weights of Dinov2Model .*layer.1.norm1"):
        Dino(reference, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"image=picture\.png"):
        Dino(tmp_path / "none.png", dinos["plain"])


@pytest.mark.parametrize("family", ["classifier", "dino", "lpips", "vqa"])
def test_families_name_their_source(family):
    module = __import__(f"rewards.{family}", fromlist=["SOURCE"])
    assert isinstance(module.SOURCE, Source)
    assert module.SOURCE.files
    assert module.SOURCE.licence
    assert module.SOURCE.size
