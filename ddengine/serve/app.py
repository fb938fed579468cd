"""The HTTP application: a FastAPI app over some workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from ddengine import __version__
from ddengine.serve import edits, health, inference, sources_api
from ddengine.serve.contract import Workers
from ddengine.serve.errors import handle
from ddengine.serve.guard import Guard
from ddengine.serve.keys import LOOPBACK, check_keys
from ddengine.serve.limits import Limits
from ddengine.serve.openapi import describe
from ddengine.serve.service import Service


def create_app(
    workers: Workers,
    limits: Limits | None = None,
    key: str | Sequence[str] | None = None,
    *,
    hosts: Sequence[str] | None = LOOPBACK,
    name: str = "ddengine",
    close_workers: bool = True,
) -> FastAPI:
    """An application over workers; with its lifespan it drains, and closes them unless told not to.

    key: the API key, or several, without which nothing but the health checks is answered; needed wherever others than
    this machine can connect (whoever binds the address sees to that: `check_bind`). hosts: names that Host headers may
    have where there is no key, None for any; the default is what browsers on this machine use, so that no name of
    another site leads here. name: the model's name in the Open Inference Protocol. Raises InputError for a key that is
    too short.
    """
    keys = (key,) if isinstance(key, str) else tuple(key or ())
    check_keys(keys)
    limits = limits or Limits()
    service = Service(workers, limits, name, keys, None if hosts is None else tuple(hosts))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.intake.warm()
        yield
        await service.stop()
        if close_workers:
            await workers.close(0)

    app = FastAPI(
        title="ddengine",
        summary="Drag-based image editing: a picture and an arrow in, an edited picture out.",
        version=__version__,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    handle(app)
    for router in (edits.router, sources_api.router, health.router, inference.router):
        app.include_router(router)
    app.add_middleware(Guard, service=service)
    describe(app)
    return app
