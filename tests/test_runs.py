"""Run folders: what may be replaced, one writer a time, what a run is known by, how it stops."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import steer
from recipes.cli import main
from recipes.partial import Partial
from steer.adapters.store import read_metadata
from steer.files import expanded, refuse_existing, whole_folder, write_atomically
from steer.identity import changes, python_files, sources
from steer.lock import holder, lock_of, locked
from steer.models.loading import load, save
from steer.training.checkpoints import Checkpoints, usable
from steer.training.log import RowLog
from steer.tuning.module import RewardTuning
from steer.tuning.run_folder import RunFolder
from tests.test_cli import here, refused, run  # noqa: F401
from tests.test_tuning import QUICK, redness, same, state, tiny, tune

ROOT = Path(__file__).parents[1]
WORDS = [f"--{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in QUICK.items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(tiny(), folder)
    return folder


@pytest.fixture
def replaceable():
    """Allow folders of any content here, which other tests may not write."""


@pytest.fixture
def samples(tmp_path):
    """A run folder as `sample` leaves it."""
    folder = tmp_path / "samples"
    (folder / "images").mkdir(parents=True)
    for name in ("metrics.json", "scores.jsonl", "grid.png", "config.yaml", "images/0000_a.png"):
        (folder / name).write_text("ours")
    return folder


# ------------------------------------------------------------------ what may be replaced


def test_a_run_of_ours_may_be_replaced_and_is_not_unasked(samples):
    with pytest.raises(FileExistsError, match=r"exists already.*set overwrite"):
        refuse_existing(samples, False)
    refuse_existing(samples, True)
    (samples / ".DS_Store").write_text("a desktop's")
    with whole_folder(samples, overwrite=True) as scratch:
        (scratch / "new").write_text("new")
        assert (samples / "grid.png").read_text() == "ours"
    assert [p.name for p in samples.iterdir()] == ["new"]
    assert [p.name for p in samples.parent.iterdir()] == ["samples"]


def test_what_fails_leaves_the_old_one(samples):
    def fail():
        with whole_folder(samples, overwrite=True) as scratch:
            (scratch / "new").write_text("new")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert (samples / "grid.png").read_text() == "ours"
    assert [p.name for p in samples.parent.iterdir()] == ["samples"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def named(old, new):
        done.append(f"-> {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    with whole_folder(tmp_path / "run") as scratch:
        (scratch / "images").mkdir()
        (scratch / "images" / "a.png").write_bytes(b"a")
        (scratch / "grid.png").write_bytes(b"g")
    *before, last = done[: done.index("-> run")], done[done.index("-> run") + 1 :]
    assert set(before[0]) == {"a.png", "grid.png", "images", ".run.new"}
    assert before[0][-1] == ".run.new"
    assert last == [tmp_path.name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("thesis.txt", "beside samples it contains thesis.txt, which no run of flowsteer wrote"),
        ("images/holiday.png", "images/holiday.png"),
        ("old/deep/thesis.txt", "old/deep/thesis.txt"),
    ],
)
def test_foreign_files_in_a_run_keep_it(samples, name, found):
    (samples / name).parent.mkdir(parents=True, exist_ok=True)
    (samples / name).write_text("precious")
    with pytest.raises(FileExistsError, match=found):
        refuse_existing(samples, True)


@pytest.mark.parametrize("command", ["sample", "compare", "finetune", "export", "eval"])
@pytest.mark.parametrize("out", [".", "..", "~", "runs", "thesis", "note.txt"])
def test_no_command_replaces_what_no_run_wrote(samples, monkeypatch, capsys, model, command, out):
    home = samples.parent
    monkeypatch.setenv("HOME", str(home))
    (home / "runs" / "one").mkdir(parents=True)
    (home / "runs" / "one" / "run.json").write_text("{}")
    (home / "thesis").mkdir()
    (home / "thesis" / "a.tex").write_text("precious")
    inside = home / "thesis" / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    (inside / "mine.txt").write_text("precious")
    given = out if out in {".", "..", "~"} else f"../../{out}"
    if out == "note.txt":
        (home / out).write_text("precious")
    before = sorted(p.relative_to(home) for p in home.rglob("*"))
    words = {
        "sample": ["--prompt=fox"], "compare": ["--prompts=[fox]"], "export": ["--lora=x"],
        "finetune": [f"--model={model}", "--reward=brightness", "--prompts=[cat]", "--steps=1"],
        "eval": ["--lora=x"],
    }[command]  # fmt: skip
    assert main([command, *words, f"--out={given}", "--overwrite"]) == 2
    reasons = {
        ".": "it is the current folder", "..": "it is the current folder",
        "~": "it is the current folder", "note.txt": "it is not a folder",
        "runs": "it contains no run of flowsteer, but one", "thesis": "it is the current folder",
    }  # fmt: skip
    refused(capsys, "is not changed, although overwrite was set", reasons[out], "choose another")
    assert sorted(p.relative_to(home) for p in home.rglob("*")) == before


def test_a_home_is_no_run(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with pytest.raises(FileExistsError, match="it is your home folder, or contains it"):
        refuse_existing(Path("~"), True)
    assert expanded("~/x") == tmp_path / "home" / "x"
    with pytest.raises(ValueError, match="there is no user of that name"):
        expanded("~nobody-of-that-name/x")


def test_a_result_saves_over_results_alone(samples, monkeypatch):
    monkeypatch.chdir(samples.parent)
    monkeypatch.setenv("HOME", str(samples.parent))
    result = steer.sample(tiny(), redness, ["cat"], particles=2, steps=1, method="none")
    result.save("~/samples", overwrite=True)
    assert (samples / "grid.png").read_bytes()[:4] == b"\x89PNG"
    (samples / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"contains thesis\.txt"):
        result.save(samples, overwrite=True)
    assert (samples / "thesis.txt").read_text() == "precious"


def test_a_killed_swap_is_put_in_order(samples):
    os.replace(samples, samples.with_name(".samples.old"))
    samples.with_name(".samples.new").mkdir()
    with pytest.raises(KeyError), whole_folder(samples):
        raise KeyError
    assert (samples / "grid.png").read_text() == "ours"
    assert [p.name for p in samples.parent.iterdir()] == ["samples"]


# ------------------------------------------------------------------ a new run over an old one


def fails(images):
    raise RuntimeError("boom")


def test_a_new_run_that_fails_leaves_the_old_adapters(model, tmp_path, capsys):
    first = state(tune(load(model), tmp_path / "run", steps=2))
    with pytest.raises(RuntimeError, match="boom"):
        tune(load(model), tmp_path / "run", steps=2, reward=fails, overwrite=True)
    assert "the earlier run was restored" in capsys.readouterr().out
    assert same(first, state(steer.load(model, lora=tmp_path / "run")))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"contains thesis\.txt"):
        tune(load(model), tmp_path / "run", steps=2, overwrite=True)
    (tmp_path / "run" / "thesis.txt").unlink()
    tune(load(model), tmp_path / "run", steps=3, overwrite=True)
    assert read_metadata(tmp_path / "run")["steps"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_killed_before_it_had_anything_gives_the_old_one_back(model, tmp_path):
    tune(load(model), tmp_path / "run", steps=2)
    folder = RunFolder(tmp_path / "run", overwrite=True)
    with locked(folder.path):
        folder.claim({"steps": 9})  # and then it is killed
    assert not (tmp_path / "run" / "finished.json").exists()
    with RunFolder(tmp_path / "run").held():
        assert (tmp_path / "run" / "finished.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_is_in_one_folder_under_a_tilde(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    tune(load(model), "~/run", steps=2)
    assert (tmp_path / "home" / "run" / "log" / "version_0" / "metrics.csv").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


# ------------------------------------------------------------------ checkpoints and logs


def cut_at(monkeypatch, step):
    whole = RewardTuning.training_step

    def training_step(self, batch, index):
        if self.global_step == step:
            raise RuntimeError("power cut")
        return whole(self, batch, index)

    monkeypatch.setattr(RewardTuning, "training_step", training_step)


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    """A run of 7 steps that stopped in its sixth, in cut/, and one that did not, in whole/."""
    folder = tmp_path_factory.mktemp("stopped")
    tune(load(model), folder / "whole", steps=7)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(RuntimeError, match="power cut"):
            tune(load(model), folder / "cut", steps=7)
    return folder


@pytest.fixture
def cut(stopped, model, tmp_path):
    """A copy of the run that stopped, and the adapters of the other one."""
    shutil.copytree(stopped / "cut", tmp_path / "run")
    return tmp_path / "run", state(steer.load(model, lora=stopped / "whole"))


def rows(folder):
    lines = (folder / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("step")
    return [float(line.split(",")[column]) for line in lines[1:]]


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(model, cut, capsys, damage):
    out, whole = cut
    last = out / "checkpoints" / "last.ckpt"
    data = last.read_bytes()
    if damage == "missing":
        last.unlink()
    else:
        last.write_bytes({"truncated": data[:1000], "empty": b"", "foreign": b"x" * 99}[damage])
    again = tune(load(model), out, steps=7)
    said = capsys.readouterr().out
    named = f"{last} is damaged" in said and "resuming from the one before it, step 2" in said
    assert named or damage == "missing"
    assert same(whole, state(again))
    assert rows(out) == [1, 2, 3, 4, 5, 6, 7]
    assert (last.with_name("damaged.ckpt")).exists() == (damage != "missing")


def test_damage_to_both_checkpoints_is_said(cut, model):
    out, _ = cut
    for name in ("last.ckpt", "before.ckpt"):
        (out / "checkpoints" / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"last.ckpt is damaged .*before.ckpt is damaged .*again"):
        tune(load(model), out, steps=7)


def test_checkpoints_are_synced_beside_and_never_staged(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    said = []
    for step in (1, 2, 3):
        checkpoints = Checkpoints(lambda: said.append(0))
        checkpoints.save_checkpoint({"global_step": step}, tmp_path / "c" / "last.ckpt")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["before.ckpt", "last.ckpt"]
    assert usable(tmp_path / "c") == (tmp_path / "c" / "last.ckpt", 3)
    assert torch.load(tmp_path / "c" / "before.ckpt", weights_only=True) == {"global_step": 2}
    assert len(said) == 3
    assert synced
    assert all(name.startswith(str(tmp_path / "c")) for name in synced)


def test_a_log_has_each_row_once_also_after_a_torn_one(stopped, model, cut):
    out, _ = cut
    assert rows(out) == [1, 2, 3, 4, 5]  # the fifth step is done again: its row goes
    with (out / "log" / "version_0" / "metrics.csv").open("a") as file:
        file.write("123.0,4")  # cut short
    tune(load(model), out, steps=7)
    assert rows(out) == rows(stopped / "whole") == [1, 2, 3, 4, 5, 6, 7]


def test_a_log_takes_new_columns(tmp_path):
    log = RowLog(tmp_path)
    log.log_metrics({"a": 1.5}, 1)
    log.log_metrics({"b": torch.tensor(2.0)}, 1)
    log.log_metrics({"a": 3.0}, 2)
    assert log.file.read_text() == "a,b,step\n1.5,,1\n,2.0,1\n3.0,,2\n"
    again = RowLog(tmp_path)
    again.take_up(1)
    again.log_metrics({"a": 4.0, "b": 5.0}, 2)
    assert log.file.read_text() == "a,b,step\n1.5,,1\n,2.0,1\n4.0,5.0,2\n"
    again.take_up(2, rows=1)
    assert log.file.read_text() == "a,b,step\n1.5,,1\n"
    again.take_up()
    assert not log.file.exists()


def test_a_run_is_finished_when_its_card_is_written(model, tmp_path, monkeypatch):
    from steer.tuning import ending

    with monkeypatch.context() as patch:
        patch.setattr(ending, "write_card", lambda out: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            tune(load(model), tmp_path / "run", steps=3)
    assert not (tmp_path / "run" / "finished.json").exists()
    tune(load(model), tmp_path / "run", steps=3)
    assert (tmp_path / "run" / "README.md").exists()
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["done"] == 3
    assert rows(tmp_path / "run") == [1, 2, 3]


def test_a_damaged_unit_is_named_and_done_again(here, monkeypatch, capsys):  # noqa: F811
    prompts = json.dumps(["p0", "p1", "p2"])
    assert run(prompt=prompts, particles=32, out="whole") == 0
    real, calls = steer.sample, []

    def third(*args, **kwargs):
        calls.append(kwargs["position"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(steer, "sample", third)
    assert run(prompt=prompts, particles=32) == 130
    assert "run the same command again" in capsys.readouterr().err
    unit = here / ".run.partial" / "000000.safetensors"
    unit.write_bytes(unit.read_bytes()[:5000])
    calls.extend([-1] * 3)
    assert run(prompt=prompts, particles=32) == 0
    assert calls[-4:] == [0, 0, 2, 2]
    said = " ".join(capsys.readouterr().err.split())
    assert "000000.safetensors is damaged" in said
    assert "deleted and computed again" in said
    a, b = ((here / name / "scores.jsonl").read_text() for name in ("run", "whole"))
    assert a == b
    assert not (here / ".run.partial").exists()


# ------------------------------------------------------------------ one writer


HOLDER = """
import sys, time
from pathlib import Path
from steer.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that writes to tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_two_writers_are_told_apart_from_an_interrupted_run(model, tmp_path, other):
    said = rf"another process is writing to .*run \(process {other.pid} on .+\): wait"
    with pytest.raises(BlockingIOError, match=said):
        tune(load(model), tmp_path / "run", steps=1)
    with pytest.raises(BlockingIOError, match=said):
        refuse_existing(tmp_path / "run", True)
    with pytest.raises(BlockingIOError, match=said), whole_folder(tmp_path / "run"):
        pass
    other.kill()  # as with kill -9, the kernel takes the lock back; its file is still there
    other.wait()
    assert lock_of(tmp_path / "run").exists()
    assert holder(lock_of(tmp_path / "run")) is None
    tune(load(model), tmp_path / "run", steps=1)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_two_samplers_do_not_mix(tmp_path):
    with (
        Partial(tmp_path / "run", {"seed": 1}),
        pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on"),
    ):
        Partial(tmp_path / "run", {"seed": 2})
    assert list(tmp_path.iterdir()) == []  # nothing was finished


