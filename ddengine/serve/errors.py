"""Error answers: how the application makes them, and how its OpenAPI schema describes them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ddengine.serve.contract import STATUS
from ddengine.serve.faults import Fault
from ddengine.serve.schemas import ErrorBody, ProtocolError

_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media"}


def errors(*statuses: int, protocol: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these; protocol: in the Open Inference Protocol's form."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        codes = sorted(code for code, number in STATUS.items() if number == status)
        found[status] = {"model": ProtocolError if protocol else ErrorBody, "description": ", ".join(codes)}
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return found


def handle(app: FastAPI) -> None:
    """Have every error of an application answered in the one form; those of nobody's making are Guard's."""

    @app.exception_handler(Fault)
    async def fault(request: Request, error: Fault) -> JSONResponse:
        return _answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _answer(request, Fault("invalid", f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:600]))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        answer = _answer(request, Fault(_BY_STATUS.get(error.status_code, "bad_request"), str(error.detail)[:600]))
        answer.headers.update(error.headers or {})
        return answer


def _answer(request: Request, error: Fault) -> JSONResponse:
    request.app.state.service.metrics.refused(error.code)
    return JSONResponse(error.body(request.url.path), error.status, error.headers())
