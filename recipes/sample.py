"""`steer sample`: guided sampling into a run folder, resumable over prompts."""

import hashlib
import math
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from steer.sampling.folder import save_result
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import rewards
import steer
from recipes.partial import Partial
from steer.adapters.store import CONFIG, WEIGHTS, load_adapters
from steer.files import refuse_existing
from steer.flow import flat_prompts
from steer.guidance.population import Population
from steer.reward import dissect
from steer.sampling.calibrate import learn
from steer.sampling.methods import TABLE, method_options, plan
from steer.sampling.result import Result
from steer.sampling.run import PROBES, check, joined_trace

__all__ = ["sample"]

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def sample(
    model: str = "emoji",
    lora: Path | None = None,
    lora_scale: float | None = None,
    reward: str = "clip",
    prompt: str | list[str] | None = None,
    prompts_file: Path | None = None,
    reward_prompt: str | list[str] | None = None,
    particles: int = 4,
    steps: int = 16,
    method: str = "fmtt",
    temperature: float | None = None,
    strength: float | None = None,
    scale: float | None = None,
    threshold: float | None = None,
    moves: int | None = None,
    rate: float | None = None,
    brake: float | None = None,
    lookahead: int | None = None,
    jumps: int | None = None,
    finish: int | None = None,
    window: list[float] | None = None,
    every: int | None = None,
    clip: float | None = None,
    normalise: float | None = None,
    settle: bool | None = None,
    cfg: float | None = None,
    negative_prompt: str | None = None,
    init_image: Path | None = None,
    init_time: float | None = None,
    target: float | None = None,
    budget: float | None = None,
    keep: Literal["best", "all"] = "all",
    seed: int = 0,
    device: str | None = None,
    dtype: Dtype | None = None,
    out: Path = Path("outputs/sample"),
    overwrite: bool = False,
) -> Path:
    """Sample pictures that a reward likes, and write them to a run folder.

    The folder holds config.yaml, images/, grid.png (unguided beside guided, same seeds),
    scores.jsonl and metrics.json. It appears whole or not at all; a run that was interrupted goes
    on where it stopped when the same command is given again.

    Args:
        model: a name that `steer models` lists, a folder, or file.py:Name.
        lora: a folder of adapters that were made for this model.
        lora_scale: what their update is multiplied by (default 1): 0 is the model without them.
        reward: a name that `steer rewards` lists, a weighted sum of such, or file.py:Name.
        prompt: what to draw; a list for several.
        prompts_file: a text file with a prompt a line, instead.
        reward_prompt: what the reward is asked, where that differs from the prompt.
        particles: how many pictures a prompt.
        steps: steps from noise to picture.
        method: a name that `steer methods` lists.
        temperature: in the reward's units; lower steers harder.
        strength: instead: the temperature is the reward's own spread divided by this (default 3).
        scale: how far the gradient shifts the proposal (fmtt, denoiser, naive; default 1), or the
            push as a share of the velocity (fmrg-j; default 0.3).
        threshold: resample below this share of effective particles (default 0.5).
        moves: Langevin moves a step (split; default 1).
        rate: length of an ascent step as a share of the noise's norm (reno; default 0.15).
        brake: a picture is no longer pushed once its reward is seen at this (fmrg-j, reno).
        lookahead: how many jumps the lookahead is composed of (fmtt, split, fmrg-j; default 1).
        jumps: how many jumps make the picture that is ascended (reno; default 1).
        finish: how many make the picture that is returned (reno; default: those).
        window: times from when and until when the gradient counts, [0, 1] for always.
        every: a gradient every so many steps (default 1).
        clip: the largest norm of the potential's gradient, each row by itself.
        normalise: the norm that every row's gradient gets.
        settle: end with a jump instead of a noisy step (fmtt, denoiser, naive; default true).
        cfg: classifier-free guidance mixed at run time, on top of what the model has built in;
            it doubles the network calls.
        negative_prompt: what to lead away from, with cfg. Default: no prompt.
        init_image: a picture file to start from.
        init_time: where such a start is: 0 pure noise, near 1 little changes (default 0.5).
        target: stop as soon as every prompt's best picture is seen at this reward.
        budget: stop before a particle has cost more network calls than this.
        keep: write all pictures of a prompt, or the best.
        seed: keys all randomness.
        device: where to compute. Default: where the model is loaded, the CPU.
        dtype: the network's. Default: float32 on a CPU.
        out: the run folder.
        overwrite: replace the run folder if it exists, and drop an interrupted run.

    Returns:
        The run folder.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    method_options(method)  # the name is known
    tempered = TABLE[method].tempered
    if not tempered and (temperature is not None or strength is not None):
        raise ValueError(
            f"method {method!r} has no temperature: leave temperature and strength out, or take "
            f"one of {', '.join(name for name, m in TABLE.items() if m.tempered)}"
        )
    console = Console(stderr=True)
    refuse_existing(out, overwrite)
    prompts = _prompts(prompt, prompts_file)
    given = {
        "scale": scale, "threshold": threshold, "moves": moves, "rate": rate, "brake": brake,
        "lookahead": lookahead, "jumps": jumps, "finish": finish, "window": window,
        "every": every, "clip": clip, "normalise": normalise, "settle": settle,
    }  # fmt: skip
    options = {k: v for k, v in given.items() if v is not None}
    flow = _model(model, device, dtype, lora, lora_scale)
    if negative_prompt is not None and cfg is None:
        raise ValueError("negative_prompt leads nowhere without cfg: give cfg, for instance 2")
    if cfg is not None:
        if prompts is None:
            raise ValueError("cfg leads towards a prompt, and there is none: give one, or no cfg")
        flow = steer.ClassifierFree(flow, cfg, negative_prompt or "")
    with torch.no_grad():
        shape = flow.decode(torch.zeros(1, *flow.event_shape, device=_device(flow))).shape
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(
            f"model {model!r} decodes to shape {tuple(shape)}, which is no picture (1, 3, h, w): "
            "call steer.sample from Python, and keep result.x"
        )
    judge = rewards.load(reward)
    judge = judge.to(_device(flow))
    asked = reward_prompt
    run: dict[str, Any] = {
        "particles": particles,
        "steps": steps,
        "seed": seed,
        "init_image": None if init_image is None else _picture(init_image, shape[-2:]),
        "init_time": init_time,
    }
    guided = {"method": method, "temperature": temperature, "strength": strength, **options}
    guided |= {"target": target, "budget": budget}

    # every mistake is found before any work
    check(flow, judge, prompts, **run, **guided, reward_prompts=asked)
    start = 0.0 if init_image is None else 0.5 if init_time is None else init_time
    cost = plan(method, steps, judge.differentiable, start, **options)
    count = 1 if prompts is None else len(prompts)
    probes = PROBES if tempered and temperature is None else 0
    calls, plain_calls = flow.evaluations * cost["nfe"], flow.evaluations * steps
    most = "at most " if target is not None or budget is not None else ""
    console.print(
        f"{most}{count} prompt{'s' * (count > 1)} x {particles} particles x "
        f"{calls + plain_calls} NFE ({plain_calls} of them unguided, to compare) + {count} x "
        f"{flow.evaluations * probes} to set the temperature = "
        f"{count * (particles * (calls + plain_calls) + flow.evaluations * probes)} network "
        f"calls, {count * (particles * (cost['reward_calls'] + 1) + probes)} reward calls"
    )
    pictures = [] if init_image is None else [str(init_image)]
    files = _fingerprints(model, reward, *pictures, *_adapter_files(lora))
    same = {k: v for k, v in settings.items() if k != "overwrite"}
    identity = {"prompts": prompts, "files": files, "settings": same}
    partial = _Groups(out, identity, overwrite)
    size = max(1, 64 // particles)
    groups = range(0, count, size)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[reward]}"),
    )
    # once, from the whole list: what is learnt must not depend on which prompts are left to do
    learn(flow, judge, prompts, [asked] * count if isinstance(asked, str) else asked, seed)
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(method, total=len(groups) * steps, reward="")

            def show(population: Population) -> None:
                reward = float(population.reward.mean())
                text = "" if math.isnan(reward) else f"reward {reward:.4g}"
                progress.update(task, advance=1, reward=text)

            for done, a in enumerate(groups):
                progress.update(task, completed=done * steps)
                chosen = None if prompts is None else prompts[a : a + size]
                questions = asked[a : a + size] if isinstance(asked, list) else asked
                if partial.has(_name(a)):
                    continue
                shared = {**run, "reward_prompts": questions, "position": a}
                result = steer.sample(flow, judge, chosen, callback=show, **guided, **shared)
                plain = steer.sample(flow, judge, chosen, method="none", **shared)
                partial.keep(a, result, plain, _terms(judge, result, chosen, questions))
            progress.update(task, completed=len(groups) * steps)
        result, plain, terms = partial.joined(list(groups), prompts, asked)
        save_result(
            result,
            out,
            overwrite,
            unguided=plain,
            keep=keep,
            terms=_part(terms, "terms/"),
            gradients=_part(terms, "gradients/"),
            files={"config.yaml": _config(settings)},
        )
    finally:
        partial.drop_if_empty()
    partial.drop()
    console.print(
        f"unguided {float(plain.rewards.mean()):.4g}, {method} {float(result.rewards.mean()):.4g} "
        f"(best {float(result.rewards.amax(-1).mean()):.4g}); see {out / 'grid.png'}"
    )
    return out


def _prompts(prompt: str | list[str] | None, file: Path | None) -> list[str] | None:
    if prompt is not None and file is not None:
        raise ValueError("prompt and prompts_file both given: give one of them")
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"no prompts file {file}: give a text file, a prompt a line")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        return [line.strip() for line in lines if line.strip()]
    return [prompt] if isinstance(prompt, str) else prompt


def _picture(file: Path, size: Sequence[int]) -> Tensor:
    """Read a picture on white, cropped to the middle and resized -> (3, h, w) in [0, 1]."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not file.is_file():
        raise FileNotFoundError(f"no init image {file}: give a picture file")
    try:
        picture = Image.open(file).convert("RGBA")
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no picture that can be read: give a PNG or JPEG") from error
    white = Image.new("RGBA", picture.size, "white")
    fitted = ImageOps.fit(
        Image.alpha_composite(white, picture).convert("RGB"), (size[1], size[0]),
        Image.Resampling.BICUBIC,
    )  # fmt: skip
    return to_tensor(fitted)


