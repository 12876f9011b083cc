"""Kill a run at each of its writes, or fill its disk there, and see that it resumes.

`python -m tests.crashing KIND HOW FOLDER [WRITES]`: KIND is tuning, sampling or training; HOW is
kill (kill -9 before a write), full (from that write on the disk is full), or disk (a disk of so
many kB, which root alone can make). WRITES is a list of numbers; without it each write is tried,
until a run survives. Prints figures as JSON.

A write is whatever Python is asked to do to a file: open it to write, rename, remove, make a
folder. Each run is a fork of a process that has imported everything and computed nothing.
"""

import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

STEPS, EVERY = 5, 2
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
}


class Writes:
    """Count the writes below a folder, and act at one of them.

    Args:
        folder: what counts.
        at: the number of the write, from 1.
        how: kill or full.
    """

    def __init__(self, folder, at, how):
        self.folder, self.at, self.how, self.seen = str(folder), at, how, 0
        sys.addaudithook(self)

    def __call__(self, event, args):
        if event == "open":
            mode, flags = args[1], args[2]
            writes = flags & FLAGS if isinstance(flags, int) else set("wax+") & set(mode or "")
        else:
            writes = event in CHANGES
        if not writes or not str(args[0]).startswith(self.folder):
            return
        self.seen += 1
        if self.how == "kill" and self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        makes = event in {"open", "os.mkdir", "os.symlink", "os.link"}
        if self.how == "full" and 0 < self.at <= self.seen and makes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))


def counted(kind, name, note):
    """Write a byte to a file, opened before, whenever a method is called: steps that are taken."""
    whole = getattr(kind, name)

    def method(self, *args, **kwargs):
        os.write(note, b".")
        return whole(self, *args, **kwargs)

    setattr(kind, name, method)


def tuning(out, note):
    """Tune for some steps, with checks."""
    from steer.models.loading import load
    from steer.tuning.module import RewardTuning
    from tests.test_tuning import CHECKED, QUICK, tune

    counted(RewardTuning, "training_step", note)
    changes = QUICK | CHECKED | {"save_every": EVERY, "check_every": 3, "early_stop": 0}
    tune(load(out.parents[2] / "model"), out, STEPS, **changes)


def sampling(out, note):
    """Sample three prompts, each a unit."""
    import steer
    from recipes.cli import main

    whole = steer.sample

    def sample(*args, **kwargs):
        os.write(note, b"." * (kwargs.get("method") != "none"))
        return whole(*args, **kwargs)

    steer.sample = sample
    file = out.parents[2] / "toy.py"
    code = main([
        "sample", f"--model={file}:Pixels", f"--reward={file}:redness", "--steps=2",
        "--particles=64", "--temperature=0.1", '--prompt=["a","b","c"]', f"--out={out}",
        "--keep=best",
    ])  # fmt: skip
    if code:
        raise SystemExit(code)


def training(out, note):
    """Train a velocity for some steps, then its map."""
    from steer.training.module import FlowTraining
    from tests.test_train import TINY, _train

    counted(FlowTraining, "training_step", note)
    _train(out, **TINY | {"velocity_steps": 3, "map_steps": 3, "save_every": EVERY})


TUNING = ("callbacks", "ending", "module", "trainer")
KINDS = {"tuning": tuning, "sampling": sampling, "training": training}


def prepare(kind, base):
    """Import what the runs need, and write what they read."""
    import torch

    torch.set_num_threads(1)
    if kind == "tuning":
        for name in ("peft", "tensorboard", *(f"steer.tuning.{n}" for n in TUNING)):
            importlib.import_module(name)
        from steer.models.loading import save
        from tests.test_tuning import tiny

        save(tiny(), base / "model")
    if kind == "sampling":
        importlib.import_module("recipes.sample")
        from tests.test_cli import FLOW

        (base / "toy.py").write_text(FLOW)
    if kind == "training":
        for name in ("recipes.train", "tests.test_train", "steer.training.module"):
            importlib.import_module(name)
        from recipes.data.emoji import load
        from recipes.data.recolour import load as recoloured

        load(), recoloured()


