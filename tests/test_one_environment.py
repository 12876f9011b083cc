"""Every reward that comes along, built in one process and added up: no versions in conflict."""

import pytest
import torch

import rewards
from rewards.models.classifier import Classifier
from rewards.models.dino import Dino
from rewards.models.lpips import Lpips
from rewards.models.vqa import VQA
from tests.test_families import (  # noqa: F401
    head,
    hps_file,
    ir_folder,
    made,
    mps_file,
    openai,
    pick_folder,
    places,
    siglip_folder,
    tiny_hps,
)
from tests.test_families_reference import dinos, reference, timm_file, trunk  # noqa: F401
from tests.test_families_vlm import vlms  # noqa: F401

OWN = {
    "colour": "colour:name=red", "layout": "layout:region=left", "similarity": "{reference}",
}  # fmt: skip


@pytest.fixture
def everyone(made, dinos, reference, timm_file, trunk, vlms):  # noqa: F811
    """One reward for each name, but for the one that needs a server."""
    built = {name: make() for name, make in made.items()}
    built |= {
        "vqa": VQA(vlms["qwen2_vl"]),
        "classifier": Classifier(
            "timm:test_resnet", timm_file / "mine.safetensors", target=0,
            names=timm_file / "names.txt",
        ),
        "lpips": Lpips(reference, "squeeze", trunk=trunk("squeeze")),
        "dino": Dino(reference, dinos["plain"]),
        "similarity": rewards.load("similarity", image=str(reference)),
        "inpaint": rewards.load("inpaint", image=str(reference), mask=str(reference)),
        "upscale": rewards.load("upscale", image=str(reference)),
        "fashion": rewards.load("fashion", target="bag"),
        "deblur": rewards.load("deblur", image=str(reference)),
    }  # fmt: skip
    for name in rewards.NAMES:
        if name not in built and name != "remote":
            built[name] = rewards.load(OWN.get(name, name))
    return built


def test_all_rewards_in_one_process(everyone):
    assert set(everyone) == set(rewards.NAMES) - {"remote"}
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    total = 0.0 * everyone["jpeg"]
    for name, reward in everyone.items():
        x = images.clone().requires_grad_()
        scores = reward(x, ["a red apple", "a cat"])
        assert scores.shape == (2,), name
        assert torch.isfinite(scores).all(), name
        assert reward.differentiable == (name != "jpeg")
        if reward.differentiable:
            (gradient,) = torch.autograd.grad(scores.sum(), x)
            assert torch.isfinite(gradient).all(), name
            assert (gradient.flatten(1).norm(dim=1) > 0).all(), name
            total = total + 0.1 * reward
    assert torch.isfinite(total(images, ["a red apple", "a cat"])).all()
