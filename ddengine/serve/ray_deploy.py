"""The service as a Ray Serve application: a light HTTP front, and replicas that each hold one engine.

`build` is what a configuration file for `serve deploy` names; examples/serve/config.yaml is such a file.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ddengine.errors import InputError
from ddengine.serve.app import create_app
from ddengine.serve.contract import EditJob, Event, PrepareJob, Readiness, Stats
from ddengine.serve.faults import Fault
from ddengine.serve.keys import is_loopback
from ddengine.serve.limits import Limits
from ddengine.serve.local import LocalWorkers
from ddengine.serve.logs import log_json
from ddengine.serve.options import EngineOptions, ServeOptions, read_keys
from ddengine.serve.ray_router import PATH
from ddengine.serve.ray_workers import RayWorkers
from ddengine.serve.service import Service

NAME, FRONT, ENGINES = "ddengine", "Front", "Engines"
SPARE = 16  # calls to a replica that are no jobs: its state, what to forget; requests that are refused
NOT_READY = "the worker does not get ready: "
STARTING, BROKEN = ("loading", "testing"), ("failed", "poisoned")


class EngineReplica:
    """One engine in a process of its own, which takes calls once its first edit has passed."""

    async def __init__(self, options: EngineOptions, limits: Limits) -> None:  # type: ignore[misc]
        log_json()
        self._id: str = serve.get_replica_context().replica_id.unique_id
        self._drain_s = limits.drain_s
        self._workers = LocalWorkers.start(options.load, limits)
        while (found := await self._workers.ready()).state in STARTING:
            await asyncio.sleep(0.05)
        if not found.ready:
            raise RuntimeError(f"{NOT_READY}{found.reason}")

    async def edit(self, job: EditJob, home: str | None = None) -> AsyncIterator[tuple[str, Event]]:
        """Events of an edit, each with this replica's id. The router reads `home`."""
        async with _closing(self._workers.edit(job)) as events:
            async for event in events:
                yield self._id, event

    async def prepare(self, job: PrepareJob, home: str | None = None) -> AsyncIterator[tuple[str, Event]]:
        async with _closing(self._workers.prepare(job)) as events:
            async for event in events:
                yield self._id, event

    async def forget(self, source: str, home: str | None = None) -> bool:
        return await self._workers.forget(source)

    async def ready(self, home: str | None = None) -> Readiness:
        return await self._workers.ready()

    async def stats(self, home: str | None = None) -> Stats:
        return await self._workers.stats()

    async def check_health(self) -> None:
        """Serve replaces a replica whose device has failed: nothing will run in its process any more."""
        found = await self._workers.ready()
        if found.state in BROKEN:
            raise RuntimeError(f"the worker is {found.state}: {found.reason}")

    async def __del__(self) -> None:
        await self._workers.close(self._drain_s)


@dataclass(frozen=True)
class Deployed:
    """What a deployment says beyond `ServeOptions`.

    gpus, cpus: what each replica takes of its machine, in parts of one if need be. at_least: replicas when nothing is
    to do; at most there are `limits.concurrency`. key_file: read where the front runs. host: what Serve listens on.
    """

    gpus: float = 0.0
    cpus: float = 1.0
    at_least: int | None = None
    key_file: str | None = None
    host: str = "127.0.0.1"


