"""All methods that claim to sample the tilt, on the whole grid of closed forms.

python -m benchmarks.oracles run --out outputs/oracles
python -m benchmarks.oracles table --out outputs/oracles

A cell is a problem, a method and a number of steps. It is a separate file in the folder, written
atomically, so an interrupted run continues where it stopped. Several processes may fill one
folder: a cell is locked while it is computed, and other processes skip it. Its figures, over 32 to
128 populations of 256 particles:

- `Z_hat / Z`, its mean and standard error. The bar: within 4 standard errors of 1, and the error
  at most 3 %; populations are added, 32 at a time, while that can still be reached.
- the root mean square error of `E_q f`, f the two coordinates that the reward sees and the reward
  itself, each over its standard deviation under q, times `sqrt(n)`: 1 for n exact samples. The
  bar: at most 2.

Exact values are computed by quadrature in the plane, because rewards depend on only two
coordinates for any d.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import steer
from recipes.figures import markdown
from steer.files import slug, write_atomically
from steer.lock import locked
from steer.path import step_times
from steer.reward import wrap
from steer.sampling.methods import TABLE

METHODS: dict[str, dict[str, Any]] = {
    "noise-smc": {},
    "split": {},
    "renoise": {},
    "das": {},
    "tds": {},
    "fk-difference": {},
    "noise-smc (pcn)": {"move": "pcn", "moves": 2},
    "fk": {},
    "fk-sum": {},
    "posterior": {"by": "glass"},
}
"""All methods that sample the tilt, with their defaults, and `noise-smc` without gradients."""

STEPS = (10, 25, 50, 100)
RUNS, MOST = 32, 128
Z_BAR, SE_BAR, ERROR_BAR = 4.0, 0.03, 2.0

Score = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """A mixture, a reward over its temperature, and exact values of the tilt.

    Attributes:
        flow: the mixture.
        reward: function of points (n, d): the reward over the temperature, (n,).
        log_z: log Z.
        mean: means of the two coordinates and the reward under the tilt, (3,).
        deviation: their standard deviations, (3,).
        ess: ESS of plain importance sampling, as a fraction of the sample.
        particles: particles of a population.
    """

    flow: steer.GaussianMixture
    reward: Score
    log_z: float
    mean: Tensor
    deviation: Tensor
    ess: float
    particles: int = 256


def mixture(d: int) -> steer.GaussianMixture:
    """Return three modes that differ in the first two coordinates."""
    means = torch.zeros(3, d)
    means[:, :2] = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.2]])
    return steer.GaussianMixture(
        means, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.5, 0.3, 0.2])
    )


def unequal(d: int) -> steer.GaussianMixture:
    """Return two modes at 1 : 1000."""
    means = torch.zeros(2, d)
    means[:, 0] = torch.tensor([-3.0, 3.0])
    return steer.GaussianMixture(means, 0.3, torch.tensor([1000.0, 1.0]))


def known(flow: steer.GaussianMixture, reward: Score, particles: int = 256) -> Problem:
    """Return a problem with its values by the trapezoid rule in the first two coordinates."""
    plane = steer.GaussianMixture(flow.means[:, :2], flow.covariances[:, :2, :2], flow.weights)
    rough = torch.linspace(-9, 9, 361, dtype=torch.float64)
    x = torch.cartesian_prod(rough, rough)
    log_q = plane.log_prob(x) + reward(x)
    held = x[log_q > log_q.max() - 40]  # all points with at least e^-40 of the maximum density
    (a, b), (c, d) = ((float(v.min()) - 0.05, float(v.max()) + 0.05) for v in held.T)
    sides = [torch.linspace(*ends, 1601, dtype=torch.float64) for ends in ((a, b), (c, d))]
    x = torch.cartesian_prod(*sides)
    log_p, r = plane.log_prob(x), reward(x)
    area = math.log((b - a) * (d - c) / 1600**2)
    log_z = float((log_p + r).logsumexp(0)) + area
    twice = float((log_p + 2 * r).logsumexp(0)) + area
    w = (log_p + r).softmax(0)
    f = torch.cat([x, r[:, None]], 1)
    mean = w @ f
    deviation = (w @ (f - mean).square()).sqrt()
    return Problem(flow, reward, log_z, mean, deviation, math.exp(2 * log_z - twice), particles)


def linear(x: Tensor) -> Tensor:
    """Return `x_1 + .3 x_2`."""
    return x[:, 0] + 0.3 * x[:, 1]


def quadratic(x: Tensor) -> Tensor:
    """Return `-|x - (8, 2.4)|² / 2` of the first two coordinates."""
    return -0.5 * ((x[:, 0] - 8).square() + (x[:, 1] - 2.4).square())


def kinked(x: Tensor) -> Tensor:
    """Return minus the L1 distance to (1.5, 1) of the first two coordinates: not smooth."""
    return -(x[:, 0] - 1.5).abs() - (x[:, 1] - 1).abs()


REWARDS: dict[str, tuple[Score, float, float]] = {
    "linear": (linear, 0.6, 0.28),
    "quadratic": (quadratic, 3.4, 1.3),
    "kinked": (kinked, 0.4, 0.025),
}
"""Name -> the reward, a temperature, and a low one: ESS below .1 % for importance sampling."""


def problems() -> dict[str, Callable[[], Problem]]:
    """Return name -> function that makes the problem, cheap ones first."""

    def made(flow: Callable[[], steer.GaussianMixture], r: Score, t: float, n: int = 256) -> Any:
        return lambda: known(flow(), lambda x: r(x) / t, n)

    found: dict[str, Callable[[], Problem]] = {}
    for d in (2, 16, 64):
        for cold in (False, True):
            for name, (r, warm, low) in REWARDS.items():
                title = f"{name}{', cold' if cold else ''}, d={d}"
                found[title] = made(lambda d=d: mixture(d), r, low if cold else warm)  # type: ignore[misc]
        title = f"modes 1:1000, d={d}"
        found[title] = made(lambda d=d: unequal(d), linear, 0.5, 4096)  # type: ignore[misc]
    return found


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield problem, method and steps of the requested cells, few steps first."""
    for steps in args.steps:
        for title in problems():
            for name in METHODS:
                if args.skip is not None and args.skip in title:
                    continue
                if args.only in title and (not args.methods or name in args.methods):
                    yield title, name, steps


