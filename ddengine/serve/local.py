"""One worker in this very process, behind the interface that the application knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ddengine.serve.contract import FINAL, EditJob, Event, PrepareJob, Readiness, Stats
from ddengine.serve.worker import Worker

if TYPE_CHECKING:
    from ddengine.engine import Engine
    from ddengine.serve.limits import Limits


class LocalWorkers:
    """`Workers` of one engine and one thread; also what a remote worker runs inside.

    Several event loops may use one at once (its jobs keep the loop they were handed over in).
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    @classmethod
    def start(
        cls,
        load: Callable[[], Engine],
        limits: Limits | None = None,
        *,
        self_test: bool = True,
        lost: Callable[[], object] | None = None,
    ) -> LocalWorkers:
        """Start loading an engine; see `Worker`."""
        return cls(Worker(load, limits, self_test=self_test, lost=lost))

    def edit(self, job: EditJob) -> AsyncIterator[Event]:
        return self._events(job)

    def prepare(self, job: PrepareJob) -> AsyncIterator[Event]:
        return self._events(job)

    async def _events(self, job: EditJob | PrepareJob) -> AsyncIterator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has been closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        self.worker.submit(job, emit)
        ended = False
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, FINAL)
                yield event
        finally:
            if not ended:
                self.worker.cancel(job.id)
                if isinstance(job, PrepareJob):  # it may be there already: nobody will ever name it
                    self.worker.forget(job.source)

    async def forget(self, source: str) -> bool:
        return self.worker.forget(source)

    async def ready(self) -> Readiness:
        return self.worker.readiness()

    async def stats(self) -> Stats:
        return self.worker.stats()

    async def close(self, drain_s: float = 0.0) -> None:
        await asyncio.to_thread(self.worker.close, drain_s)