# ------------------------------------------------------------------ what a run is known by


def test_changes_name_the_key_with_both_values_in_full():
    long = "a very long prompt " * 30
    before = {"prompts": ["a", long], "settings": {"rank": 4, "alpha": None}, "seed": 0}
    now = {"prompts": ["a", "b"], "settings": {"rank": 8, "alpha": None}, "seed": 0}
    found = changes(before, now)
    assert found == {"prompts[1]": f'"{long}" -> "b"', "settings.rank": "4 -> 8"}
    assert changes({"a": [1]}, {"a": [1, 2]}) == {"a": "1 entries -> 2 entries"}


def test_sources_are_a_file_and_the_neighbours_it_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "near_one.py").write_text("import near_two\nFACTOR = 1.0\n")
    (tmp_path / "near_two.py").write_text("import torch\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    file = tmp_path / "my_reward.py"
    file.write_text(
        "import torch\nfrom near_one import FACTOR\n"
        "def bright(images):\n    return FACTOR * images.mean((1, 2, 3))\n"
    )
    assert [p.name for p in python_files(file)] == ["my_reward.py", "near_one.py", "near_two.py"]
    import my_reward

    before = sources(steer.reward.wrap(my_reward.bright) + 0.5 * steer.reward.wrap(redness))
    assert list(before) == ["my_reward.py", "near_one.py", "near_two.py", "test_tuning.py"]
    (tmp_path / "near_two.py").write_text("import torch  # edited\n")
    after = sources(my_reward.bright)
    assert [k for k in after if after[k] != before[k]] == ["near_two.py"]
    assert sources(torch.nn.Linear(2, 2), steer.LinearReward(torch.ones(2)), print) == {}


def test_an_edited_reward_is_another_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reward = tmp_path / "mine.py"
    text = "def bright(images):\n    return images.mean((1, 2, 3))\n"
    reward.write_text(text)
    words = [
        "finetune", f"--model={model}", "--reward=mine.py:bright", "--prompts=[cat]", "--steps=2",
        "--temperature=1", "--out=run", "--options.jumps=[1]",
        *WORDS,
    ]  # fmt: skip
    assert main(words) == 0
    reward.write_text(text.replace("mean", "amax"))
    capsys.readouterr()
    assert main(words) == 2
    refused(
        capsys,
        "with other arguments (sources.mine.py: ",
        " -> ",
        "file of the reward's was edited",
    )
    reward.write_text(text)
    assert main(words) == 0
    assert "run is finished" in capsys.readouterr().out


def test_another_judge_or_held_out_reward_is_another_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    watch = tmp_path / "watch.py"
    text = "def bright(images):\n    return images.mean((1, 2, 3))\n"
    watch.write_text(text)
    words = [
        "finetune", f"--model={model}", "--reward=brightness", "--prompts=[cat]", "--steps=2",
        "--temperature=1", "--out=run", "--options.jumps=[1]",
        *[w for w in WORDS if not w.startswith("--judge")],
    ]  # fmt: skip
    asked = ["--judge=watch.py:bright", "--held_out=['colour:name=red']"]
    assert main([*words, *asked]) == 0
    capsys.readouterr()
    assert main([*words, asked[0], "--held_out=['colour:name=blue']"]) == 2
    refused(capsys, "watched.held_out.colour:name=red: ", "watched.held_out.colour:name=blue: ")
    assert main([*words, "--judge=null", asked[1]]) == 2
    refused(capsys, 'watched.judge: "watch.py:bright" -> null')
    watch.write_text(text.replace("mean", "amax"))
    assert main([*words, *asked]) == 2
    refused(
        capsys, "(watched.sources.watch.py: ", "a file of the judge's or a held-out reward's was"
    )
    begun = json.loads((tmp_path / "run" / "run.json").read_text())
    del begun["watched"]  # as a run of an earlier version has it
    (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
    assert main([*words, *asked]) == 0
    assert "run is finished" in capsys.readouterr().out


def test_a_judge_of_another_folder_is_another_judge(model, tmp_path):
    from rewards.judge import EMBEDDED, Judge

    folder = tmp_path / "judge"
    shutil.copytree(EMBEDDED, folder)
    tune(load(model), tmp_path / "run", steps=1, judge=Judge(folder))
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(FileExistsError, match=r"\(watched\.sources\.config\.json: "):
        tune(load(model), tmp_path / "run", steps=1, judge=Judge(folder))
    tune(load(model), tmp_path / "plain", steps=1, judge=BrightLike())
    with pytest.raises(FileExistsError, match=r'watched\.judge: "BrightLike" -> null'):
        tune(load(model), tmp_path / "plain", steps=1)


class BrightLike(steer.Reward):
    differentiable = False

    def forward(self, images, prompts=None, metadata=None):
        return images.mean((1, 2, 3))


def test_a_resume_with_other_settings_names_them_in_full(model, cut):
    out, _ = cut
    with pytest.raises(FileExistsError, match=r"\(seed: 0 -> 1; settings.rank: 2 -> 3\)"):
        tune(load(model), out, steps=7, rank=3, seed=1)
    prompts = ["a prompt that is so long that it would have been cut off before its end", "b"]
    with pytest.raises(FileExistsError) as caught:
        steer.finetune(load(model), redness, prompts, "direct", 7, 0.1, out=out, **QUICK)
    assert "prompts: 6 entries -> 2 entries" in str(caught.value)
    assert f'prompts[0]: "cat" -> "{prompts[0]}"' in str(caught.value)


def test_units_of_other_settings_are_named(tmp_path):
    with Partial(tmp_path / "run", {"settings": {"seed": 1}, "prompts": ["a"]}) as partial:
        partial.add("unit", {"x": torch.ones(2)}, {})
    with pytest.raises(FileExistsError, match=r"\(settings.seed: 1 -> 2\) is kept in"):
        Partial(tmp_path / "run", {"settings": {"seed": 2}, "prompts": ["a"]})
    with Partial(tmp_path / "run", {"settings": {"seed": 2}, "prompts": ["a"]}, True) as partial:
        assert not partial.has("unit")
    write_atomically(tmp_path / "x", b"")
    with Partial(tmp_path / "run", {"settings": {"seed": 3}, "prompts": ["a"]}):
        pass  # nothing was finished: it does not stand in the way


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_made_longer(model, tmp_path, capsys, finished):
    """A finished or a stopped one goes on where it was, at the rates of the new length."""
    out = tmp_path / "run"
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        if not finished:
            cut_at(patch, 3)
        try:
            tune(load(model), out, steps=4)
        except RuntimeError:
            assert not finished
    begin = 4 if finished else 2
    step = RewardTuning.optimizer_step

    def noted(self, epoch, index, optimizer, *args, **kwargs):
        rates.append((self.global_step, optimizer.param_groups[0]["lr"]))
        step(self, epoch, index, optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardTuning, "optimizer_step", noted)
        tune(load(model), out, steps=9)
    assert f"{out} continues: 4 -> 9 steps" in capsys.readouterr().out
    cosine = [0.5e-3 * (1 + math.cos(math.pi * k / 9)) for k in range(begin, 9)]
    assert [k for k, _ in rates] == list(range(begin, 9))
    assert [rate for _, rate in rates] == pytest.approx(cosine)
    ended = json.loads((out / "finished.json").read_text())
    assert (ended["steps"], ended["done"]) == (9, 9)
    assert rows(out) == list(range(1, 10))
    with pytest.raises(FileExistsError, match=r"\(steps: 9 -> 4\).*only steps may grow"):
        tune(load(model), out, steps=4)


# ------------------------------------------------------------------ how a run stops


SLOW = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import steer, test_tuning
from recipes.cli import main

def slow(images):
    time.sleep(0.1)
    return test_tuning.redness(images)

if __name__ == "__main__":
    test_tuning.tune(steer.load({model!r}), sys.argv[1], 500, reward=slow)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_a_script_after_its_step(model, tmp_path, number, code):
    """In Python SIGINT is a KeyboardInterrupt, which ends a script with 1, or by the signal."""
    script = tmp_path / "script.py"
    script.write_text(SLOW.format(root=str(ROOT), model=str(model)))
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "run"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = tmp_path / "run" / "log" / "version_0" / "metrics.csv"
    for _ in range(600):
        if log.exists() and len(log.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in ({code} if code == 143 else {1, -signal.SIGINT}), err
    assert "stopping after this step; once more to stop at once" in err
    found = usable(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert rows(tmp_path / "run")[-1] == found[1]  # the step that was taken is saved
    assert "stopped, unfinished: run the same command again to resume" in err
    assert f"has the state after step {found[1]}" in err
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    assert not (tmp_path / "run" / "finished.json").exists()


def interrupted(number, at, monkeypatch):
    whole = RewardTuning.training_step

    def training_step(self, batch, index):
        if self.global_step == at:
            os.kill(os.getpid(), number)
        return whole(self, batch, index)

    monkeypatch.setattr(RewardTuning, "training_step", training_step)


def test_interrupts_are_python_s_own_and_lose_no_step(model, tmp_path, monkeypatch):
    whole = state(tune(load(model), None, steps=5))
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupted(signal.SIGINT, 2, patch)
        with pytest.raises(KeyboardInterrupt, match="has the state after step 3"):
            tune(load(model), tmp_path / "run", steps=5)
        interrupted(signal.SIGTERM, 3, patch)
        with pytest.raises(SystemExit) as stop:
            tune(load(model), tmp_path / "run", steps=5)
        assert stop.value.code == 143
        assert "has the state after step 4" in str(stop.value)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert same(whole, state(tune(load(model), tmp_path / "run", steps=5)))
    with monkeypatch.context() as patch:
        interrupted(signal.SIGINT, 2, patch)
        with pytest.raises(KeyboardInterrupt, match="without a folder nothing is saved"):
            tune(load(model), None, steps=5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_says_how_to_go_on(model, tmp_path, monkeypatch, capsys, number, code):
    words = [
        "finetune", f"--model={model}", "--reward=brightness", "--prompts=[cat]", "--steps=4",
        "--temperature=1", f"--out={tmp_path / 'run'}",
        *WORDS,
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        interrupted(number, 1, patch)
        try:
            got = main(words)
        except SystemExit as stop:
            got = stop.code
    assert got == code
    refused(capsys, "unfinished: run the same command again to resume", "state after step 2")
    assert main(words) == 0


def test_sigterm_puts_away_what_is_half_done(here, monkeypatch, capsys):  # noqa: F811
    real, calls = steer.sample, []

    def third(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(steer, "sample", third)
    before = signal.getsignal(signal.SIGTERM)
    assert run(prompt=json.dumps(["p0", "p1", "p2"]), particles=32) == 143
    refused(capsys, "terminated: run the same command again to resume; finished parts are kept")
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(p.name for p in (here / ".run.partial").iterdir()) == [
        "000000.safetensors", "identity.json",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["body", "call"])
@pytest.mark.parametrize("command", ["finetune", "sample"])
def test_a_reward_file_that_exits_is_an_error(
    tmp_path, monkeypatch, capsys, model, where, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import sys
        def bright(images):
            {call}
            return images.mean((1, 2, 3))
        {body}
        """).format(**{"call": "pass", "body": "", where: "sys.exit(0)"})
    )
    words = [command, f"--model={model}", "--reward=mine.py:bright", "--out=run", "--steps=1"]
    words += ["--prompt=cat"] if command == "sample" else ["--prompts=[cat]", "--temperature=1"]
    words += WORDS * (command == "finetune")
    assert main(words) == 2
    refused(capsys, "your file ended the program (mine.py, line ", "sys.exit(0)")
