"""The studio in a real browser: time until it responds, and the cost of watching a run.

Starts: `steer studio` in a process of its own, until the page answers, until chromium can press
Steer, and until it shows the first steered lookahead.

Live steps: in one run that chromium shows, blocks of steps are watched and not watched in turn.
An unwatched step is made by the same sampler on the same particles, but not reported to the page.
The figure is the median over pairs of neighbouring blocks of the mean watched step's time over the
mean unwatched one's. The first step of a block is left out, because it is made while the page
still shows, or not yet shows, the block before. Run it with the machine otherwise idle:

    python -m benchmarks.studio

Needs playwright and chromium (apt-get install chromium).
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

BLOCK = 8
"""Steps of a block; the first is not counted. The page draws at most two steps a second."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser, headless."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise SystemExit("no chromium here: apt-get install chromium")
    with sync_playwright() as run:
        browser = run.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def answered(address: str, server: "subprocess.Popen[bytes] | None" = None) -> None:
    """Wait until a page answers."""
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except (urllib.error.URLError, OSError):
            if server is not None and server.poll() is not None:
                raise SystemExit("the studio ended before it answered") from None
            time.sleep(0.02)


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process, which does not depend on the load of the machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Moment = tuple[float, float]  # wall-clock seconds, and the server's processor time


def started(browser: Any, root: Path) -> tuple[Moment, Moment, Moment]:
    """Return the times from `steer studio` to its answer, its button, and a steered picture."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    words = ["-m", "recipes.cli", "studio", "--root", str(root), "--port", str(port)]
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def now() -> Moment:
        return time.perf_counter() - began, processor_seconds(server.pid)

    try:
        answered(address, server)
        answer = now()
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_selector("#start")
        button = now()
        page.click("#start")
        page.wait_for_selector("#strip img")
        picture = now()
        page.close()
    finally:
        server.terminate()
        server.wait()
    return answer, button, picture


def every_other_block(job_type: Any) -> Any:
    """Return a job that reports its steps only in every other block."""

    class Blocks(job_type):  # type: ignore[misc]
        jobs: ClassVar[list[Any]] = []

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            Blocks.jobs.append(self)
            self.kept, plain, counted = self.events, self.events.put, [0]

            def put(event: tuple[str, Any]) -> None:
                if event[0] == "step":
                    counted[0] += 1
                    if (counted[0] - 1) // BLOCK % 2:
                        self._room.release()  # as if it had been shown
                        return
                plain(event)

            self.events = _Told(put, self.events.get)

    return Blocks


class _Told:
    """A queue with another `put`."""

    def __init__(self, put: Any, get: Any) -> None:
        self.put, self.get = put, get


def ratios(seconds: list[float]) -> tuple[list[float], list[float], list[float]]:
    """Return watched over unwatched for pairs of neighbouring blocks, and the steps of each kind.

    Args:
        seconds: seconds of each step of a run, in alternating blocks, watched ones first.
    """
    blocks = [seconds[i : i + BLOCK] for i in range(0, len(seconds) - BLOCK + 1, BLOCK)][1:]
    shift = 1  # the first block, which includes the start of the run, is left out
    means = [statistics.mean(block[1:]) for block in blocks]
    watched = [m for i, m in enumerate(means, shift) if i % 2 == 0]
    plain = [m for i, m in enumerate(means, shift) if i % 2]
    pairs = []
    for i, one in enumerate(means[:-1], shift):
        other = means[i + 1 - shift]
        pairs.append(one / other if i % 2 == 0 else other / one)
    return pairs, watched, plain


def live(browser: Any, root: Path, runs: int, steps: int) -> tuple[list[float], float, float]:
    """Return the ratios of all runs, and the medians of a watched and of a plain step."""
    import uvicorn

    from recipes.studio import jobs
    from recipes.studio.command import application
    from recipes.studio.session import Studio

    state = Studio("emoji", root)
    state.loading.get()
    jobs.Job = every_other_block(jobs.Job)  # type: ignore[misc]
    port = free_port()
    config = uvicorn.Config(application(state), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{port}/"
    answered(address)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(600_000)
    page.goto(address)
    page.wait_for_selector("#start")
    page.fill("#steps input[type=number]", str(steps))
    page.keyboard.press("Tab")
    found: list[float] = []
    watched: list[float] = []
    plain: list[float] = []
    for seed in range(runs + 1):
        page.fill("#seed input", str(seed))
        page.keyboard.press("Tab")
        page.click("#start")
        page.wait_for_function("document.querySelector('#message').innerText.startsWith('step')")
        page.wait_for_function("document.querySelector('#message').innerText.startsWith('done')")
        if seed:  # the first is a warm-up
            pairs, a, b = ratios(jobs.Job.jobs[-1].seconds)  # type: ignore[attr-defined]
            found, watched, plain = found + pairs, watched + a, plain + b
    page.close()
    server.should_exit = True
    thread.join(10)
    return found, statistics.median(watched), statistics.median(plain)


def _print_starts(times: Sequence[tuple[Moment, Moment, Moment]]) -> None:
    names = "the page's answer", "the page in chromium", "the first steered lookahead"
    print("| from `steer studio` to | median | least | processor time, least |")
    print("|---|---|---|---|")
    for name, row in zip(names, zip(*times, strict=True), strict=True):
        clock, work = zip(*row, strict=True)
        print(
            f"| {name} | {statistics.median(clock):.1f} s | {min(clock):.1f} s "
            f"| {min(work):.1f} s |",
            flush=True,
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.starts:
            times = [started(browser, root) for _ in range(args.starts)]
            _print_starts(times)
        if args.runs:
            found, watched, plain = live(browser, root, args.runs, args.steps)
            low, _, high = statistics.quantiles(found, n=4)
            print(
                f"\n| a step | ms |\n|---|---|\n| watched in chromium | {1e3 * watched:.0f} |\n"
                f"| of the same run, not watched | {1e3 * plain:.0f} |\n\n"
                f"watched over not watched, median of {len(found)} pairs (quartiles): "
                f"{statistics.median(found):.3f} ({low:.3f} to {high:.3f})"
            )


if __name__ == "__main__":
    main()
