"""The state behind the page: one model, one job at a time, one folder."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes.studio.ask import Ask
from recipes.studio.loading import Loading
from recipes.studio.places import inside, plain_reward
from recipes.terminal import console

if TYPE_CHECKING:  # they load torch, for which the page does not wait
    from recipes.studio.jobs import Job
    from steer.flow import FlowMap
    from steer.reward import Reward

__all__ = ["LOADING", "Studio"]

Found = TypeVar("Found")

TOUCHED = "# particles were kept or the run was stopped by hand: no command makes these pictures\n"

WAITING = "another picture is being steered: this waits for its turn"
PAUSED = "another picture is being steered, and is paused: this waits until it goes on or ends"

LOADING = "The model is still loading. What you start now waits for it."


class Studio:
    """The state behind all tabs.

    The model is loaded in a thread, started by `loading.start()` or by the first use, which waits
    for it.

    Args:
        model: the model to steer, as for `steer.load`.
        root: the folder that may be read and written.
        allow_files: whether a reward may be a file, a module or a server.
        device: where to compute.
    """

    def __init__(
        self, model: str, root: Path, allow_files: bool = False, device: str | None = None
    ) -> None:
        self.model, self.root, self.allow_files = model, root.resolve(), allow_files
        self.root.mkdir(parents=True, exist_ok=True)
        self.device = device
        self.loading = Loading(self._load)
        self.jobs: dict[str, Job] = {}
        self._turn = threading.Lock()
        self._at_work: Job | None = None
        self._halts: dict[tuple[str, str], threading.Event] = {}
        self._rewards: dict[str, Reward] = {}

    def _load(self) -> "tuple[FlowMap, Reward | None]":
        from recipes.defaults import judge_of
        from recipes.inputs import load_model
        from recipes.studio import jobs, looking  # noqa: F401  their imports take a while too
        from steer.flow import device_of

        flow, judge = load_model(self.model, self.device), judge_of(self.model, "own", console())
        return flow, None if judge is None else judge.to(device_of(flow))

    @property
    def flow(self) -> "FlowMap":
        """The model; this waits until it is loaded."""
        return self.loading.get()[0]

    @property
    def judge(self) -> "Reward | None":
        """Its held-out reward, if it has one."""
        return self.loading.get()[1]

    def reward(self, text: str) -> "Reward":
        """Return a reward by its text, loaded once, on the model's device.

        Raises:
            ValueError: the text cannot be parsed, or this page may not load the reward.
        """
        text = plain_reward(text, self.allow_files)
        self.loading.get()  # two threads must not import torch at once
        if text not in self._rewards:
            import rewards
            from steer.flow import device_of

            self._rewards[text] = rewards.load(text).to(device_of(self.flow))
        return self._rewards[text]

    def fresh(self, text: str) -> "Reward":
        """Return a reward for one run; it does not keep a scale that an earlier run has learned.

        Raises:
            ValueError: as for `reward`.
        """
        known = self.reward(text)
        import rewards
        from steer.flow import device_of
        from steer.reward import learners

        if not learners(known):
            return known
        return rewards.load(text.strip()).to(device_of(self.flow))

    def cost(self, ask: Ask) -> str:
        """Return the cost of a run, in one line.

        Raises:
            ValueError: anything that the run itself would refuse.
        """
        reward = self.reward(ask.reward)
        import steer
        from steer.sampling.forecast import plan

        steer.stream(self.flow, reward, list(ask.prompts), **ask.keywords)  # validates itself
        cost = plan(ask.method, ask.steps, reward.differentiable, flow=self.flow, **ask.own)
        count = len(ask.prompts) * ask.particles
        return (
            f"{count} pictures x {cost['nfe']} network calls = {count * cost['nfe']}, and "
            f"{count * cost['reward_calls']} reward calls"
        )

    def run(self, tab: str, ask: Ask) -> Iterator[tuple[str, Any]]:
        """Run a job of a tab, and yield its events: (kind, value).

        Kinds: "waiting", "unguided", "step", "message", "judged", "paused", "done".

        A second job of the same tab ends the first, unless the second one is invalid; jobs of
        other tabs are finished first.
        """
        if not self.loading.ready:
            yield "waiting", LOADING
        self.loading.get()
        from recipes.studio.jobs import Job

        job = Job(self.flow, self.fresh(ask.reward), ask, self.judge)
        self._end_job(tab)
        self.jobs[tab] = job
        try:
            while not self._turn.acquire(timeout=0.5):
                yield "waiting", self.busy or WAITING
                if job.ended.is_set():
                    return
            self._at_work = job
            worker = threading.Thread(target=self._work, args=(job,), daemon=True)
            worker.start()
            yield from self._told(job)
        finally:
            job.end()

    def _work(self, job: "Job") -> None:
        try:
            job.work()
        finally:
            self._at_work = None
            self._turn.release()

    def _told(self, job: "Job") -> Iterator[tuple[str, Any]]:
        while True:
            kind, value = job.events.get()
            if kind == "over" or job.ended.is_set():
                return
            if kind == "failed":
                raise value
            if kind in ("paused", "done") and job.judge is not None:
                yield "judged", job.judged()
            yield kind, job.shown(value) if kind == "step" else value

    @property
    def busy(self) -> str:
        """Return what has the turn; "" if nothing has it."""
        job = self._at_work
        return (PAUSED if job is not None and job.paused else WAITING) * self._turn.locked()

    def begun(self, tab: str, page: str) -> threading.Event:
        """Return an event that is set when a tab no longer needs the work it starts on a page.

        Earlier work of the tab on that page is ended.
        """
        self.halt(tab, page)
        ended = self._halts[tab, page] = threading.Event()
        return ended

    def in_turn(
        self, found: Iterator[Found], ended: threading.Event | None = None
    ) -> Iterator[Found]:
        """Let an iterator compute each of its values in a separate turn.

        No turn is held while a value is shown, because a page that is closed meanwhile would keep
        it.

        Args:
            found: the iterator.
            ended: event that is set when there is no need to wait for a turn.
        """
        while True:
            while not self._turn.acquire(timeout=0.5):
                if ended is not None and ended.is_set():
                    return
            try:
                one = next(found)
            except StopIteration:
                return
            finally:
                self._turn.release()
            yield one

    def halt(self, tab: str, page: str | None = None) -> None:
        """Signal that a tab no longer needs the work that it started on a page, or on any page."""
        for key in list(self._halts):
            if key[0] == tab and page in (None, key[1]):
                self._halts.pop(key).set()

    def job(self, tab: str) -> "Job":
        """Return a tab's job.

        Raises:
            ValueError: it has no job.
        """
        if tab not in self.jobs:
            raise ValueError("nothing is being steered here: press Steer first")
        return self.jobs[tab]

    def end(self, tab: str) -> None:
        """End all work that a tab has started, on all pages."""
        self.halt(tab)
        self._end_job(tab)

    def _end_job(self, tab: str) -> None:
        job = self.jobs.pop(tab, None)
        if job is not None:
            job.end()

    def close(self) -> None:
        """End all runs, and wait until the sampler has released the network."""
        for tab in [*self.jobs, *(tab for tab, _ in self._halts)]:
            self.end(tab)
        if self._turn.acquire(timeout=30):
            self._turn.release()

    def save(self, tab: str, name: str) -> Path:
        """Write a tab's finished pictures as a run folder, and return it.

        `steer sample --config FOLDER/config.yaml` makes the same pictures again, in a new folder
        next to it.

        Raises:
            ValueError: there are no pictures yet, or the path is outside of the folder.
            FileExistsError: a folder of that name exists.
        """
        job = self.job(tab)
        result = job.result
        if result is None and job.finished:
            raise ValueError("this run ended with an error and has no pictures: press Steer again")
        if result is None:
            raise ValueError(
                "the pictures are not finished: wait for the last step, or press Stop"
            )
        from recipes.identity import config_text, settings_of
        from steer.sampling.result import save_result

        place = inside(self.root, name)
        settings = job.ask.settings(self.model, f"{place}-again", self.device)
        note = TOUCHED * job.touched
        files = {
            "config.yaml": note + config_text(settings_of(settings)),
            "command.txt": job.ask.command(self.model, f"{place}-again", self.device)
            + "\n"
            + note,
        }
        return save_result(result, place, files=files)
