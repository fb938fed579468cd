"""What the routes of one application share."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from ddengine.config import DirectDragConfig
from ddengine.errors import InputError
from ddengine.serve.contract import Picture, Workers
from ddengine.serve.faults import Fault
from ddengine.serve.ids import Ids
from ddengine.serve.jobs import Jobs
from ddengine.serve.limits import Limits
from ddengine.serve.line import settled
from ddengine.serve.metrics import Metrics
from ddengine.serve.pictures import Intake
from ddengine.serve.schemas import EditIn, PrepareIn

Done = TypeVar("Done")


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
        return await asyncio.get_running_loop().run_in_executor(self.intake.threads, self.intake.read, data)

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

    async def stop(self) -> None:
        """Drain and let go of everything but the workers."""
        await self.jobs.drain(self.limits.drain_s)
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