def _model(
    model: str,
    device: str | None,
    dtype: str | None,
    lora: Path | None = None,
    lora_scale: float | None = None,
) -> steer.FlowMap:
    """Load a model by name, folder or file.py:Name, and adapters on it."""
    kind = None if dtype is None else getattr(torch, dtype)
    if lora is None and lora_scale is not None:
        raise ValueError(
            "lora_scale has nothing to scale: give --lora FOLDER, or leave --lora-scale out"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): give --device "
            "cpu, or cuda where torch sees one"
        ) from error
    file, _, name = model.rpartition(":")
    if file.endswith(".py"):
        from rewards.loading import from_file

        made = from_file(Path(file), name)
        flow = made() if isinstance(made, type) or not isinstance(made, steer.FlowMap) else made
        if not isinstance(flow, steer.FlowMap):
            raise TypeError(f"{model} gives a {type(flow).__name__}: expected a steer.FlowMap")
        flow = flow.to(device=device, dtype=kind)
        flow.name = flow.name or model
    else:
        flow = steer.load(model, device=device, dtype=kind)
    return (
        flow
        if lora is None
        else load_adapters(flow, lora, 1 if lora_scale is None else lora_scale)
    )


def _adapter_files(lora: Path | None) -> list[str]:
    """Name the files that say which adapters a run had."""
    return [] if lora is None else [str(lora / name) for name in (CONFIG, WEIGHTS)]