def file_of(folder: Path, title: str, name: str, steps: int) -> Path:
    """Return the file of a cell."""
    return folder / f"{slug(f'{title} {name} {steps}', 80)}.json"


@torch.no_grad()
def measured(
    name: str,
    problem: Problem,
    steps: int,
    most: int = MOST,
    options: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Return the figures of a cell.

    Args:
        name: a method of `METHODS`.
        problem: the problem.
        steps: steps of the method.
        most: maximum number of populations.
        options: options of the method, if they differ from those of `METHODS`.
    """
    build = TABLE[name.split(" ")[0]].build
    chosen = METHODS[name] if options is None else options
    (d,), n, begun = problem.flow.event_shape, problem.particles, time.monotonic()
    ratios: list[Tensor] = []
    offs: list[Tensor] = []
    runs = RUNS if n <= 1024 else RUNS // 2
    while True:
        batch = len(ratios)
        g = torch.Generator().manual_seed(1000 * batch + steps)
        x = torch.randn(runs, n, d, generator=g)
        sampler = build(problem.flow, wrap(problem.reward), None, 1.0, step_times(steps), **chosen)
        *_, end = sampler.steps(x, 1 + batch)
        y = end.x.double()
        f = torch.cat([y[..., :2], problem.reward(y.flatten(0, 1)).reshape(runs, n, 1)], -1)
        estimates = (end.log_w.double().softmax(-1)[..., None] * f).sum(1)
        offs.append((estimates - problem.mean) / problem.deviation)
        ratios.append((end.log_z.double() - problem.log_z).exp())
        z, off = torch.cat(ratios), torch.cat(offs)
        error = float(z.std()) / len(z) ** 0.5
        needed = (error / SE_BAR) ** 2 * len(z)
        if error <= SE_BAR or needed > most or len(z) + runs > most:
            break
    return {
        "z": float(z.mean()),
        "z_error": error,
        "error": float(off.square().mean().sqrt()) * n**0.5,
        "populations": len(z),
        "particles": n,
        "ess": problem.ess,
        "seconds": time.monotonic() - begun,
    }


def misses(cell: dict[str, Any]) -> str:
    """Return the letters of the bars that a cell misses: z, s, m; "" if it passes.

    >>> misses({"z": 1.02, "z_error": 0.01, "error": 1.2})
    ''
    >>> misses({"z": 0.8, "z_error": 0.04, "error": 2.5})
    'zsm'
    """
    z = "z" if not abs(cell["z"] - 1) <= Z_BAR * cell["z_error"] else ""
    s = "s" if not cell["z_error"] <= SE_BAR else ""
    return z + s + ("m" if not cell["error"] <= ERROR_BAR else "")


def run(args: argparse.Namespace) -> None:
    """Compute cells until all are done or the time is up."""
    args.out.mkdir(parents=True, exist_ok=True)
    begun, ready = time.monotonic(), {}
    for title, name, steps in cells(args):
        if args.seconds is not None and time.monotonic() - begun > args.seconds:
            print("the time is up: give the same command to go on")
            return
        path = file_of(args.out, title, name, steps)
        if path.exists():
            continue
        if title not in ready:
            ready[title] = problems()[title]()
        try:
            with locked(path, path.with_suffix(".lock")):
                if path.exists():
                    continue
                cell = _cell(title, name, steps, ready[title], args.most)
                write_atomically(path, json.dumps(cell).encode())
        except BlockingIOError:  # another process computes it
            continue
        print(_line(cell), flush=True)


def _cell(title: str, name: str, steps: int, problem: Problem, most: int) -> dict[str, Any]:
    cell: dict[str, Any] = {"problem": title, "method": name, "steps": steps, "most": most}
    try:
        return cell | measured(name, problem, steps, most)
    except FloatingPointError as trouble:  # an error of a method is a result, too
        return cell | dict.fromkeys(("z", "z_error", "error"), math.nan) | {"said": str(trouble)}


def _line(cell: dict[str, Any]) -> str:
    figures = f"{cell['z']:.3f} ± {cell['z_error']:.3f}, {cell['error']:.2f} x"
    where = f"{cell['problem']}, {cell['method']}, {cell['steps']} steps"
    return f"{where}: {figures}, {cell.get('seconds', 0):.0f} s, {misses(cell) or 'passes'}"


def gathered(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the finished cells in a folder, or in a file that `table --write` made."""
    if folder.is_file():
        found = json.loads(folder.read_text(encoding="utf-8"))
    elif not folder.is_dir():
        found = []
    else:
        found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    return {(c["problem"], c["method"], c["steps"]): c for c in found}


def table(done: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Return one row per problem: error of E_q f and missed bars at each number of steps."""
    rows = []
    for title in problems():
        here = {k: c for k, c in done.items() if k[0] == title}
        if not here:
            continue
        ess = next(c["ess"] for c in here.values() if "ess" in c)
        columns = []
        for name in METHODS:
            parts = []
            for steps in STEPS:
                c = here.get((title, name, steps))
                parts.append("–" if c is None else f"{c['error']:.1f}{misses(c)}")
            columns.append(" ".join(parts))
        rows.append([title, f"{ess:.2g}" if ess < 1e-3 else f"{ess:.1%}", *columns])
    return markdown(["problem", "ESS", *METHODS], rows)


def passing(done: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Return how many cells of each method pass: "noise-smc 41 of 50, ..."."""
    parts = []
    for name in METHODS:
        cells = [c for (_, method, _), c in done.items() if method == name]
        parts.append(f"`{name}` {sum(not misses(c) for c in cells)} of {len(cells)}")
    return ", ".join(parts)


def main() -> None:
    """Compute cells, or print the finished ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["run", "table", "failures"])
    parser.add_argument("--out", type=Path, default=Path("outputs/oracles"))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--only", default="", help="part of a problem's name")
    parser.add_argument("--skip", help="part of the names of problems to leave out")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), metavar="METHOD",
                        help="of " + ", ".join(METHODS))  # fmt: skip
    parser.add_argument("--most", type=int, default=MOST, help="populations at most")
    parser.add_argument("--seconds", type=float, help="begin no cell after these")
    parser.add_argument("--write", type=Path, help="also gather the cells into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.do == "run":
        run(args)
        return
    done = gathered(args.out)
    if not done:
        parser.error(
            f"{args.out} holds no cells: fill it by `run`, or give --out docs/oracles.json"
        )
    if args.do == "table":
        print(table(done))
        print(f"Cells that pass: {passing(done)}")
    else:
        print("\n".join(_line(c) for c in done.values() if misses(c)))
    if args.write is not None:
        text = ",\n".join(json.dumps(c) for c in done.values())
        write_atomically(args.write, f"[\n{text}\n]\n".encode())


if __name__ == "__main__":
    main()