def application(options: ServeOptions, deployed: Deployed | None = None) -> serve.Application:
    """The application for `serve.run`."""
    deployed = deployed or Deployed(host=options.host)
    limits = options.limits
    most = limits.concurrency
    scaling: dict[str, Any] = {"num_replicas": most}
    least = most if deployed.at_least is None else deployed.at_least
    if least < most:
        scaling = {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 2}}
    engines = serve.deployment(
        name=ENGINES,
        ray_actor_options={"num_cpus": deployed.cpus, "num_gpus": deployed.gpus},
        max_ongoing_requests=limits.queue + most + SPARE,
        request_router_config=RequestRouterConfig(request_router_class=PATH),  # type: ignore[arg-type]
        health_check_period_s=3,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=limits.drain_s + 5,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False},
        **scaling,
    )(EngineReplica).bind(_on_gpu(options.engine, deployed.gpus), limits)

    def made() -> ASGIApp:
        return _front(options, deployed)

    @serve.ingress(made)
    class Front:
        """Where requests arrive. One replica: it keeps the queue, the jobs and which replica has which source."""

        def __init__(self, engines: Any) -> None:
            """engines: so that Serve deploys them first; `_front` finds their handle by name."""

        async def drain(self) -> None:
            await _drain()

    return serve.deployment(
        name=FRONT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=limits.connections + SPARE,  # Guard refuses those beyond, and answers health checks
        max_queued_requests=limits.connections,
        graceful_shutdown_timeout_s=limits.drain_s + 10,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"enable_access_log": False},
    )(Front).bind(engines)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a configuration file's `args`.

    host: http_options.host again; names: further Host headers; key_file: see `read_keys`, on the front's machine;
    replicas: [least, most]; gpus, cpus: of each replica; engine, limits: fields of `EngineOptions` and `Limits`.
    Without a key the front answers requests to a loopback address alone, whatever the file says. InputError.
    """
    known = {"host", "names", "key_file", "replicas", "gpus", "cpus", "engine", "limits"}
    if unknown := args.keys() - known:
        raise InputError(f"args holds {', '.join(sorted(unknown))}; it may hold {', '.join(sorted(known))}")
    least, most = args.get("replicas", (1, 1))
    try:
        engine = EngineOptions(**args.get("engine", {}))
        limits = Limits(**{**args.get("limits", {}), "concurrency": most})
    except TypeError as error:
        raise InputError(f"args: {error}; see ddengine serve --help") from error
    # Whether the address asks for a key, `_front` says: the key is on its machine, not on the one that deploys.
    options = ServeOptions(engine, limits, names=tuple(map(str, args.get("names", ()))))
    deployed = Deployed(
        float(args.get("gpus", 0)),
        float(args.get("cpus", 1)),
        int(least),
        args.get("key_file"),
        str(args.get("host", "127.0.0.1")),
    )
    return application(options, deployed)


class LoopbackOnly:
    """ASGI: refuses what was not sent to a loopback address of this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_loopback((scope.get("server") or ("",))[0]):
            fault = Fault("unauthorized", "this service has no API key, so it answers its own machine alone")
            answer = JSONResponse(fault.body(scope["path"]), fault.status, fault.headers())
            return await answer(scope, receive, send)
        await self.app(scope, receive, send)


_service: Service | None = None


def _front(options: ServeOptions, deployed: Deployed) -> ASGIApp:
    """The HTTP application, in the process of the front's replica."""
    global _service
    log_json()
    path = None if deployed.key_file is None else Path(deployed.key_file)
    keys = options.keys or read_keys(path, os.environ.get("DDENGINE_API_KEY"))
    options = replace(options, host=deployed.host, keys=keys)
    handle = serve.get_deployment_handle(ENGINES, serve.get_replica_context().app_name)
    app = create_app(RayWorkers(handle), options.limits, keys, hosts=options.hosts)
    _service = app.state.service
    return app if keys else LoopbackOnly(app)


async def _drain() -> None:
    if _service is not None:
        await _service.stop()


def _closing(events: AsyncIterator[Event]) -> aclosing[AsyncGenerator[Event, None]]:
    """Events that are closed, and so their job cancelled, as soon as nobody reads them any more."""
    return aclosing(cast("AsyncGenerator[Event, None]", events))


def _on_gpu(options: EngineOptions, gpus: float) -> EngineOptions:
    """A replica sees its own GPU alone, as the first one."""
    return replace(options, device="cuda") if gpus and options.device.startswith("cuda") else options
