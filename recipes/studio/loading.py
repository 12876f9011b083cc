"""What takes a while to load, by a thread of its own: the page is there before it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Loading"]

Loaded = TypeVar("Loaded")


class Loading(Generic[Loaded]):
    """A value that a thread makes once, and that others wait for.

    >>> found = Loading(lambda: 3)
    >>> found.ready, found.get(), found.ready
    (False, 3, True)

    Args:
        load: makes it; an error of its own is raised by `get`.
    """

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._future: Future[Loaded] = Future()
        self._lock = threading.Lock()
        self._begun = False

    def start(self) -> None:
        """Begin, if that was not done yet."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
        threading.Thread(target=self._work, daemon=True, name="loading").start()

    def _work(self) -> None:
        try:
            self._future.set_result(self._load())
        except BaseException as error:  # raised where it is waited for
            self._future.set_exception(error)

    @property
    def ready(self) -> bool:
        """Whether there is nothing to wait for, loaded or failed."""
        return self._future.done()

    @property
    def error(self) -> BaseException | None:
        """What went wrong; None while it loads, and where nothing did."""
        return self._future.exception() if self._future.done() else None

    def get(self) -> Loaded:
        """Begin if needed, wait, and return the value."""
        self.start()
        return self._future.result()

    def when_done(self, act: Callable[[], None]) -> None:
        """Call a function when there is nothing to wait for any more."""
        self._future.add_done_callback(lambda _: act())
