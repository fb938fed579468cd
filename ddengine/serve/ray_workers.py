"""The replicas of a Ray Serve deployment as `Workers`, for an HTTP application that has grown past one process."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from contextvars import Context
from typing import Any

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from ddengine.serve.contract import (
    FINAL,
    EditJob,
    Event,
    Failed,
    Prepared,
    PrepareJob,
    Readiness,
    Stats,
)
from ddengine.serve.waiting import within

log = logging.getLogger(__name__)

HOMES = 100_000  # sources whose replica is known here; far above what replicas keep
LATE_S = 2.0  # after which a job is given up whose deadline has passed and whose replica has not said so
ASK_S = 5.0  # for an answer about its state from a replica
KNOWN_S = 0.1  # for which such an answer holds

_present: dict[str, tuple[str, ...]] = {}


def present(deployment: str) -> tuple[str, ...]:
    """Ids of a deployment's replicas, as this process's router knows them; none before the first call."""
    return _present.get(deployment, ())


def note(deployment: str, replicas: Iterable[str]) -> None:
    """What the router has come to know."""
    _present[deployment] = tuple(replicas)


class RayWorkers:
    """`Workers` over a handle; one lives in the process of the HTTP application, and all methods in its event loop.

    The replica that prepares a source is remembered here as its home. When that replica is gone, so is the source, and
    an edit that names it is told so (`gone`).
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._name: str = handle.deployment_name
        self._homes: OrderedDict[str, str] = OrderedDict()
        self._running: dict[str, Any] = {}
        self._draining = False
        self._known: dict[str, tuple[float, list[Any]]] = {}

    def edit(self, job: EditJob) -> AsyncIterator[Event]:
        return self._events("edit", job, job.source)

    def prepare(self, job: PrepareJob) -> AsyncIterator[Event]:
        return self._events("prepare", job, None)

    async def _events(self, method: str, job: EditJob | PrepareJob, source: str | None) -> AsyncIterator[Event]:
        if self._draining:
            yield Failed("unavailable", "the service is being stopped", 5)
            return
        home = None if source is None else self._homes.get(source)
        if source is not None and home not in present(self._name):
            yield Failed("gone", "the source is not kept any more; send the picture again")
            return
        ends = None if job.deadline_s is None else time.monotonic() + job.deadline_s + LATE_S
        call = _apart(getattr(self._handle.options(stream=True), method), job, home=home)
        self._running[job.id] = call
        ended = False
        try:
            while not ended:
                event = await self._next(call, job, ends)
                ended = isinstance(event, FINAL)
                yield event
        finally:
            self._running.pop(job.id, None)
            if not ended:
                call.cancel()

    async def _next(self, call: Any, job: EditJob | PrepareJob, ends: float | None) -> Event:
        """The next event of a call; what goes wrong between here and the replica is one too."""
        facts = {"edit" if isinstance(job, EditJob) else "source": job.id}
        try:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            home, event = await within(call.__anext__(), left)
        except StopAsyncIteration:
            return Failed("unavailable", "the worker ended without an answer; send the edit again", 1)
        except asyncio.TimeoutError:
            call.cancel()
            return Failed("deadline", f"the edit took longer than its deadline of {job.deadline_s:g} s")
        except TaskCancelledError:
            return Failed("cancelled", "the edit was cancelled")
        except BackPressureError:
            return Failed("busy", "too many jobs wait for a worker; try again later", 5)
        except (RayActorError, DeploymentUnavailableError) as error:
            log.warning("a job lost its worker: %s", type(error).__name__, extra={"facts": facts})
            return Failed("unavailable", "the worker was lost and is being replaced; send the edit again", 2)
        except (RayError, RayServeException):
            log.exception("a job failed on its way", extra={"facts": facts})
            return Failed("internal", "the edit failed inside the service; its log says why")
        if isinstance(event, Prepared):
            self._homes[event.source] = home
            if len(self._homes) > HOMES:
                self._homes.popitem(last=False)
        return event

    async def forget(self, source: str) -> bool:
        home = self._homes.pop(source, None)
        self._known.clear()
        if home not in present(self._name):
            return False
        with suppress(RayError, RayServeException, asyncio.TimeoutError):
            return bool(await asyncio.wait_for(_response(_apart(self._handle.forget, source, home=home)), ASK_S))
        return False

    async def ready(self) -> Readiness:
        """Ready when one replica is; what stands in the way is what the first one says."""
        if self._draining:
            return Readiness(False, "draining", "the service is being stopped")
        found = await self._ask("ready")
        if not found:
            return Readiness(False, "loading", "no worker has started yet")
        about = {**found[0].about, "workers": len(found)}
        return dataclasses.replace(next((one for one in found if one.ready), found[0]), about=about)

    async def stats(self) -> Stats:
        found = await self._ask("stats")
        names = [item.name for item in dataclasses.fields(Stats)]
        return Stats(**{name: sum(getattr(one, name) for one in found) for name in names})

    async def close(self, drain_s: float = 0.0) -> None:
        self._draining = True
        ends = time.monotonic() + drain_s
        while self._running and time.monotonic() < ends:
            await asyncio.sleep(0.05)
        for call in list(self._running.values()):
            call.cancel()

    async def _ask(self, method: str) -> list[Any]:
        """What every replica answers that answers in time; for a moment, what they answered before."""
        asked, answers = self._known.get(method, (float("-inf"), []))
        if time.monotonic() - asked < KNOWN_S:
            return answers
        # Before its first call a handle knows of no replica: then any one is asked.
        homes = present(self._name) or (None,)
        calls = [_apart(getattr(self._handle, method), home=home) for home in homes]
        found = await asyncio.gather(*(self._answer(call) for call in calls))
        answers = [one for one in found if one is not None]
        self._known[method] = (time.monotonic(), answers)
        return answers

    async def _answer(self, call: Any) -> Any:
        try:
            return await asyncio.wait_for(_response(call), ASK_S)
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            log.warning("a worker does not say how it is: %s", type(error).__name__)
            call.cancel()
            return None


def _apart(method: Any, *args: Any, home: str | None) -> Any:
    """A call that Serve does not take for a part of the HTTP request that is being answered.

    Calls of one request share an id, by which the router tells calls apart: the second one that waits for a replica
    would wait for ever. And they are cancelled with their request, though another one may wait for the same edit.
    """
    return Context().run(method.remote, *args, home=home)


async def _response(call: Any) -> Any:
    return await call
