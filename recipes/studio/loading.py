"""Loading in a background thread, so that the page is shown before."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["Loading"]

Loaded = TypeVar("Loaded")


class Loading(Generic[Loaded]):
    """A value that a thread computes once, and that others wait for.

    >>> found = Loading(lambda: 3)
    >>> found.ready, found.get(), found.ready
    (False, 3, True)

    Args:
        load: computes the value; `get` raises its error.
    """

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._future: Future[Loaded] = Future()
        self._lock = threading.Lock()
        self._begun = False

    def start(self) -> None:
        """Start loading, if it has not been started yet."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
        threading.Thread(target=self._work, daemon=True, name="loading").start()

    def _work(self) -> None:
        try:
            self._future.set_result(self._load())
        except BaseException as error:  # raised by `get`
            self._future.set_exception(error)

    @property
    def ready(self) -> bool:
        """Whether loading has ended, successfully or not."""
        return self._future.done()

    @property
    def error(self) -> BaseException | None:
        """The error of loading; None while it is loading, and after success."""
        return self._future.exception() if self._future.done() else None

    def get(self) -> Loaded:
        """Start loading if needed, wait, and return the value."""
        self.start()
        return self._future.result()

    def when_done(self, act: Callable[[], None]) -> None:
        """Call a function when loading has ended."""
        self._future.add_done_callback(lambda _: act())