def content(kind, out):
    """Return what must not differ: hashes of files, figures without times and paths."""

    def sha(name):
        data = (out / name).read_bytes()
        if name.endswith(".safetensors"):  # its header has its notes in any order
            size = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:size])
            data = json.dumps(header, sort_keys=True).encode() + data[size:]
        return hashlib.sha256(data).hexdigest()[:12]

    if kind == "tuning":
        ended = json.loads((out / "finished.json").read_text())
        ended.pop("watch_seconds")
        adapters = ["adapter_model.safetensors", "adapter_config.json", "readings.jsonl"]
        kept = {name: sha(name) for name in [*adapters, "best/adapter_model.safetensors"]}
        assert (out / "README.md").stat().st_size > 500
        return kept | {"log": log(out), "ended": ended, "grid": sha("grid.png")}
    if kind == "sampling":
        pictures = sorted(p.name for p in (out / "images").iterdir())
        kept = {name: sha(f"images/{name}") for name in pictures}
        return kept | {name: sha(name) for name in ("scores.jsonl", "grid.png")}
    kept = {f"{s}/model.safetensors": sha(f"{s}/model.safetensors") for s in ("velocity", "map")}
    return kept | {f"log of {s}": log(out / s) for s in ("velocity", "map")}


def log(folder):
    """Return the rows of a log that have a step, sorted by nothing: as they stand."""
    return (folder / "log" / "version_0" / "metrics.csv").read_text()


def forked(kind, out, note, at=0, how="kill"):
    """Run in a fork -> (its exit code, minus the signal; its writes; what it said at its end)."""
    said = out.parents[1] / "said.txt"
    tally = os.open(out.parents[1] / "tally", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if not pid:
        code = 3
        try:
            silent = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(silent, 1), os.dup2(silent, 2)
            writes = Writes(out.parent, at, how)
            try:
                KINDS[kind](out, note)
                code = 0
            except OSError as error:
                code = 28 if error.errno == errno.ENOSPC else 3
                traceback.print_exc()
            except SystemExit as stop:
                code = 28 if stop.code == 2 else 3
            except BaseException:
                traceback.print_exc()
            writes.at = -1
            os.write(tally, str(writes.seen).encode())
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    seen = os.pread(tally, 20, 0).decode() or "0"
    os.close(tally)
    return os.waitstatus_to_exitcode(status), int(seen), said.read_text(errors="replace")


def steps_in(file):
    return len(file.read_bytes())


def crash(kind, how, base, writes=None):
    """Do as the module says, and return figures.

    Raises:
        AssertionError: a run that does not resume to what it would have been.
    """
    base = Path(base).resolve()
    base.mkdir(parents=True, exist_ok=True)
    prepare(kind, base)

    def run(at=0, fresh=True, whole=False):
        place = base / ("whole" if whole else "cut")
        if fresh:
            unmount(place / "here")
            shutil.rmtree(place, ignore_errors=True)
            (place / "here").mkdir(parents=True)
        if how == "disk" and not whole:
            mount(place / "here", f"{at}k" if fresh else "64m", again=not fresh)
        note = os.open(place / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        found = forked(kind, place / "here" / "run", note, 0 if how == "disk" else at, how)
        os.close(note)
        return found

    code, total, said = run(whole=True)
    assert code == 0, said
    expected = content(kind, base / "whole" / "here" / "run")
    least = steps_in(base / "whole" / "steps")
    figures = {"kind": kind, "how": how, "writes": total, "tried": 0, "resumed": 0, "again": 0}
    for at in writes or range(1, 10 * total):
        code, _, said = run(at)
        if code == 0 and how == "kill" and writes is None:
            assert at > total - 3, f"survived write {at} of {total}"
            break
        if code == 0:  # the last writes of all are tidying
            break
        figures["tried"] += 1
        assert code == (-signal.SIGKILL if how == "kill" else 28), f"write {at}: {said}"
        code, _, said = run(fresh=False)
        assert code == 0, f"resumed after write {at}: {said}"
        out = base / "cut" / "here" / "run"
        found = content(kind, out)
        wrong = [name for name in expected if found.get(name) != expected[name]]
        assert not wrong, (
            f"after write {at}: {wrong}: {[(expected[n], found.get(n)) for n in wrong]}"
        )
        left = sorted(p.name for p in out.parent.iterdir())
        assert left == ["run"], f"after write {at}: {left}"
        again = steps_in(base / "cut" / "steps") - least
        assert again <= (EVERY + 1 if kind != "sampling" else 1), f"write {at}: {again} again"
        figures["resumed"] += 1
        figures["again"] = max(figures["again"], again)
    unmount(base / "cut" / "here")
    return figures


def mount(folder, size, again):
    """Put a file system of its own in a folder, or give it another size."""
    options = f"remount,size={size}" if again else f"size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def unmount(folder):
    """Take it away, if there is one."""
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    kind, how, folder, *chosen = sys.argv[1:]
    print(json.dumps(crash(kind, how, folder, json.loads(chosen[0]) if chosen else None)))
