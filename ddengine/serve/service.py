"""What the routes of one application share."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from ddengine.config import DirectDragConfig
from ddengine.errors import InputError
from ddengine.serve.contract import Edited, Failed, Picture, Prepared, Workers
from ddengine.serve.faults import Fault
from ddengine.serve.ids import Ids
from ddengine.serve.jobs import Job, Jobs
from ddengine.serve.limits import Limits
from ddengine.serve.line import settled
from ddengine.serve.metrics import Metrics
from ddengine.serve.pictures import Intake
from ddengine.serve.schemas import EditIn, PrepareIn

Done = TypeVar("Done")
FETCH_S = 2.0  # that a stopping service goes on for after its last job


@dataclass
class Service:
    """Workers, limits and everything an application keeps; `request.app.state.service`."""

    workers: Workers
    limits: Limits
    name: str
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    ids: Ids = field(default_factory=Ids)
    metrics: Metrics = field(default_factory=Metrics)
    intake: Intake = field(init=False)
    jobs: Jobs = field(init=False)

    def __post_init__(self) -> None:
        self.intake = Intake(self.limits)
        self.jobs = Jobs(self.limits, self.metrics)

    async def picture(self, data: bytes) -> Picture:
        """Checked pixels of a picture file's bytes."""
        return await self.aside(self.intake.read, data)

    async def aside(self, work: Callable[..., Done], *args: Any) -> Done:
        """What a function makes of something sent that may be large: as few at once as pictures are decoded."""
        try:
            found = asyncio.get_running_loop().run_in_executor(self.intake.threads, work, *args)
        except RuntimeError as error:  # they have ended
            raise Fault("unavailable", "the service is being stopped", 5) from error
        return await found

    def check(self, asked: PrepareIn) -> float:
        """The deadline of a request in seconds; Fault invalid for one that goes beyond the limits."""
        limits = self.limits
        if isinstance(asked, EditIn) and len(asked.drags) > limits.points:
            raise Fault("invalid", f"{len(asked.drags)} drags were given, the limit is {limits.points}; use fewer")
        if len(asked.prompt) > limits.prompt:
            raise Fault("invalid", f"the prompt has {len(asked.prompt)} characters, the limit is {limits.prompt}")
        if asked.deadline_s is not None and asked.deadline_s > limits.deadline_s:
            raise Fault("invalid", f"deadline_s is {asked.deadline_s:g}, the limit is {limits.deadline_s:g}")
        if not (isinstance(asked, EditIn) and asked.source is not None):
            self.config(asked)
        return asked.deadline_s or limits.deadline_s

    def config(self, asked: PrepareIn) -> DirectDragConfig:
        try:
            return self.limits.check_cost(settled(asked.config, tuple(asked.settings.items())))
        except InputError as error:
            raise Fault("invalid", str(error)[:600]) from error

    async def drain(self) -> None:
        """Let jobs end for as long as they may; then, if time is left, whoever follows one fetches what came of it."""
        ends, busy = time.monotonic() + self.limits.drain_s, self.jobs.open
        await self.jobs.drain(self.limits.drain_s)
        if busy:
            await asyncio.sleep(max(0.0, min(FETCH_S, ends - time.monotonic())))

    async def stop(self) -> None:
        """Drain, unless that has been done, and let go of everything but the workers."""
        await self.drain()
        self.intake.close()


def service_of(request: Request) -> Service:
    found = request.app.state.service
    assert isinstance(found, Service)
    return found


def owner_of(request: Request) -> str:
    """Whose request this is: a digest of its key, empty where none is asked for."""
    return str(request.scope.get("ddengine.owner", ""))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


async def disconnected(request: Request) -> None:
    """Return once the client has gone; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, wanted: Callable[[], Any]) -> Any:
    """What an awaitable gives; Fault client_gone where the client goes before, the awaitable being cancelled."""
    work, gone = asyncio.ensure_future(wanted()), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise Fault("client_gone", "the client has gone")
    finally:
        for task in (work, gone):
            task.cancel()


async def outcome(request: Request, job: Job) -> Edited | Prepared:
    """What a job ends with that this request alone waits for, and that ends with it; Fault where it failed."""
    try:
        final: Edited | Prepared | Failed = await unless_gone(request, job.ended)
    finally:
        job.cancel("client_gone", "the client has gone")
    if isinstance(final, Failed):
        raise Fault.of(final)
    return final
