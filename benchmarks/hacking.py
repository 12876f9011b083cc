"""Do the instruments detect reward hacking before the judge does?

`python -m benchmarks.hacking --out outputs/hacking` tunes the embedded model with a reward that is
easy to hack (mean brightness), with a CLIP without noisy views and without an anchor, and with the
recommended recipe, three seeds each. It prints when the first alarm came, how far the judge had
changed by then, and how far at the end. An interrupted run continues when it is started again.
"""

import argparse
import json
from pathlib import Path

import steer
from recipes.defaults import DATA
from recipes.figures import markdown
from recipes.finetune import named
from recipes.inputs import read_prompts
from rewards.judge import Judge

__all__ = ["RUNS", "main", "summary"]

RUNS = {
    "brightness": {
        "reward": "brightness", "steps": 40, "strength": 3.0,
        "options": {"jumps": [1], "anchor": 0.02},
        "check_every": 4,
    },
    "clip, no anchor": {
        "reward": "clip", "steps": 100, "temperature": 0.005, "learning_rate": 2e-3,
        "options": {"jumps": [1], "anchor": 0.0},
        "check_every": 10,
    },
    "honest": {
        "reward": "clip:views=4,noise=0.2", "steps": 120, "temperature": 0.005,
        "options": {"jumps": [1], "anchor": 0.5},
        "check_every": 20,
    },
}  # fmt: skip
"""Name -> the run's arguments."""


def summary(readings):
    """Return (step, judge's relative change) of the first alarm or None, and the last change."""

    def change(entry):
        return entry["judge/change"] / entry["judge/base"]

    first = next((e for e in readings if e["alarms"]), None)
    alarm = None if first is None else (first["step"], change(first), first["alarms"][0])
    before = [change(e) for e in readings if first is None or e["step"] < first["step"]]
    return alarm, min(before, default=0.0), change(readings[-1])


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/hacking"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    args = parser.parse_args()
    held = read_prompts(DATA / "held_out.txt").prompts
    rows = []
    for seed in range(args.seeds):
        for name in args.only:
            run = dict(RUNS[name])
            out = args.out / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            steer.finetune(
                steer.load("emoji"), named(run.pop("reward")),
                read_prompts(DATA / "tune.txt").prompts, judge=Judge(), seed=seed, out=out,
                check_prompts=held[::2], early_stop=0, sweep=[], progress=False,
                **run,
            )  # fmt: skip
            lines = (out / "readings.jsonl").read_text(encoding="utf-8").splitlines()
            alarm, lowest, last = summary([json.loads(line) for line in lines])
            when = "none" if alarm is None else f"step {alarm[0]}"
            at = "" if alarm is None else f"{alarm[1]:+.1%}"
            what = "" if alarm is None else alarm[2][:60]
            rows.append([name, seed, when, at, f"{lowest:+.1%}", f"{last:+.1%}", what])
            print(rows[-1], flush=True)
    head = [
        "run",
        "seed",
        "first alarm",
        "judge then",
        "lowest before",
        "judge at the end",
        "alarm",
    ]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
