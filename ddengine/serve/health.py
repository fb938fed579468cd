"""Health, metadata and metrics: the Open Inference Protocol's server endpoints and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from ddengine import __version__
from ddengine.serve.errors import errors
from ddengine.serve.metrics import CONTENT_TYPE
from ddengine.serve.service import service_of

router = APIRouter()


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    """ready: whether edits are taken; state: loading, testing, ready, failed, poisoned or draining, and why."""

    ready: bool
    state: str
    reason: str = ""


class Server(BaseModel):
    name: str
    version: str
    extensions: list[str]


@router.get("/v2", tags=["inference"], response_model=Server, responses=errors(401, 403, 421, 503, protocol=True))
async def server() -> Any:
    """What this server is."""
    return Server(name="ddengine", version=__version__, extensions=["binary_tensor_data"])


@router.get("/v2/health/live", tags=["health"], response_model=Live, responses=errors(403, protocol=True))
async def live() -> Any:
    """Whether the process answers."""
    return Live(live=True)


@router.get(
    "/v2/health/ready",
    tags=["health"],
    response_model=Ready,
    responses={503: {"model": Ready, "description": "not ready"}, **errors(403, protocol=True)},
)
async def ready(request: Request) -> Response:
    """Whether edits are taken: 200 once the model is loaded and a first edit has passed, 503 otherwise."""
    found = await readiness(request)
    return JSONResponse(found.model_dump(), 200 if found.ready else 503)


async def readiness(request: Request) -> Ready:
    service = service_of(request)
    if service.jobs.draining:
        return Ready(ready=False, state="draining", reason="the service is being stopped")
    found = await service.workers.ready()
    return Ready(ready=found.ready, state=found.state, reason=found.reason)


@router.get(
    "/metrics",
    tags=["health"],
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors(401, 403, 421, 503)},
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    service = service_of(request)
    text = service.metrics.text(await service.workers.stats(), service.jobs.open)
    return Response(text, media_type=CONTENT_TYPE)
