"""`steer compare`: methods x prompts x seeds at equal network calls, and a held-out judge."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import rewards
import steer
from recipes.commands import ENTRIES
from recipes.compare_report import Measured, kind, write
from recipes.compare_tune import grid_of, kept_in, tuning_prompts_beside
from recipes.compare_tune import tune as tune_entries
from recipes.crew import Spread, crew_of
from recipes.data import emoji
from recipes.defaults import compared_prompts, judge_of, listed, own, reward_of
from recipes.entries import Entry, entry, equal_calls, finals, paid
from recipes.exact_tilt import exact_tilts
from recipes.identity import adapter_files, config_text, fingerprints, settings_of
from recipes.inputs import Asked, Dtype, asked_for, load_model, model_name, weights_of
from recipes.measure import found
from recipes.methods import check, learn, method
from recipes.partial import Partial, Unit, free_or_finished, is_finished, units_of
from recipes.terminal import console, say
from rewards.judge import EMBEDDED, Judge
from steer.exact import GaussianMixture
from steer.files import whole_folder
from steer.flow import device_of, flat_prompts
from steer.reward import Reward, plain, score
from steer.secrets import redacted
from steer.tuning.statistics import features_of, pooled_pixels

__all__ = ["ENTRIES", "compare"]

BATCH = 64  # rows of a unit


@plain(dtype=torch.float32)
def compare(
    model: str = "emoji",
    lora: Path | None = None,
    lora_scale: float | None = None,
    reward: str | None = None,
    judge: str | None = "own",
    prompts: str | list[str] | None = None,
    prompts_file: Path | None = None,
    methods: str | list[str] | None = None,
    seeds: int = 3,
    tune: str | None = None,
    by: Literal["judge", "reward"] = "judge",
    tune_prompts: list[str] | None = None,
    device: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    spread: Spread | None = None,
    dtype: Dtype | None = None,
    out: Path = Path("outputs/compare"),
    overwrite: bool = False,
    model_options: dict[str, Any] = {},  # noqa: B006
) -> Path:
    """Compare sampling methods at equal network calls, by the reward and by a held-out judge.

    The folder holds table.md, figures.json (each prompt and seed), plots, sheet.png,
    pictures.safetensors and config.yaml; of a model that decodes to no pictures, a mixture,
    samples.safetensors and no sheet; of a steer.GaussianMixture also the exact tilt's own curve.
    It is written atomically; an interrupted comparison resumes when the same command is given
    again.

    Args:
        model: a name that `steer models` lists, a folder, a hub id, or file.py:Name; in Python
            also a flow map or a pipeline object.
        lora: a folder of adapters that were made for this model.
        lora_scale: factor for the adapters' update (default 1); 0 is the model without them.
        reward: a name that `steer rewards` lists, a weighted sum of names, or file.py:Name.
            Default: the model's own, clip for emoji.
        judge: the held-out reward: "own", the model's if it has one;
            "embedded", that of emoji; the folder of a judge, a reward by name, or null for none.
            It is measured and never optimised. Its features are used for the diversity; without a
            judge averaged pixels are used.
        prompts: the prompts. Default: the model's own; for emoji 25 prompts that name a concept
            and 25 broad ones; none for a model without prompts.
        prompts_file: instead of prompts: a text file with one prompt per line, or a jsonl file.
        methods: a list of `method:key=value,...`, with steps (none, best-of-n: default 4; the
            others: 16), particles (default 4), temperature or strength, and the method's own
            options. best-of-n without particles gets one row for each guided method, with as
            many candidates as the same number of network calls allows. keep=all takes every
            particle for a picture, resampled by the weights, instead of the one with the
            highest reward: it compares the laws that methods sample from. Your own method is
            file.py:Name, a kernel or a builder of a sampler (docs/extend.md), with options
            after a colon. Default: none, best-of-n, fmrg-j, reno.
        seeds: pictures per prompt, from seed 0 on.
        tune: one or two numbers of the methods, as 'scale=0.1,0.3,1; steps=8,16': each method with
            these options gets the values that are best on up to 12 other prompts, never on the
            reported ones. All tried values are written to tuning.json.
        by: how the best values are chosen: by the mean of the judge, or of the reward.
        tune_prompts: prompts for choosing the values. Default: the model's own prompts for tuning.
        device: device to compute on. Default: where the model is loaded, the CPU; for several
            processes the available accelerators, so give cpu for processes on the CPU.
        devices: processes on each machine, one per device; see spread for how they divide the
            work.
        num_nodes: number of machines, with a shared file system; SLURM or torchrun starts the
            processes.
        spread: how several processes divide the work: by prompts, or by the particles of each
            prompt, with weights and resampling over all processes. Default: particles if there are
            fewer units of prompts than processes, else prompts.
        dtype: precision of the network. Default: float32 on a CPU.
        out: the folder.
        overwrite: replace the folder if it exists, and delete an interrupted comparison.
        model_options: options for a diffusers pipeline: height, width, cfg, guidance,
            negative_prompt, checkpointing, call and the others of `steer.load`.

    Returns:
        The folder.
    """
    live, model = model, model_name(model)
    settings = settings_of({k: v for k, v in locals().items() if k != "live"})
    crew = crew_of(devices, num_nodes, device)
    device = crew.device or device
    screen, out = console(), crew.told(lambda: free_or_finished(out, overwrite))
    given = asked_for(prompts, prompts_file)
    reward = reward_of(model, reward)
    settings["reward"] = redacted(reward)
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    texts = ENTRIES if methods is None else methods
    entries = [entry(text) for text in ([texts] if isinstance(texts, str) else texts)]
    if not entries:
        raise ValueError("the list of methods is empty: give at least one, or leave it out")
    flow = load_model(live, device, dtype, lora, lora_scale, model_options)
    asked = compared_prompts(model, flow, given)
    scorer = rewards.load(reward).to(device_of(flow))
    for one in entries:
        check(
            flow, scorer, asked.prompts, particles=one.particles or 1, steps=one.steps,
            method=method(one.method), reward_prompts=asked.reward_prompts, **one.options,
        )  # fmt: skip
    scale = judge_of(model, judge, screen)
    if tune is not None and by == "judge" and scale is None:
        raise ValueError("tuning by the judge needs a judge: give --judge, or --by reward")
    learn(flow, scorer, asked.prompts, asked.reward_prompts)
    differentiable = scorer.differentiable
    tried: list[dict[str, Any]] = []
    identity = {
        "prompts": asked._asdict(),
        "files": fingerprints(
            model,
            reward,
            judge or "",
            str(EMBEDDED),
            *adapter_files(lora),
            *(e.method for e in entries),
        )
        | weights_of(live, flow),
        "settings": {k: v for k, v in settings.items() if k != "overwrite"},
    }
    if crew.told(lambda: is_finished(out, identity, overwrite)):
        screen.print(f"{out} is finished: see table.md in it, or give --overwrite to run it again")
        return out
    with Partial(out, identity, overwrite, screen, crew) as partial:
        if tune is not None:
            pool = tune_prompts or (listed(model, None, own(model).tuned).prompts or [])
            beside = tuning_prompts_beside(asked.prompts or [], pool)
            measure = kept_in(partial, _Bench(flow, scorer, scale, beside).run, crew)
            entries, tried = tune_entries(
                entries, grid_of(tune), by, measure, len(beside.prompts),
                screen.print if crew.first else lambda line: None,
            )  # fmt: skip
        rows = equal_calls(entries, differentiable, flow)
        bench = _Bench(flow, scorer, scale, asked)
        units = units_of(rows, len(asked.prompts), range(seeds), _size)
        crew.spread(spread, len(units), max(row.particles or 1 for row in rows))
        work = {u.name: (u.end - u.start) * u.row.calls(differentiable, flow) for u in units}
        kinds = [kind(p) if bench.words else "all" for p in asked.prompts]
        screen.print(
            f"{len(rows)} methods x {len(asked.prompts)} prompts x {seeds} seeds: "
            f"{sum(work.values())} network calls{partial.done(units, work)}"
        )
        partial.fill(units, work, bench.run, screen, crew)
        if not crew.first:
            return out
        gathered = []
        for i in range(len(rows)):
            tensors, costs = partial.gathered([u for u in units if u.index == i])
            gathered.append(Measured(tensors, **costs))
        tilts = bench.tilts(rows)
        with whole_folder(out, overwrite) as scratch:
            write(scratch, rows, asked.prompts, kinds, gathered, settings["reward"], tilts)
            (scratch / "config.yaml").write_text(config_text(settings, identity), encoding="utf-8")
            if tried:
                (scratch / "tuning.json").write_text(json.dumps(tried, indent=1))
        partial.drop()
    say((out / "table.md").read_text(encoding="utf-8"))
    return out


def _size(row: Entry) -> int:
    """Return the number of prompts per unit, as many as fill a batch."""
    assert row.particles is not None
    return max(1, BATCH // row.particles)


class _Bench:
    """Samples and measures the units.

    Args:
        flow: the model.
        reward: the reward that guides.
        judge: the held-out reward, if there is one.
        asked: the prompts.

    Attributes:
        words: whether the judge knows the labels of emoji, and can choose one of 100.
    """

    def __init__(
        self, flow: steer.FlowMap, reward: Reward, judge: Reward | None, asked: Asked
    ) -> None:
        self.flow, self.reward, self.asked = flow, reward, asked
        self.judge = None if judge is None else judge.to(device_of(flow))
        self.features = features_of(judge)
        self.words = isinstance(judge, Judge) and judge.embedded

    def run(self, unit: Unit[Entry]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Sample and judge a unit -> images (p, k, 3, h, w), scores (p, k, ...), and its cost.

        For a model that does not decode to pictures, samples (p, k, *event) instead of images.

        k is 1 for the particle with the highest reward, or the number of particles if each is a
        final picture.
        """
        with plain(*(m for m in (self.flow, self.judge) if m is not None)), torch.no_grad():
            return self._run(unit)

    def tilts(self, rows: Sequence[Entry]) -> list[dict[str, Any]]:
        """Return the exact tilts of a mixture, also at the rows' temperatures; else nothing."""
        if not isinstance(self.flow, GaussianMixture) or len(self.asked.prompts) != 1:
            return []
        with plain(*(m for m in (self.flow, self.judge) if m is not None)), torch.no_grad():
            own = [row.options.get("temperature") for row in rows]
            return exact_tilts(self.flow, self.reward, self._measure, [t for t in own if t])

    def _measure(self, samples: Tensor) -> dict[str, Tensor]:
        """Return the scores and features of samples of a single prompt."""
        texts = self.asked.questions * len(samples)
        measured = {
            "reward": score(self.reward, samples, texts),
            "features": self._features(samples),
        }
        if self.judge is not None:
            measured["judge"] = score(self.judge, samples, texts)
        return measured

    def _features(self, samples: Tensor) -> Tensor:
        """Return the features of samples that are not pictures, (n, f)."""
        return samples.flatten(1) if self.features is pooled_pixels else self.features(samples)

    def _run(self, unit: Unit[Entry]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        row, asked = unit.row, self.asked.part(unit.start, unit.end)
        assert row.particles is not None
        result = steer.sample(
            self.flow, self.reward, asked.prompts, row.particles, row.steps,
            method(row.method), seed=unit.seed, position=unit.start,
            reward_prompts=asked.reward_prompts, progress=False, **row.options,
        )  # fmt: skip
        n = len(asked.prompts)
        made, scores = finals(row, result, unit.seed)
        k = made.shape[1]
        flat = made.flatten(0, 1)
        if result.images is None:
            flat = self.flow.decode(flat)
            features = self._features(flat)
            tensors = {"samples": made.clone()}  # features may be a view of the samples
        else:
            features, tensors = self.features(flat), {"images": made}
        tensors |= {"reward": scores, "features": features.reshape(n, k, -1)}
        if self.judge is not None:
            texts = flat_prompts(asked.questions, n * k)
            tensors["judge"] = score(self.judge, flat, texts).reshape(n, k)
        if self.words:
            tensors["top1"] = self._top1(made, asked.questions, unit.seed)
        seconds = result.costs["seconds"] / (n * k)
        notes = {"nfe": paid(row, result), "seconds": seconds}
        return {name: t.float() for name, t in tensors.items()}, notes

    def _top1(self, images: Tensor, texts: Sequence[str], seed: int) -> Tensor:
        """Return whether a picture's own label scores highest of 100 labels; NaN without one."""
        assert isinstance(self.judge, Judge)
        labels = emoji.load().concepts
        made = []
        for few, text in zip(images, texts, strict=True):
            if kind(text) == "broad" or text not in labels:
                made.append(torch.full((len(few),), torch.nan, device=images.device))
            else:
                names = [text] * len(few)
                made.append(found(self.judge, few, names, labels, seed=seed).float())
        return torch.stack(made)
