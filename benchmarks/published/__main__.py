"""`python -m benchmarks.published [NAME...]`: published figures and ours."""

import argparse
from importlib import import_module

import torch

from recipes.figures import Estimate, markdown

NAMES = ("damped", "das", "denoisers", "fmrg", "mfm", "ring")


def main() -> None:
    """Print the requested tables."""
    parser = argparse.ArgumentParser(description="Published figures beside ours.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    names = parser.parse_args().names or NAMES
    strange = [name for name in names if name not in NAMES]
    if strange:
        parser.error(f"no figures of {', '.join(strange)}: take of {', '.join(NAMES)}")
    for name in names:
        module = import_module(f"benchmarks.published.{name}")
        rows = [
            [f.what, "–" if f.wanted is None else f"{f.wanted:.4g}",
             "" if f.wanted is None else f.source, Estimate(f.ours, f.error)]
            for f in module.figures()
        ]  # fmt: skip
        print(f"## {name}\n\n{markdown(['figure', 'wanted', 'from', 'ours'], rows)}")
        print(f"\n{module.NOTE}\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
