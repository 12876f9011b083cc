"""Pictures that a run starts from, as tensors and as PIL images, and texts that are none."""

import pytest
import torch
from PIL import Image

import steer
from steer.pictures import as_images


@pytest.fixture(scope="module")
def flow():
    return steer.load("emoji")


def test_a_pil_image_is_the_tensor_of_its_pixels(flow):
    image = Image.new("RGBA", (32, 32), (255, 128, 0, 255))
    x = as_images(image)
    assert x.shape == (3, 32, 32)
    assert x[:, 0, 0].tolist() == pytest.approx([1.0, 128 / 255, 0.0])
    run = {"reward": "brightness", "prompts": "fox", "particles": 1, "steps": 2, "method": "none"}
    one = steer.sample(flow, init_image=image, **run)
    assert torch.equal(one.x, steer.sample(flow, init_image=x, **run).x)
    run["prompts"] = ["fox", "owl"]
    two = steer.sample(flow, init_image=[image, image.rotate(90)], **run)
    assert torch.equal(two.x, steer.sample(flow, init_image=torch.stack([x, x]), **run).x)


def test_what_is_no_picture_is_refused(flow):
    run = {"reward": "brightness", "prompts": "fox", "particles": 1, "steps": 2}
    for given in ("fox.png", 3, [], [torch.zeros(3, 32, 32), "x"]):
        with pytest.raises(TypeError, match=r"PIL\.Image\.open"):
            steer.sample(flow, init_image=given, **run)
    sizes = [Image.new("RGB", (32, 32)), Image.new("RGB", (16, 32))]
    with pytest.raises(ValueError, match="resize them to one"):
        steer.sample(flow, init_image=sizes, **run)
    with pytest.raises(ValueError, match="resize the image"):
        steer.sample(flow, init_image=sizes[1], **run)
    with pytest.raises(ValueError, match="from nan to nan"):
        steer.sample(flow, init_image=torch.full((3, 32, 32), torch.nan), **run)


@pytest.mark.parametrize("prompts", [3, [None], ["fox", 2], {"a": 1}.values()])
def test_prompts_that_are_no_text_are_refused(flow, prompts):
    with pytest.raises(TypeError, match="prompts must be a string or a list of strings"):
        steer.sample(flow, "brightness", prompts)
    with pytest.raises(TypeError, match="reward_prompts must be a string or a list"):
        steer.sample(flow, "brightness", "fox", reward_prompts=prompts)


def test_a_class_of_rewards_is_no_reward(flow):
    with pytest.raises(TypeError, match=r"LinearReward is a class.*LinearReward\(\.\.\.\)"):
        steer.sample(flow, steer.LinearReward, "fox")


def test_devices_and_dtypes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="device 'cudda' cannot be used here"):
        steer.load("emoji", device="cudda")
    with pytest.raises(TypeError, match=r"torch\.bfloat16, got 'float8'"):
        steer.load("emoji", dtype="float8")


def test_adapters_that_are_not_finite_are_said_to_be_damaged(flow, tmp_path):
    from safetensors.torch import load_file, save_file

    from steer.adapters.inject import adapt
    from steer.adapters.store import WEIGHTS, save_adapters

    save_adapters(adapt(flow, 2), tmp_path / "lora")
    file = tmp_path / "lora" / WEIGHTS
    state = load_file(file)
    name = next(iter(state))
    state[name][0] = torch.nan
    save_file(state, file)
    with pytest.raises(ValueError, match=r"not finite.*damaged"):
        steer.load("emoji", lora=tmp_path / "lora")
