"""The OpenAPI schema: what FastAPI finds, and what it cannot see in bodies that are read by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from ddengine.serve.schemas import EditIn, EditOut, PrepareIn
from ddengine.serve.tensors import InferIn, InferOut

_PREFIX = "#/components/schemas/{model}"


def describe(app: FastAPI) -> None:
    """Give an application its schema, made once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _schema(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    bodies = [(form, "validation") for form in (EditIn, PrepareIn, InferIn)]
    answers = [(form, "serialization") for form in (EditOut, InferOut)]
    _, more = models_json_schema([*bodies, *answers], ref_template=_PREFIX)  # type: ignore[list-item]
    parts = found.setdefault("components", {})
    parts["schemas"] = dict(sorted({**parts.get("schemas", {}), **more["$defs"]}.items()))
    for unused in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(unused, None)
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "where keys are set"}}
    found["security"] = [{}, {"key": []}]
    return found
