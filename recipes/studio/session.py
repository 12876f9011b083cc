"""What the page works with: one model, one job at a time, one folder."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rewards
import steer
from recipes.defaults import judge_of
from recipes.inputs import load_model
from recipes.studio.ask import Ask
from recipes.studio.jobs import Job
from recipes.studio.places import inside, plain_reward
from recipes.terminal import console
from steer.reward import Reward
from steer.sampling.forecast import plan
from steer.sampling.result import save_result

__all__ = ["Studio"]


class Studio:
    """The state behind all tabs.

    Args:
        model: what is steered, as `steer.load` takes it.
        root: the folder that may be read and written.
        allow_files: whether a reward may be a file, a module or a server.
        device: where to compute.
    """

    def __init__(
        self, model: str, root: Path, allow_files: bool = False, device: str | None = None
    ) -> None:
        self.model, self.root, self.allow_files = model, root.resolve(), allow_files
        self.root.mkdir(parents=True, exist_ok=True)
        self.flow = load_model(model, device)
        self.judge = judge_of(model, "own", console())
        self.jobs: dict[str, Job] = {}
        self._turn = threading.Lock()
        self._halts: dict[str, threading.Event] = {}
        self._rewards: dict[str, Reward] = {}

    def reward(self, text: str) -> Reward:
        """Return a reward by its text, loaded once.

        Raises:
            ValueError: one that cannot be read, or that this page may not load.
        """
        text = plain_reward(text, self.allow_files)
        if text not in self._rewards:
            self._rewards[text] = rewards.load(text)
        return self._rewards[text]

    def cost(self, ask: Ask) -> str:
        """Return what a run will cost, in a line.

        Raises:
            ValueError: anything that the run itself would refuse.
        """
        reward = self.reward(ask.reward)
        steer.stream(self.flow, reward, list(ask.prompts), **ask.keywords)  # checks itself
        cost = plan(ask.method, ask.steps, reward.differentiable, flow=self.flow, **_own(ask))
        count = len(ask.prompts) * ask.particles
        return (
            f"{count} pictures x {cost['nfe']} network calls = {count * cost['nfe']}, and "
            f"{count * cost['reward_calls']} reward calls"
        )

    def run(self, tab: str, ask: Ask) -> Iterator[tuple[str, Any]]:
        """Run a job of a tab, and yield what happens: (kind, value).

        Kinds: "waiting", "unguided", "step", "message", "judged", "paused", "done".

        A second job of the same tab ends the first; other tabs' jobs are waited for.
        """
        self.end(tab)
        job = Job(self.flow, self.reward(ask.reward), ask, self.judge)
        self.jobs[tab] = job
        try:
            while not self._turn.acquire(timeout=0.5):
                yield "waiting", "another picture is being steered: this one is next"
                if job.ended.is_set():
                    return
            worker = threading.Thread(target=self._work, args=(job,), daemon=True)
            worker.start()
            yield from self._told(job)
        finally:
            job.end()

    def _work(self, job: Job) -> None:
        try:
            job.work()
        finally:
            self._turn.release()

    def _told(self, job: Job) -> Iterator[tuple[str, Any]]:
        while True:
            kind, value = job.events.get()
            if kind == "over" or job.ended.is_set():
                return
            if kind == "failed":
                raise value
            if kind in ("paused", "done") and job.judge is not None:
                yield "judged", job.judged()
            yield kind, job.shown(value) if kind == "step" else value

    @contextmanager
    def turn(self, tab: str) -> Iterator[threading.Event]:
        """Wait for a turn, and give an event that says when the tab wants no more.

        Args:
            tab: whose; `halt` sets the event.
        """
        ended = self._halts[tab] = threading.Event()
        with self._turn:
            yield ended

    def halt(self, tab: str) -> None:
        """Say that a tab wants no more of what it has a turn for."""
        if tab in self._halts:
            self._halts[tab].set()

    def job(self, tab: str) -> Job:
        """Return a tab's job.

        Raises:
            ValueError: it has none.
        """
        if tab not in self.jobs:
            raise ValueError("nothing is being steered here: press Steer first")
        return self.jobs[tab]

    def end(self, tab: str) -> None:
        """End what a tab has begun, if there is something."""
        self.halt(tab)
        job = self.jobs.pop(tab, None)
        if job is not None:
            job.end()

    def close(self) -> None:
        """End every run, and wait until the sampler has let go of the network."""
        for tab in list(self.jobs):
            self.end(tab)
        if self._turn.acquire(timeout=30):
            self._turn.release()

    def save(self, tab: str, name: str) -> Path:
        """Write a tab's finished pictures as a run folder, and return it.

        Raises:
            ValueError: there are none yet, or a place outside of the folder.
            FileExistsError: a folder of that name is there.
        """
        result = self.job(tab).result
        if result is None:
            raise ValueError(
                "the pictures are not finished: wait for the last step, or press Stop"
            )
        place = inside(self.root, name)
        ask = self.job(tab).ask
        touched = self.job(tab).touched
        note = "kept or stopped by hand: no command makes these pictures again\n" * touched
        text = ask.command(self.model, str(place)) + "\n" + note
        return save_result(result, place, files={"command.txt": text})


def _own(ask: Ask) -> dict[str, Any]:
    known = {"temperature", "strength", "target", "budget"}
    return {k: v for k, v in ask.options.items() if k not in known}
