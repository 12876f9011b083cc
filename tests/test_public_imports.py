"""What could be imported once can be imported still, and what there is now can be as well."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import rewards

ROOT = Path(__file__).parents[1]

OLD = {
    "rewards": "FUNCTIONS NAMES Reward load wrap",
    "rewards.aesthetic": "HEADS NEEDS Aesthetic Head collapsed",
    "rewards.algebra": "Batched Capped Composed Ensemble Minimum Normalised Product",
    "rewards.augment": "SHIFTS Augmented shifted",
    "rewards.backbone": "DTYPES Backbone Cosine OpenClip Transformers checkpointed fill folder_of "
    "once open_clip_backbone pretrained stamp",
    "rewards.check": "CHECKS PROMPTS Finding Report check",
    "rewards.classifier": "NEEDS SOURCE Classifier Logits",
    "rewards.clip": "EMBEDDED Clip",
    "rewards.colour": "Brightness Colour",
    "rewards.dino": "NEEDS POOLS SOURCE Dino Tokens",
    "rewards.form": "REGIONS Antisymmetry Layout Symmetry",
    "rewards.hpsv2": "NEEDS SOURCES HPSv2",
    "rewards.hub": "File Source fetch fetch_url home local state",
    "rewards.imagereward": "MEAN NEEDS SOURCE STD TOKENS Blip ImageReward",
    "rewards.jpeg": "Jpeg",
    "rewards.judge": "EMBEDDED Judge JudgeNetwork",
    "rewards.known": "with_gradient",
    "rewards.load": "FUNCTIONS NAMES from_file load missing",
    "rewards.lpips": "NEEDS NETS SOURCE Lpips",
    "rewards.mps": "CONDITION MPS NEEDS Crossed",
    "rewards.names": "hint reason unknown",
    "rewards.pickscore": "NEEDS SOURCE PickScore",
    "rewards.pixels": "PixelReward drawing ink luma read rms",
    "rewards.preprocess": "FITS Preprocess",
    "rewards.prompts": "one_each",
    "rewards.reference": "Similarity",
    "rewards.remote": "PROTOCOL TOKEN Remote pack unpack",
    "rewards.serve": "LIMITS app serve worker",
    "rewards.siglip": "NEEDS OUTPUTS SOURCE Siglip",
    "rewards.testing": "RewardContract",
    "rewards.tone": "Contrast Saturation Sharpness Smoothness",
    "rewards.vqa": "NEEDS QUESTION SOURCE VQA VisionLanguage",
    "steer": "METHODS MODELS OBJECTIVES Adapted Braked ClassifierFree Clipped Continuous "
    "Cosine Denoised FlowMap FlowMapControl GaussianMixture Guidance Jump Kernel "
    "Langevin Linear LinearReward Lookahead Naive Noise NoiseAscent Normalised Path "
    "Population Potential QuadraticReward Ratio Result Reward Sde Terminal "
    "VariancePreserving Weights Windowed finetune load multinomial residual sample "
    "stratified systematic",
    "steer.kernel": "Adaptation Jump Kernel Langevin Sde",
    "steer.load": "MODELS load save",
    "steer.lora": "Adapted adapt fingerprint load_adapters merged pack plain_config read_config "
    "read_metadata rejoin save_adapters",
    "steer.methods": "METHODS TABLE Method affordable check_options method_options plan "
    "step_times",
    "steer.reward": "LinearReward QuadraticReward Reward WeightedSum clamp01 dissect learners "
    "leaves name_of score shared sharing term_gradients term_scores wrap",
    "steer.testing": "Corrected FlowMapContract",
}
"""Module -> its public names before modules moved into rooms."""

PACKAGES = ("rewards", "steer")
"""Those whose modules of today are all imported here."""

NEW = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
)

LOADED = {
    "rewards": {"rewards"},
    "steer": {"steer", "steer.names"},
}
"""Package -> its files that are read when it is imported: no old module's, no room's."""


@pytest.mark.parametrize("module", OLD)
def test_old_names_are_there(module):
    found = importlib.import_module(module)
    for name in OLD[module].split():
        assert getattr(found, name) is not None, name
        exec(f"from {module} import {name}", {})


@pytest.mark.parametrize("module", OLD)
def test_old_modules_are_attributes_of_their_package(module):
    """`import rewards.colour`, then `rewards.colour.Colour`; a package's own names go before."""
    package, _, name = module.partition(".")
    own = getattr(importlib.import_module(package), "__all__", ())
    if name and name not in own:
        space = {}
        exec(f"import {module}", space)
        for public in OLD[module].split():
            assert eval(f"{module}.{public}", space) is not None


@pytest.mark.parametrize("module", NEW)
def test_new_names_are_there(module):
    found = importlib.import_module(module)
    assert found.__file__
    names = getattr(found, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        exec(f"from {module} import {name}", {})


def test_old_and_new_are_the_same():
    from rewards.checking import check
    from rewards.models.weights import fill
    from rewards.pixels.reading import read
    from steer.reward import unknown

    assert importlib.import_module("rewards.backbone").fill is fill
    assert importlib.import_module("rewards.check").check is check
    assert importlib.import_module("rewards.names").unknown is unknown
    assert importlib.import_module("rewards.pixels").read is read
    with pytest.raises(ImportError, match="cannot import name 'Colur'"):
        exec("from rewards.colour import Colur", {})
    with pytest.raises(AttributeError, match=r"rewards\.colour moved to rewards\.pixels\.colour"):
        importlib.import_module("rewards.colour").Colur  # noqa: B018


def test_functions_and_modules_have_different_names():
    """`import steer.sample as m` gave the function, in which nothing else of the module was."""
    import steer

    for name in ("sample", "finetune", "load"):
        assert callable(getattr(steer, name))
    for name in ("sample", "finetune"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"steer.{name}")
    import steer.load as loading

    assert loading.save is importlib.import_module("steer.models.loading").save


def test_what_steer_offers_is_spelled_once():
    import steer

    assert set(steer.__all__) >= set(OLD["steer"].split())
    assert {"sample", "stream", "Wrapped"} <= set(dir(steer))


def test_the_function_is_not_hidden_by_the_module_of_its_name():
    code = "import rewards, rewards.load; from rewards import load; print(load('brightness'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("Brightness")


@pytest.mark.parametrize("package", LOADED)
def test_old_names_are_loaded_when_asked_for(package):
    code = f"""import sys, {package}
for name, module in sys.modules.items():
    if getattr(module, "__dict__", {{}}).get("__file__"):
        print(name)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {n for n in run.stdout.split() if n.split(".")[0] == package} == LOADED[package]


@pytest.mark.parametrize(
    "text",
    [
        "rewards.colour.Brightness",
        "rewards.pixels.colour.Brightness",
        "0.5*rewards.tone.Contrast + rewards.jpeg.Jpeg:quality=80",
        "rewards.clip.Clip",
        "rewards.models.clip.Clip",
        "min(rewards.form.Symmetry, rewards.pixels.form.Symmetry)",
    ],
)
def test_texts_name_old_and_new_modules(text):
    assert isinstance(rewards.load(text), rewards.Reward)
