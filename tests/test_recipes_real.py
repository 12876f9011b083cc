"""The recipes for published models, run for two steps on tiny pipelines of the same classes."""

import json
import re

import pytest
import yaml

from benchmarks.cards import CARDS, RECIPES, card_for, measured
from recipes.arguments import CONFIGS, parse
from recipes.cli import main
from tests import tiny_pipelines as tiny

REAL = CONFIGS / "real"
TINY = {
    "aesthetic_sdxl_turbo": "sdxl_turbo",
    "clip_flux_schnell": "flux_schnell",
    "hpsv2_flux3_klein": "flux3_klein",
    "imagereward_sd15_lcm": "sd15_lcm",
    "pickscore_sana_sprint": "sana_sprint",
    "video_anyflow": "anyflow",
}
"""Recipe -> the tiny pipeline of its model's class."""

FILES = sorted(path.stem for path in REAL.glob("*.yaml"))
RED = "colour:name=red"


def some(*quick):
    """All recipes, these as quick tests."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in TINY]


def options(name, config):
    """The recipe's own options, at the tiny pipeline's size."""
    call = dict(tiny.CALLS[TINY[name]])
    sizes = {"height": call.pop("height"), "width": call.pop("width")}
    own = config["model_options"]
    known = {**own.get("call", {}), **call}
    return f"--model-options={json.dumps({**own, **sizes, 'call': known})}"


def said(file):
    """What a file's head says of its card: GB, and the peak in GiB."""
    text = (REAL / f"{file}.yaml").read_text()
    found = re.search(r"Card: (\d+) GB\. A \w+ step of one picture peaks at ([\d.]+) GiB", text)
    return int(found[1]), float(found[2])


def test_there_is_one_to_sample_and_one_to_tune_for_each():
    assert set(TINY) == set(RECIPES)
    assert sorted([*TINY, *(f"{name}_tune" for name in TINY)]) == FILES


@pytest.mark.parametrize("file", FILES)
def test_it_parses_as_a_command_does(file):
    """With `--config real/NAME.yaml` from anywhere, and no model is looked for."""
    command = "finetune" if file.endswith("_tune") else "sample"
    settings = parse(command, [f"--config=real/{file}.yaml"]).settings
    config = yaml.safe_load((REAL / f"{file}.yaml").read_text())
    assert settings["model"] == config["model"]
    assert settings["model_options"]["checkpointing"] is True
    assert said(file)[0] in CARDS


@pytest.mark.parametrize("name", some("pickscore_sana_sprint", "hpsv2_flux3_klein"))
def test_it_samples(name, tmp_path, capsys):
    tiny.save(TINY[name], tmp_path / "model")
    config = yaml.safe_load((REAL / f"{name}.yaml").read_text())
    words = ["sample", f"--config=real/{name}.yaml", f"--model={tmp_path / 'model'}"]
    words += [options(name, config), f"--reward={RED}", "--prompt=a fox", "--device=cpu"]
    words += ["--dtype=float32", "--steps=2", "--particles=2", f"--out={tmp_path / 'out'}"]
    assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "grid.png").is_file()
    made = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert made["method"] == config["method"]


@pytest.mark.parametrize("name", some("pickscore_sana_sprint"))
def test_it_tunes(name, tmp_path, capsys):
    tiny.save(TINY[name], tmp_path / "model")
    config = yaml.safe_load((REAL / f"{name}_tune.yaml").read_text())
    words = ["finetune", f"--config=real/{name}_tune.yaml", f"--model={tmp_path / 'model'}"]
    words += [options(name, config), f"--reward={RED}", "--prompts=[a fox, an owl]"]
    words += ["--check-prompts=[a cat]", "--device=cpu", "--dtype=float32", "--accelerator=cpu"]
    words += ["--steps=2", "--batch-size=2", "--rank=2", "--check-every=2", "--sweep=[1.0]"]
    words += ["--sweep-steps=[1]", "--progress=false", f"--out={tmp_path / 'run'}"]
    assert main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file() or (
        tmp_path / "run" / "adapter_model.safetensors"
    ).is_file()


@pytest.mark.parametrize("name", some("imagereward_sd15_lcm"))
def test_its_card_is_what_the_computation_says(name):
    use = measured(RECIPES[name])
    for file, peak in ((name, use.guided), (f"{name}_tune", use.tuning)):
        card, stated = said(file)
        assert abs(peak - stated) < 0.06
        assert card == card_for(peak)
