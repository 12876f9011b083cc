"""uvicorn's HTTP protocol with limits on how many connections may wait, and for how long.

uvicorn has no time limit for receiving a request's head, or for the client reading the answer.
Here both have a deadline. If there are too many connections, a waiting one is closed: the oldest
one of the client that has the most. A connection whose request is being processed is never closed.
"""

import asyncio
from collections import Counter

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["CONNECTIONS", "HEAD", "PER_CLIENT", "TAKE", "Doorway"]

HEAD = 10.0
"""Maximum seconds for a request's head, from the connection or its first byte on."""

TAKE = 60.0
"""Maximum seconds for a client to read its answer."""

CONNECTIONS = 256
"""Maximum number of connections of a process."""

PER_CLIENT = 128
"""Maximum number of connections from one address."""


class Doorway(H11Protocol):
    """A connection with deadlines."""

    since = 0.0
    deadline: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> bool:
        """Whether no request is being processed."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the connection's deadline, and make room for it."""
        super().connection_made(transport)
        self.since = self.loop.time()
        self._until(HEAD)
        mine = [one for one in self._others() if one.address == self.address]
        if len(mine) >= PER_CLIENT:
            self._end_one_of(mine)
        elif len(self.connections) > CONNECTIONS:
            self._end_one_of(self._others())

    def data_received(self, data: bytes) -> None:
        """Take the received data; the deadline runs from the first byte of a head to its last."""
        if self.waiting and self.deadline is None:
            self._until(HEAD)
        super().data_received(data)
        if not self.waiting:
            self._until(None)

    def on_response_complete(self) -> None:
        """Start the deadline for the client to read the answer."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(TAKE, self._end_if_not_taken, self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        self._until(None)
        super().connection_lost(exc)

    @property
    def address(self) -> str:
        """The client's address, without its port."""
        return self.client[0] if self.client else ""

    def _until(self, seconds: float | None) -> None:
        """Start the deadline, or cancel it."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self.deadline = None
        if self.waiting:
            self.transport.abort()

    def _end_if_not_taken(self, answered: object) -> None:
        """Close a connection whose answer has not been read in time."""
        if self.cycle is answered and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _others(self) -> "list[Doorway]":
        return [c for c in self.connections if isinstance(c, Doorway) and c is not self]

    def _end_one_of(self, others: "list[Doorway]") -> None:
        """Close the oldest waiting connection of the client that has the most; else this one."""
        counts = Counter(one.address for one in others)
        waiting = [one for one in others if one.waiting and not one.transport.is_closing()]
        gone = min(waiting, key=lambda one: (-counts[one.address], one.since), default=self)
        gone.transport.abort()
