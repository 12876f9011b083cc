"""`steer sample`: guided sampling into a run folder, resumable over prompts."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

import rewards
import steer
from recipes import films, groups
from recipes.crew import Crew, Spread, crew_of
from recipes.defaults import reward_of
from recipes.identity import adapter_files, config_text, fingerprints, settings_of
from recipes.inputs import Dtype, asked_for, load_model, read_picture
from recipes.methods import PROBES, check, learn, plan, tempered
from recipes.methods import method as method_
from recipes.mixing import mixed, pixels
from recipes.partial import Partial, is_finished
from recipes.planned import say_memory
from recipes.terminal import console, progress
from steer.batches import Ceiling
from steer.files import expanded
from steer.flow import device_of
from steer.guidance.population import Population, seen_mean
from steer.sampling.methods import default_method
from steer.sampling.result import save_result
from steer.secrets import redacted

__all__ = ["sample"]

ROWS = 64  # rows of a group of prompts


def sample(
    model: str = "emoji",
    lora: Path | None = None,
    lora_scale: float | None = None,
    reward: str | None = None,
    prompt: str | list[str] | None = None,
    prompts_file: Path | None = None,
    reward_prompt: str | list[str] | None = None,
    particles: int = 4,
    steps: int = 16,
    method: str | None = None,
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
    churn: float | None = None,
    noise: float | None = None,
    options: dict[str, Any] = {},  # noqa: B006
    cfg: float | None = None,
    negative_prompt: str | None = None,
    init_image: Path | None = None,
    init_time: float | None = None,
    init_by: Literal["noise", "inversion"] = "noise",
    on_bad_reward: Literal["stop", "drop"] = "stop",
    target: float | None = None,
    budget: float | None = None,
    unguided: bool = True,
    keep: Literal["best", "all"] = "all",
    film: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    spread: Spread | None = None,
    dtype: Dtype | None = None,
    compile: bool | str = False,
    out: Path = Path("outputs/sample"),
    overwrite: bool = False,
    model_options: dict[str, Any] = {},  # noqa: B006
) -> Path:
    """Sample pictures that a reward likes, and write them to a run folder.

    The folder holds config.yaml, images/, grid.png (unguided beside guided, same seeds; with
    adapters the base's as well), scores.jsonl and metrics.json. It is written atomically; an
    interrupted run resumes when the same command is given again, and a finished run is not
    changed.

    Args:
        model: a name that `steer models` lists, a folder, a hub id, or file.py:Name.
        lora: a folder of adapters that were made for this model.
        lora_scale: factor for the adapters' update (default 1); 0 is the model without them.
        reward: a name that `steer rewards` lists, a weighted sum of names, or file.py:Name.
            Default: the model's own, clip for emoji.
        prompt: the prompt, or a list of prompts.
        prompts_file: instead of prompts: a text file with one prompt per line, or a jsonl file.
        reward_prompt: prompt for the reward, if it differs from the model's prompt.
        particles: pictures per prompt.
        steps: steps from noise to picture.
        method: a name that `steer methods` lists, or file.py:Name, a kernel or a builder of a
            sampler (docs/extend.md). Default: fmrg-j (gradient ascent); best-of-n if the reward
            has no gradient; renoise (exact) if a temperature or a strength is given.
        temperature: what the reward is divided by, in its units; a lower temperature means
            stronger guidance.
        strength: instead of a temperature: the standard deviation of the reward divided by this
            number is the temperature (default 3).
        scale: guidance scale: how far the gradient shifts the proposal (fmtt, denoiser, naive;
            default 1), or the length of the gradient step relative to the velocity (fmrg-j;
            default 0.3).
        threshold: resample if the effective sample size is below this fraction of the particles
            (default 0.5).
        moves: Langevin moves per step (split; default 1).
        rate: length of an ascent step relative to the norm of the noise (reno; default 0.15).
        brake: stop guiding a picture when the reward of its lookahead has reached this (fmrg-j,
            reno).
        lookahead: number of jumps in a lookahead (fmtt, split, fmrg-j; default 1).
        jumps: number of jumps to the picture that is optimised (reno; default 1).
        finish: number of jumps to the picture that is returned (reno; default: as jumps).
        window: first and last time at which the gradient is used; [0, 1] is always.
        every: use the gradient every so many steps (default 1).
        clip: largest norm of the potential's gradient, per row.
        normalise: rescale the gradient of every row to this norm.
        settle: end with a jump instead of a noisy step (fmtt, denoiser, naive; default true).
        churn: how far a jump goes beyond the next time before it is re-noised, as a fraction of
            the way to 1 (none, best-of-n; default: the model's own).
        noise: factor for the noise 1 - t of the SDE (fmtt, denoiser, naive; default 1).
        options: the method's other options, as '{move: pcn, fresh: 0.2}': docs/methods.md.
        cfg: scale of classifier-free guidance mixed at run time, in addition to any guidance that
            is built into the model; for a diffusers pipeline its own guidance scale. It doubles
            the network calls.
        negative_prompt: negative prompt for cfg. Default: the empty prompt.
        init_image: a picture file to start from.
        init_time: time at which such a run starts: 0 is pure noise, near 1 little changes (default
            0.5).
        init_by: noise: add the noise of init_time to the picture; inversion: go back along the
            model's ODE, so that an unguided run reproduces the picture (for edits).
        on_bad_reward: what to do if a reward is not finite: stop, or drop the particle (its weight
            is zero from then on); metrics.json has the number of dropped particles.
        target: stop as soon as the best lookahead of every prompt has this reward.
        budget: stop before a particle has cost more network calls than this.
        unguided: also sample the same seeds without guidance, and without adapters if there are
            any, for comparison; each costs `steps` network calls per picture.
        keep: write all pictures of a prompt, or only the best.
        film: also write the lookaheads of the first four particles of the first prompt:
            filmstrip.png (those of the best particle, from left to right), film.gif, and film.mp4
            if PyAV is installed (the extra video).
        seed: seed of all random numbers.
        batch_size: maximum number of pictures in one network call; a smaller number needs less
            memory and gives the same pictures (default 64).
        device: device to compute on. Default: where the model is loaded, the CPU; for several
            processes the available accelerators, so give cpu for processes on the CPU.
        devices: processes on each machine, one per device; see spread for how they divide the
            work.
        num_nodes: number of machines, with a shared file system; SLURM or torchrun starts the
            processes.
        spread: how several processes divide the work: by prompts, or by the particles of each
            prompt, with weights and resampling over all processes. Default: particles if there are
            fewer prompts than processes, else prompts.
        dtype: precision of the network. Default: float32 on a CPU.
        compile: compile the blocks that the network repeats (torch.compile), or the name of
            torch's backend for it; the first calls take longer.
        out: the run folder.
        overwrite: replace the run folder if it exists, and delete an interrupted run.
        model_options: options for a diffusers pipeline: height, width, cfg, guidance,
            negative_prompt, checkpointing, call and the others of `steer.load`.

    Returns:
        The run folder.
    """
    settings = settings_of(locals())
    crew = crew_of(devices, num_nodes, device)
    device = crew.device or device
    if method is None:
        tilted = temperature is not None or strength is not None
        found = rewards.load(reward_of(model, reward))
        method = settings["method"] = default_method(found.differentiable, tilted)
        console().print(f"method {method}, the default here: see docs/methods.md")
    chosen_method = method_(method)  # the name is valid
    if not tempered(method) and (temperature is not None or strength is not None):
        others = ", ".join(name for name in steer.METHODS if tempered(name))
        raise ValueError(
            f"method {method!r} has no temperature: leave temperature and strength out, or take "
            f"one of {others}"
        )
    screen = console()
    listed = asked_for(prompt, prompts_file)
    prompts, asked = (None, reward_prompt) if listed is None else (listed.prompts, reward_prompt)
    if listed is not None and listed.reward_prompts is not None:
        if reward_prompt is not None:
            raise ValueError(
                f"{prompts_file} has prompts for the reward, and so has reward_prompt: leave one "
                "of them out"
            )
        asked = listed.reward_prompts
    reward = reward_of(model, reward)
    settings["reward"] = redacted(reward)
    pictures = [] if init_image is None else [str(init_image)]
    identity = {
        "prompts": prompts,
        "reward_prompts": asked,
        "files": fingerprints(model, reward, method, *pictures, *adapter_files(lora)),
        "settings": {k: v for k, v in settings.items() if k not in ("overwrite", "batch_size")},
    }
    out = expanded(out)
    if crew.told(lambda: is_finished(out, identity, overwrite)):
        screen.print(f"{out} is finished: see grid.png in it, or give --overwrite to run it again")
        return out
    given = {
        "scale": scale, "threshold": threshold, "moves": moves, "rate": rate, "brake": brake,
        "lookahead": lookahead, "jumps": jumps, "finish": finish, "window": window,
        "every": every, "clip": clip, "normalise": normalise, "settle": settle,
        "churn": churn, "noise": noise,
    }  # fmt: skip
    options = {k: v for k, v in given.items() if v is not None} | options
    count = 1 if prompts is None else len(prompts)
    crew.spread(spread, count, particles)
    rows = particles * count
    say_memory(
        screen, model, reward, device, rows=min(rows, batch_size or ROWS), method=chosen_method,
        method_options=options, dtype=dtype, model_options=model_options, cfg=cfg,
    )  # fmt: skip
    loaded = load_model(model, device, dtype, lora, lora_scale, model_options, compile)
    flow = mixed(loaded, cfg, negative_prompt, prompts)
    twins: dict[str, steer.FlowMap] = {}
    if unguided and isinstance(loaded, steer.Adapted):
        twins["base, unguided"] = mixed(loaded.base, cfg, negative_prompt, prompts)
    if unguided and method != "none":  # without guidance it would be the same run
        twins["tuned, unguided" if twins else "unguided"] = flow
    size = pixels(flow, model)
    judge = rewards.load(reward).to(device_of(flow))
    run: dict[str, Any] = {
        "particles": particles,
        "steps": steps,
        "seed": seed,
        "init_time": init_time,
        "init_by": init_by,
        "on_bad_reward": on_bad_reward,
        "batch_size": batch_size,
    }
    if init_image is not None:
        run["init_image"] = read_picture(init_image, size, "--init-image")
    guided = {"method": chosen_method, "temperature": temperature, "strength": strength, **options}
    guided |= {"target": target, "budget": budget}

    # report every mistake before any work
    check(flow, judge, prompts, **run, **guided, reward_prompts=asked)
    start = 0.0 if init_image is None else 0.5 if init_time is None else init_time
    cost = plan(chosen_method, steps, judge.differentiable, start, flow=flow, **options)
    probes = PROBES if tempered(method) and temperature is None else 0
    calls = cost["nfe"]
    plain_calls = sum(
        plan("none", steps, start=start, flow=twin)["nfe"] for twin in twins.values()
    )
    probe_calls = probes * flow.calls("jump", start, 1.0)
    most = "at most " if target is not None or budget is not None else ""
    compared = f" ({plain_calls} of them unguided, to compare)" if twins else ""
    probed = f" + {count} x {probe_calls} to set the temperature" if probe_calls else ""
    screen.print(
        f"{most}{count} prompt{'s' * (count > 1)} x {particles} particles x "
        f"{calls + plain_calls} NFE{compared}{probed} = "
        f"{count * (particles * (calls + plain_calls) + probe_calls)} network "
        f"calls, {count * (particles * (cost['reward_calls'] + len(twins)) + probes)} reward calls"
    )
    # once, from the whole list: the scale must not depend on which prompts are still to be sampled
    learn(flow, judge, prompts, [asked] * count if isinstance(asked, str) else asked, seed)

    def draw(partial: Partial, first: int, last: int, show: Callable[[Population], None]) -> None:
        chosen = None if prompts is None else prompts[first:last]
        questions = asked[first:last] if isinstance(asked, list) else asked
        shared = {**run, "reward_prompts": questions, "position": first, "progress": False}
        reel = films.Reel(film and first == 0, chosen)
        watch = reel.of("guided", flow, show)
        with crew.joint():
            result = steer.sample(flow, judge, chosen, callback=watch, **guided, **shared)
            others = {
                title: steer.sample(
                    twin, judge, chosen, method="none", callback=reel.of(title, twin), **shared
                )
                for title, twin in twins.items()
            }
        reel.keep(partial)
        terms = groups.terms_of(judge, result, chosen, questions)
        groups.keep(partial, first, {"guided": result, **others}, terms)

    parts = 1 if crew.together else crew.count
    places = range(0, count, min(max(1, ROWS // particles), -(-count // parts)))
    with Partial(out, identity, overwrite, screen, crew) as partial, Ceiling().held():
        turn = 1 if target is not None else max(1, (batch_size or ROWS) // particles)
        work = {p: steps * -(-min(places.step, count - p) // turn) for p in places}
        _fill(partial, places, work, method, draw, screen, crew)
        if not crew.first:
            return out
        titles = ["guided", *twins]
        results, shares = groups.join(partial, places, titles, prompts, asked)
        result = results.pop("guided")
        save_result(
            result,
            out,
            overwrite,
            beside=results,
            keep=keep,
            **shares,  # type: ignore[arg-type]
            files={"config.yaml": config_text(settings, identity)}
            | films.files_of(partial, ["guided", *twins]),
        )
        partial.drop()
    for said in result.warnings:
        screen.print(f"warning: {said}")
    means = "".join(f"{title} {float(seen_mean(r.rewards)):.4g}, " for title, r in results.items())
    screen.print(
        f"{means}{method} {float(seen_mean(result.rewards)):.4g} "
        f"(best {float(result.rewards.amax(-1).mean()):.4g}); see {out / 'grid.png'}"
    )
    return out


def _fill(
    partial: Partial,
    places: range,
    work: Mapping[int, int],
    method: str,
    draw: Callable[[Partial, int, int, Callable[[Population], None]], None],
    screen: Console,
    crew: Crew,
) -> None:
    """Sample the groups that are not finished yet, with a bar of this process's steps."""
    left = crew.told(lambda: [p for p in places if not groups.drawn_before(partial, p)])
    mine = places if crew.count == 1 else crew.share(left)
    with progress(screen, "{task.completed}/{task.total}", "{task.fields[note]}") as bar:
        finished, total = 0, sum(work[first] for first in mine)
        task = bar.add_task(method, total=total, note="")

        def show(population: Population) -> None:
            reward = float(population.reward.mean())
            bar.update(task, advance=1, note="" if math.isnan(reward) else f"reward {reward:.4g}")

        for first in mine:
            bar.update(task, completed=finished)
            finished += work[first]  # a run that stops early makes fewer
            if crew.together or not groups.drawn_before(partial, first):
                draw(partial, first, min(first + places.step, places.stop), show)
        bar.update(task, completed=total)
    if crew.first:
        crew.wait(lambda: all(groups.drawn_before(partial, p) for p in places))
