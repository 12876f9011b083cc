"""Plans against a device: peak memory and time of guided and tuning steps of real sizes.

Models are made from their configurations with random weights, so nothing is downloaded; text
encoders are left out, of the plan too. A row of the table is a model, checkpointed or not:

- the peak of a guided step (velocity of `Sde`, lookahead, decoder, reward, gradient) at each
  number of rows, over `steer.plan`'s: `torch.cuda.max_memory_allocated` on CUDA, that of live
  tensors on a CPU. The bar: within 15 %.
- the time of a guided step over that of its calls by hand: the median of interleaved pairs. The
  bar: 1.05.
- the peak of a tuning step (`direct` of one jump, rank 16) at one row, over the plan's.
- with `--measure compile`: the time of a guided step with compiled blocks over one without,
  the median of interleaved pairs, and the seconds of the first compiled step.

A model that does not fit is reported, and the next one is measured. Plans take most of the time
and need no device: `--write` computes them on any machine, and `--plans` reads them.

    python -m benchmarks.card --models sd15 sdxl --rows 1 2 --checkpointing
    python -m benchmarks.card --models sd3-medium --measure time compile
    python -m benchmarks.card --checkpointing --write plans.json
    python -m benchmarks.card --checkpointing --plans plans.json
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import steer
from benchmarks.step import bare
from recipes.figures import markdown
from steer.adapters.compiling import compile_blocks
from steer.adapters.inject import adapt
from steer.devices import differentiating
from steer.noise import Draws, Noise, noise_dtype
from steer.objectives.batch import Batch
from steer.objectives.table import build
from steer.planning.live import Live
from steer.planning.report import gib
from steer.planning.subject import outlined_flow
from steer.reward import Reward, wrap

__all__ = ["bound", "compiled", "guided", "measured", "planned", "ratio", "tuned"]

MEASURES = ("memory", "time", "compile")
MODELS = ("sd15", "sdxl", "sd3-medium", "flux3-klein", "sana-sprint-0.6b")
RANK = 16
JUMP = {"jumps": [1]}


def red(images: Tensor) -> Tensor:
    """Return how red pictures (n, 3, h, w) are, (n,)."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def bound(model: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """Return a model with random weights on a device, a prompt of the usual length bound.

    Args:
        model: what `steer.plan` takes of pipelines.
        device: the target device.
        dtype: dtype of the weights.
        **options: options of `steer.load`, and height, width and text_tokens.
    """
    size = options.pop("height", None), options.pop("width", None)
    tokens = options.pop("text_tokens", None)
    flow, condition, _, _ = outlined_flow(model, size, dtype, tokens, device, options)
    prompt, negative = (
        tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, part)
        for part in (condition.prompt, condition.negative)
    )
    return flow.bound_to([dataclasses.replace(condition, prompt=prompt, negative=negative)])


@contextlib.contextmanager
def peak(flow: Any, *held: torch.nn.Module) -> Iterator[Callable[[], int]]:
    """Measure the peak of bytes in this context, with those of the flow and `held` modules."""
    device = next(flow.parameters()).device
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
    else:
        with Live().hold(flow.network, flow.vae, *held) as live:
            yield lambda: live.peak


def _guide(flow: Any, reward: Reward) -> steer.Guidance:
    potential = steer.Lookahead(flow, reward, temperature=0.05)
    return steer.Guidance(potential, steer.Sde(flow), steer.Continuous(), scale=1.0)


def guided(flow: Any, reward: Reward, rows: int) -> int:
    """Return the peak of two guided steps of `rows` rows in one call, in bytes."""
    with peak(flow) as found:
        run = _guide(flow, reward).steps(_start(flow, rows), 0)
        next(run), next(run)
        run.close()
        return found()


def _start(flow: Any, rows: int) -> Tensor:
    device = next(flow.parameters()).device
    return Noise(0, particles=rows).normal(flow.event_shape).to(device)


def ratio(flow: Any, reward: Reward, repeats: int) -> float:
    """Return the median ratio of the time of a guided step to that of its bare calls."""
    clock, found = _clock(flow), []
    guide = _guide(flow, reward)
    for seed in range(repeats):
        run = guide.steps(_start(flow, 1), seed)
        next(run)
        for t in guide.times[2:4]:
            begun = clock()
            population = next(run)
            middle = clock()
            bare(flow, reward, population.x, float(t))
            found.append((middle - begun) / (clock() - middle))
        run.close()
    return statistics.median(found[1:])  # the first call compiles kernels


def compiled(flow: Any, reward: Reward, repeats: int, rows: int = 1) -> tuple[float, float]:
    """Compile the flow's blocks; return a step's time over that without, and the first's seconds.

    Args:
        flow: a flow; its blocks stay compiled.
        reward: the reward.
        repeats: runs, of six interleaved pairs each; the first one is a warm-up.
        rows: rows of a step.
    """
    clock, guide, found, first = _clock(flow), _guide(flow, reward), [], 0.0
    compile_blocks(flow)
    for seed in range(repeats + 1):
        run = guide.steps(_start(flow, rows), seed)
        begun = clock()
        next(run)
        first = first or clock() - begun
        for _ in range(6):
            begun = clock()
            next(run)
            middle = clock()
            with torch.compiler.set_stance("force_eager"):
                next(run)
            found.append((middle - begun) / (clock() - middle))
        run.close()
    return statistics.median(found[6:]), first


def _clock(flow: Any) -> Callable[[], float]:
    device = next(flow.parameters()).device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def tuned(flow: Any, reward: Reward, rows: int = 1) -> int:
    """Return the peak of two optimizer steps of `direct` with adapters of rank 16, in bytes."""
    student = adapt(flow, rank=RANK)
    student.add("average")
    parameters = list(student.adapters().values())
    for p in parameters:
        p.requires_grad_(True)
    objective, device = build("direct", JUMP), next(flow.parameters()).device
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    with peak(flow, student) as found:
        for step in range(2):
            draws = Draws(0, step, (0, rows), device=device, dtype=noise_dtype(flow))
            batch = Batch(
                student, student.base, student.at(1.0, "average"), reward, 1.0, draws, None, None,
                student.base,
            )  # fmt: skip
            with differentiating():
                with _mixed(flow):
                    loss = objective(batch)["loss"]
                loss.backward()  # where checkpointed blocks choose their attention again
            optimizer.step()
            optimizer.zero_grad()
        return found()


def _mixed(flow: Any) -> AbstractContextManager[Any]:
    """Return the precision of a tuning run: mixed precision for weights in half precision."""
    p = next(flow.parameters())
    half = p.dtype == torch.bfloat16
    return torch.autocast(p.device.type, p.dtype) if half else contextlib.nullcontext()


def _dtype(cuda: bool) -> torch.dtype:
    return torch.bfloat16 if cuda else torch.float32


def planned(model: Any, cuda: bool, rows: list[int], **options: Any) -> dict[str, Any]:
    """Return the planned peaks of a row of the table, without text encoders, in bytes by name."""
    plan = steer.plan(
        model, wrap(red), dtype=_dtype(cuda), cuda=cuda, levers=False, method="fmtt",
        objective=build("direct", JUMP), rank=RANK, **options,
    )  # fmt: skip
    texts = sum(w for name, w in plan.weights.items() if name.startswith("text_encoder"))
    found = {f"guided, {n} rows": plan.guided.at(n) - texts for n in rows}
    if plan.tuning is not None:
        found["tuning, 1 row"] = plan.tuning.at(1) - texts
    return {"model": plan.model, "checkpointing": options.get("checkpointing")} | found


def measured(
    model: Any,
    device: torch.device,
    rows: list[int],
    repeats: int,
    plan: dict[str, Any] | None = None,
    measure: Collection[str] = MEASURES[:2],
    **options: Any,
) -> dict[str, Any]:
    """Return a row of the table: figures by name, or "said" if the model does not fit.

    Args:
        model: what `steer.plan` takes of pipelines.
        device: where.
        rows: numbers of rows of a guided step.
        repeats: of the timing.
        plan: what `planned` returned. Default: computed.
        measure: which of `MEASURES`.
        **options: options of `steer.load`, and height, width and text_tokens.
    """
    cuda, reward = device.type == "cuda", wrap(red)
    if plan is None and "memory" in measure:
        plan = planned(model, cuda, rows, **options)
    made: dict[str, Any] = {"model": str(model), "checkpointing": options.get("checkpointing")}
    try:
        flow = bound(model, device, _dtype(cuda), **options)
        if plan is not None and "memory" in measure:
            made["model"] = plan["model"]
            for n in rows:
                made[f"guided, {n} rows"] = [guided(flow, reward, n), plan[f"guided, {n} rows"]]
            if "tuning, 1 row" in plan:
                made["tuning, 1 row"] = [tuned(flow, reward), plan["tuning, 1 row"]]
        if "time" in measure:
            made["step / hand"] = ratio(flow, reward, repeats)
        if "compile" in measure:
            made["compiled / eager"], made["first compiled, s"] = compiled(flow, reward, repeats)
    except torch.OutOfMemoryError as trouble:
        made["said"] = str(trouble).splitlines()[0]
    return made


def _cell(value: Any) -> str:
    if isinstance(value, list):
        found, planned = value
        return f"{gib(found)} / {gib(planned)} ({found / planned - 1:+.1%})"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure, and print a table, with one line of JSON per model as it is finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="measure with it as well")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES[:2]))
    parser.add_argument("--write", type=Path, help="only compute plans for CUDA, into this file")
    parser.add_argument("--plans", type=Path, help="read plans from this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, table, plans = torch.device(args.device), [], {}
    if args.plans:
        plans = {(p["model"], p["checkpointing"]): p for p in json.loads(args.plans.read_text())}
    for model in args.models:
        for checkpointing in (False, True) if args.checkpointing else (False,):
            if args.write:
                found = planned(model, True, args.rows, checkpointing=checkpointing)
            else:
                found = measured(
                    model, device, args.rows, args.repeats, plans.get((model, checkpointing)),
                    args.measure, checkpointing=checkpointing,
                )  # fmt: skip
            print(json.dumps(found), flush=True)
            table.append(found)
            gc.collect()
    if args.write:
        args.write.write_text(json.dumps(table, indent=1) + "\n")
        return
    columns = list(dict.fromkeys(name for row in table for name in row))
    print(markdown(columns, [[_cell(row.get(c, "")) for c in columns] for row in table]))


if __name__ == "__main__":
    main()
