import json

import pytest
import torch

from steer.adapters.inject import adapt
from steer.adapters.store import save_adapters
from steer.models.loading import load as load_model
from steer.models.loading import save
from steer.models.two_time import NetworkFlow, TwoTimeUNet


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    flow = NetworkFlow(TwoTimeUNet(["apple"], (8, 8), (1, 1), size=8, width=16, groups=4))
    save(flow, tmp_path / "model")
    return flow, tmp_path / "model"


def test_a_saved_model_loads_to_the_same_function(saved):
    flow, folder = saved
    loaded = load_model(folder)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded.jump(x, 0.0, 1.0), flow.jump(x, 0.0, 1.0))
    assert not loaded.training
    assert next(loaded.parameters()).dtype == torch.float32
    assert load_model(str(folder), dtype=torch.float64).velocity(x.double(), 0.5).isfinite().all()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_weights_load_as_float32(saved, tmp_path):
    save(saved[0], tmp_path / "half", torch.float16)
    assert next(load_model(tmp_path / "half").parameters()).dtype == torch.float32


def test_an_unknown_name_gives_the_nearest_ones():
    with pytest.raises(ValueError, match=r"no model named 'emojy'.*did you mean emoji"):
        load_model("emojy")
    with pytest.raises(ValueError, match=r"the models are emoji"):
        load_model("zzz")


def test_missing_files_are_named(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing.*copy it again"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, 5000])
def test_truncated_weights_are_an_error_that_names_the_file(saved, keep):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        load_model(folder)


def test_a_wrong_configuration_is_an_error_that_says_so(saved):
    _, folder = saved
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "channels": [16, 16]}))
    with pytest.raises(ValueError, match=r"does not fit config\.json"):
        load_model(folder)
    file.write_text(json.dumps({**config, "format": "other/2"}))
    with pytest.raises(ValueError, match=r"has format 'other/2'"):
        load_model(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"not a model's configuration"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("channels", [8, 10**9], "channels must be whole numbers from 1 to 4096, got 1000000000"),
        ("channels", [8, 6], "channels must be multiples of groups=4, got 6"),
        ("channels", [], "channels must be of 1 to 8 levels, got 0"),
        ("channels", [8] * 9, "channels must be of 1 to 8 levels, got 9"),
        ("channels", 8, "not iterable"),
        ("blocks", [1, 10**8], "blocks must be whole numbers from 0 to 64"),
        ("blocks", [1], "blocks must be as many as channels: 1 for 2 levels"),
        ("size", 7, "size must be a multiple of 2 for 2 levels"),
        ("size", 10**6, "size must be whole numbers from 1 to 1024"),
        ("size", True, "size must be whole numbers"),
        ("width", -1, "width must be whole numbers from 1 to 8192, got -1"),
        ("width", "x" * 5000, "width must be whole numbers"),
        ("groups", 0, "groups must be whole numbers from 1 to 4096, got 0"),
        ("highest", [30.0, float("nan")], "highest must be two frequencies above 0"),
        ("highest", [30.0], "highest must be two frequencies above 0"),
        ("vocabulary", [1], "vocabulary must be a list of words"),
        ("strange", 1, "strange"),
    ],
)
def test_a_configuration_out_of_bounds_says_which_number(saved, name, value, words):
    file = saved[1] / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration") as caught:
        load_model(saved[1])
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["[1]", "[" * 9999, "9" * 9999, "null", '"x"', "[[1, 2]]", "{}"])
def test_what_is_no_mapping_is_no_configuration(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not a model's configuration"):
        load_model(saved[1])


def test_a_large_network_is_refused_before_it_is_allocated(saved):
    file = saved[1] / "config.json"
    config = json.loads(file.read_text())
    large = {"channels": [4096] * 2, "blocks": [64, 64], "size": 8}  # 160 GB
    file.write_text(json.dumps({**config, **large}))
    with pytest.raises(ValueError, match=r"does not fit config\.json") as caught:
        load_model(saved[1])
    assert len(str(caught.value)) < 600


def test_loading_draws_nothing(saved):
    before = torch.get_rng_state()
    load_model(saved[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_files_are_refused(saved):
    with pytest.raises(ValueError, match="is a file: give the folder"):
        load_model(saved[1] / "config.json")


def test_adapters_are_put_on_the_model(saved, tmp_path):
    folder = saved[1]
    tuned = adapt(load_model(folder))
    for p in tuned.adapters().values():
        p.data += 0.1
    save_adapters(tuned, tmp_path / "lora")
    x = torch.randn(2, 3, 8, 8)
    loaded = load_model(folder, lora=tmp_path / "lora", lora_scale=0.5, dtype=torch.float64)
    assert (loaded.scale, loaded.training, loaded.name) == (0.5, False, str(folder))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    torch.testing.assert_close(loaded.jump(x, 0.0, 1.0), tuned.at(0.5).jump(x, 0.0, 1.0))
    assert torch.equal(load_model(folder, tmp_path / "lora", 0).velocity(x, 0.5),
                       load_model(folder).velocity(x, 0.5))  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"no folder of adapters at some/folder"):
        load_model(folder, lora="some/folder")
    with pytest.raises(ValueError, match=r"were made for .*model' with weights .*'emoji'"):
        load_model("emoji", lora=tmp_path / "lora")
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        load_model(folder, lora=tmp_path / "lora", lora_scale=float("inf"))


def test_a_full_disk_leaves_the_old_weights_whole(saved, tmp_path):
    import resource
    import signal

    flow, folder = saved
    before = (folder / "model.safetensors").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            save(flow, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_embedded_model_knows_its_words_and_is_near_its_own_map():
    import warnings

    from recipes.data.emoji import load as load_emoji
    from steer.training.metric import composition_error

    flow, emoji = load_model("emoji"), load_emoji()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.given(emoji.concepts)
        flow.given([*emoji.styles[:4], *sorted(set(emoji.groups)), *sorted(set(emoji.subgroups))])
    bound = flow.given(emoji.concepts[:8])
    x = torch.randn(8, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    assert composition_error(bound, x, 0.0, 0.5, 1.0) < 0.25
    with torch.no_grad():
        images = flow.decode(bound.jump(x, 0.0, 1.0))
    assert images.shape == (8, 3, 32, 32)
    assert images[:, :, 0].mean() > 0.9  # emoji stand on white
    assert -0.25 < images.quantile(0.01) < images.quantile(0.99) < 1.25


@pytest.mark.slow
def test_the_judge_finds_the_embedded_models_pictures_among_100_captions(tmp_path):
    from recipes.evaluate import evaluate

    metrics = evaluate("emoji", tmp_path)
    relative = metrics["retrieval_1_of_100"]["relative_to_real"]
    assert relative["4"] >= 0.80
    assert relative["1"] >= 0.65
    assert {p.name for p in tmp_path.iterdir()} >= {"metrics.json", "labels_4_step.png"}
