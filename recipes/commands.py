"""The commands: their functions, groups of options, and examples. Does not need torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["COMMANDS", "ENTRIES", "GROUPS", "Command"]

ENTRIES = ("none:steps=4", "best-of-n:steps=4", "fmrg-j:steps=16", "reno:steps=24")
"""The default methods of `steer compare`."""


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        target: module:function; the function's arguments are the options.
        group: heading in `steer --help`.
        line: one-line description.
        examples: two calls, without the word `steer`.
        options: heading -> names of options; options that are not listed come first.
        positional: whether required arguments are written without their names.
        several: whether its one positional argument takes several words.
        further: module:function that returns more help, between the options and the examples.
    """

    target: str
    group: str
    line: str
    examples: tuple[str, str]
    options: Mapping[str, str] = field(default_factory=dict)
    positional: bool = False
    several: bool = False
    further: str = ""


GROUPS = ("sample and compare", "tune and train", "rewards", "information")
"""The headings, in order."""

_MODEL = "model model_options lora lora_scale device dtype"

COMMANDS = {
    "sample": Command(
        "recipes.sample:sample",
        "sample and compare",
        "guided sampling into a run folder",
        (
            'sample --prompt "a blue apple" --method fmrg-j --steps 8 --out outputs/apple',
            "sample --config demo.yaml --seed 1 --out outputs/demo_1",
        ),
        {
            "model": _MODEL + " compile devices num_nodes spread cfg negative_prompt",
            "what to sample": "prompt prompts_file init_image init_time init_by",
            "reward": "reward reward_prompt temperature strength",
            "method": "method particles steps seed target budget batch_size on_bad_reward",
            "options of some methods": "scale threshold moves rate brake lookahead jumps finish "
            "window every clip normalise settle churn noise options",
            "output": "unguided keep film out overwrite",
        },
    ),
    "plan": Command(
        "recipes.plan:plan",
        "sample and compare",
        "compute the memory and the network calls of a run",
        (
            "plan --model sdxl --reward pickscore --rows 2 --card 24",
            "plan --table --models '[sd15, sana-sprint-0.6b]'",
        ),
        {
            "model": "model model_options height width dtype",
            "run": "reward rows particles steps method objective rank tuning training",
            "hardware": "card cpu devices strategy",
            "output format": "json table models",
        },
    ),
    "compare": Command(
        "recipes.compare:compare",
        "sample and compare",
        "compare sampling methods at equal network calls",
        (
            "compare --config compare.yaml",
            "compare --prompts '[fox, bird]' --methods '[none, best-of-n, \"fmtt:steps=8\"]'",
        ),
        {
            "model": _MODEL + " devices num_nodes spread",
            "what to compare": "methods prompts prompts_file reward judge seeds",
            "tuning of method options": "tune by tune_prompts",
            "output": "out overwrite",
        },
    ),
    "eval": Command(
        "recipes.evaluate:evaluate",
        "sample and compare",
        "evaluate a model on its training data",
        ("eval --model emoji", "eval --model runs/emoji/map --repeats 1 --out outputs/mine"),
    ),
    "eval --lora": Command(
        "recipes.tuned:evaluate_tuned",
        "sample and compare",
        "compare tuned models with base and guidance",
        (
            "eval --lora runs/direct",
            "eval --lora runs/direct --lora runs/nft --steps '[1, 4]' --lora-scale '[0.5, 1]'",
        ),
        {
            "model": "model model_options lora lora_scale best device devices num_nodes spread",
            "what to compare": "steps guidance guided_tuned prompts particles seeds seed",
            "measures": "reward held_out judge",
            "output": "out overwrite",
        },
    ),
    "finetune": Command(
        "recipes.finetune:finetune",
        "tune and train",
        "tune a LoRA for a reward",
        (
            "finetune --config finetune.yaml",
            "finetune --reward clip --objective direct --options '{anchor: 0.5}' --steps 250",
        ),
        {
            "model and adapters": "model model_options lora lora_scale rank alpha targets",
            "reward": "reward prompts temperature strength",
            "training": "objective options steps batch_size micro_batch learning_rate warm "
            "average gradient_clip seed",
            "checks during the run": "judge held_out check_prompts check_samples check_steps "
            "check_every early_stop sweep sweep_steps",
            "hardware": "device dtype compile accelerator devices strategy precision "
            "checkpointing",
            "output": "out overwrite save_every wandb progress",
        },
        further="recipes.finetune:options_help",
    ),
    "studio": Command(
        "recipes.studio.command:studio",
        "sample and compare",
        "a web page for interactive steering",
        ("studio", "studio --model fashion --root runs --port 7861"),
    ),
    "export": Command(
        "recipes.export:export",
        "tune and train",
        "write adapters for peft, diffusers, ComfyUI, or merged",
        (
            "export --lora runs/direct --out outputs/lora",
            "export --lora runs/direct --format merged --out outputs/whole",
        ),
    ),
    "train": Command(
        "recipes.train:train",
        "tune and train",
        "train a flow map",
        (
            "train --config train_emoji.yaml",
            "train --velocity-steps 20 --map-steps 10 --channels '[16, 32]' --blocks '[1, 1]'",
        ),
    ),
    "distill": Command(
        "recipes.distill:distill",
        "tune and train",
        "distil a velocity model into a map, with adapters",
        (
            "distill --model emoji --rule lsd --rank 64 --out runs/map",
            "distill --model DIFFUSERS_FOLDER --data samples --guidance 4 --out runs/map",
        ),
        {
            "model and adapters": "model model_options device dtype module rank alpha targets",
            "training rule": "rule options pairs weight diagonal distance derivative guidance",
            "training data": "data own_steps prompts",
            "training": "steps batch_size learning_rate average seed precision devices",
            "output": "out save_every",
        },
    ),
    "compare-maps": Command(
        "recipes.compare_maps:compare_maps",
        "tune and train",
        "compare training rules of maps",
        (
            "compare-maps --data checkerboard",
            "compare-maps --rules '[lsd, imf, psd-m]' --map-steps 500 --seeds 1",
        ),
    ),
    "plot": Command(
        "recipes.plot:plot",
        "information",
        "draw the plots of a run folder again: dark, as SVG",
        (
            "plot outputs/compare --theme dark",
            "plot runs/direct --formats '[svg]' --out paper",
        ),
        positional=True,
    ),
    "rewards": Command(
        "recipes.lists:rewards_",
        "rewards",
        "list the rewards of the package",
        ("rewards", "rewards --check"),
    ),
    "check-reward": Command(
        "recipes.check:check_reward",
        "rewards",
        "test a reward: shapes, gradients, robustness",
        (
            "check-reward clip",
            "check-reward file.py:Name --prompts '[a red apple]' --json",
        ),
        positional=True,
    ),
    "serve-reward": Command(
        "recipes.serve:serve_reward",
        "rewards",
        "serve a reward over HTTP",
        ("serve-reward clip", "serve-reward 'clip + brightness' --port 8001 --workers 2"),
        positional=True,
    ),
    "models": Command(
        "recipes.lists:models",
        "information",
        "list the models of the package",
        ("models", "sample --model emoji"),
    ),
    "methods": Command(
        "recipes.lists:methods",
        "information",
        "list the sampling methods",
        ("methods", "sample --method split"),
    ),
    "cite": Command(
        "recipes.lists:cite",
        "information",
        "print BibTeX entries for sampling methods",
        ("cite fmtt", "cite dps tfg"),
        positional=True,
        several=True,
    ),
    "objectives": Command(
        "recipes.lists:objectives",
        "information",
        "list the tuning objectives",
        ("objectives", "finetune --objective transport"),
    ),
    "rules": Command(
        "recipes.lists:rules",
        "information",
        "list the training rules of maps",
        ("rules", "train --rule psd-m"),
    ),
    "completion": Command(
        "recipes.completion:completion",
        "information",
        "print a completion script for bash or zsh",
        ("completion bash > ~/.steer_completion", "completion zsh > ~/.steer_completion"),
        positional=True,
    ),
}
"""Name -> command. `eval` with adapters is the command `eval --lora`."""