def _device(flow: steer.FlowMap) -> torch.device:
    some = next(flow.parameters(), None)
    return torch.device("cpu") if some is None else some.device


def _fingerprints(*names: str) -> dict[str, Any]:
    """Return what tells whether the code and the weights are still those of an earlier start.

    Files and folders that the names mention, and the models and rewards that come along.
    """
    words = [w for name in names for w in [name, *re.split(r"[=,+*()]", name)]]
    files = [path for name in names for path in re.findall(r"[^\s:+*=,()]+\.py", name)]
    files += [w.strip() for w in words if w.strip() and Path(w.strip()).is_file()]
    zoos = [Path(package.__file__).with_name("zoo") for package in (steer, rewards)]  # type: ignore[type-var, arg-type]
    folders = [Path(name) for name in names if Path(name).is_dir()] + zoos
    files += [str(p) for f in folders for p in sorted(f.rglob("*.safetensors"))]
    files += [str(p) for f in folders for p in sorted(f.rglob("*.json"))]
    prints: dict[str, Any] = {"flowsteer": steer.__version__, "torch": str(torch.__version__)}
    for file in dict.fromkeys(files):
        if Path(file).is_file():
            prints[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return prints


def _terms(
    reward: steer.Reward, result: Result, prompts: list[str] | None, asked: str | list[str] | None
) -> dict[str, Tensor]:
    """Score each term of a composed reward by itself, and take its share of the gradient.

    `terms/NAME` is in the term's own units, `gradients/NAME` a norm a picture.
    """
    if result.images is None:
        return {}
    questions = prompts if asked is None else asked
    questions = [questions] if isinstance(questions, str) else questions
    images = result.images.flatten(0, -4)
    rows = None if questions is None else flat_prompts(questions, len(images))
    scores, gradients = dissect(reward, images, rows)
    found = {f"terms/{k}": v for k, v in scores.items()}
    found |= {f"gradients/{k}": v for k, v in gradients.items()}
    return {name: s.reshape(result.rewards.shape) for name, s in found.items()}


def _config(settings: dict[str, Any]) -> str:
    """Return the settings as YAML that `--config` takes again, under a comment with versions."""
    versions = f"flowsteer {steer.__version__}, torch {torch.__version__}"
    header = f"# made by: {versions}, Python {platform.python_version()}\n"
    kept = {k: v for k, v in settings.items() if v is not None}
    return header + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


class _Groups(Partial):
    """The finished groups of prompts of an unfinished run."""

    def keep(self, group: int, result: Result, plain: Result, terms: dict[str, Tensor]) -> None:
        """Add a group's results, guided and unguided."""
        tensors: dict[str, Tensor] = dict(terms)
        notes: dict[str, Any] = {}
        for kind, r in (("guided", result), ("plain", plain)):
            for f in fields(r):
                value = getattr(r, f.name)
                if isinstance(value, Tensor):
                    tensors[f"{kind}/{f.name}"] = value
                elif f.name == "trace":
                    tensors |= {f"{kind}/trace/{k}": v for k, v in value.items()}
                else:
                    notes[f"{kind}/{f.name}"] = value
        self.add(_name(group), tensors, notes)

    def joined(
        self, groups: list[int], prompts: list[str] | None, asked: str | list[str] | None
    ) -> tuple[Result, Result, dict[str, Tensor]]:
        """Put all groups together again."""
        units = [self.read(_name(group)) for group in groups]
        parts, notes = [tensors for tensors, _ in units], [n for _, n in units]
        join: Callable[[str], Tensor] = lambda k: (  # noqa: E731
            joined_trace if "/trace/" in k else torch.cat
        )([part[k] for part in parts])
        whole = {k: parts[0][k] if prompts is None else join(k) for k in parts[0]}
        made = []
        for kind in ("guided", "plain"):
            values: dict[str, Any] = {
                k.removeprefix(f"{kind}/"): v
                for k, v in notes[0].items()
                if k.startswith(f"{kind}/")
            }
            costs = [{"nfe": n[f"{kind}/nfe"], **n[f"{kind}/costs"]} for n in notes]
            sizes = [part[f"{kind}/rewards"].numel() for part in parts]
            mean = {
                k: sum(size * c[k] for size, c in zip(sizes, costs, strict=True)) / sum(sizes)
                for k in costs[0]
            }
            values["nfe"] = mean.pop("nfe")
            values["costs"] = mean | {"seconds": sum(c["seconds"] for c in costs)}
            values["prompts"], values["reward_prompts"] = prompts, asked
            values["trace"] = {}
            for k, v in whole.items():
                head, _, name = k.removeprefix(f"{kind}/").partition("/")
                if k.startswith(f"{kind}/trace/"):
                    values["trace"][name] = v
                elif k.startswith(f"{kind}/"):
                    values[head] = v
            made.append(Result(**values))
        kinds = ("terms/", "gradients/")
        return made[0], made[1], {k: v for k, v in whole.items() if k.startswith(kinds)}


def _part(named: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {k.removeprefix(kind): v for k, v in named.items() if k.startswith(kind)}


def _name(group: int) -> str:
    return f"{group:06d}"
