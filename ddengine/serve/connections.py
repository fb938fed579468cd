"""What may stay connected: nobody holds a connection without a request, and those who try leave room for others."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ddengine.serve.guard import ADMITTED
from ddengine.serve.limits import Limits


def bounded(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol for connections, within `limits.head_s` and `limits.connections`.

    A connection waits while no request of it is let in by Guard: nothing or half a request has come, it is refused for
    want of a key, its answer is not taken. Whichever waits longer than head_s is closed, and of more than so many that
    wait the one that has waited longest: so health checks come through however many there are.
    """

    class Bounded(H11Protocol):  # h11 bounds the size of headers, httptools does not
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.waits_since = self.loop.time()
            self._timer = self.loop.call_later(limits.head_s, self._look)
            waiting = [one for one in self.connections if isinstance(one, Bounded) and not one.admitted]
            if len(waiting) > limits.connections:
                min(waiting, key=lambda one: one.waits_since).transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self.waits_since = self.loop.time()
            super().on_response_complete()

        @property
        def admitted(self) -> bool:
            """Whether a request that was let in is being answered."""
            cycle: Any = self.cycle
            return cycle is not None and not cycle.response_complete and ADMITTED in cycle.scope

        def _look(self) -> None:
            now = self.loop.time()
            if self.admitted:
                self.waits_since = now
            left = self.waits_since + limits.head_s - now
            if left > 0:
                self._timer = self.loop.call_later(left, self._look)
            else:
                self.transport.abort()  # not close(), which waits for a client that does not read

    return Bounded
