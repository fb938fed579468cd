"""The OpenAPI schema: as in openapi.json beside this, and kept by whatever schemathesis thinks of.

After a change that is meant: DDENGINE_WRITE_SNAPSHOTS=1 pytest tests/serve/test_openapi.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve_fakes import PICTURE, FakeEngine

from ddengine.config import PRESETS
from ddengine.serve.app import create_app
from ddengine.serve.limits import Limits
from ddengine.serve.local import LocalWorkers

schemathesis = pytest.importorskip("schemathesis", reason="pip install 'ddengine[test]'")

from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

schemathesis.openapi.media_type("image/png", st.just(PICTURE))

SNAPSHOT = Path(__file__).with_name("openapi.json")
WORDS = {"title", "summary", "description", "version", "operationId"}  # for people, or of the library's making


def plain(value):
    """A schema without its words, in a settled order."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in sorted(value.items()) if key not in WORDS or isinstance(part, dict)}
    return [plain(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def app():
    workers = LocalWorkers.start(FakeEngine(steps=1).load, Limits(), self_test=False)
    app = create_app(workers, Limits(body_bytes=1 << 20, deadline_s=20.0), hosts=None)
    yield app
    workers.worker.close()
    app.state.service.intake.close()


def test_the_schema_is_the_one_that_clients_know(app):
    found = json.loads(json.dumps(plain(app.openapi())))
    if os.environ.get("DDENGINE_WRITE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_schema_says_what_it_cannot_do_without(app):
    schema = app.openapi()
    references = set()

    def walk(value) -> None:
        if isinstance(value, dict):
            references.update([value["$ref"]] if "$ref" in value else [])
            for part in value.values():
                walk(part)
        elif isinstance(value, list):
            for part in value:
                walk(part)

    walk(schema)
    assert set(schema["components"]["schemas"]["EditIn"]["properties"]["config"]["anyOf"][0]["enum"]) == set(PRESETS)
    assert references and all(ref.rpartition("/")[2] in schema["components"]["schemas"] for ref in references)
    for path, methods in schema["paths"].items():
        for method, about in methods.items():
            assert about.get("summary") and about.get("description"), (method, path)
            assert "400" not in about["responses"] or "requestBody" in about
    edit = schema["paths"]["/v1/edits"]["post"]
    wanted = {200, 202, 400, 401, 403, 404, 406, 408, 410, 413, 415, 421, 422, 429, 500, 503, 504}
    assert {int(status) for status in edit["responses"]} >= wanted


PATHS = {
    "/v1/edits": ["POST"],
    "/v1/edits/{edit_id}": ["GET", "DELETE"],
    "/v1/edits/{edit_id}/picture": ["GET"],
    "/v1/edits/{edit_id}/events": ["GET"],
    "/v1/sources": ["POST"],
    "/v1/sources/{source}": ["DELETE"],
    "/v2": ["GET"],
    "/v2/health/live": ["GET"],
    "/v2/health/ready": ["GET"],
    "/v2/models/{name}": ["GET"],
    "/v2/models/{name}/ready": ["GET"],
    "/v2/models/{name}/infer": ["POST"],
    "/metrics": ["GET"],
}
OPERATIONS = [(path, method) for path, methods in PATHS.items() for method in methods]


@pytest.fixture(scope="module")
def schema(app):
    async def without_lifespan(scope, receive, send):  # each request would begin and end one
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        for what in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{what}.complete"})

    return schemathesis.openapi.from_asgi("/openapi.json", without_lifespan)


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_the_service_keeps_its_schema(schema, path, method, mode):
    """Requests that fit the schema and requests that do not: answers are among those it tells of, and never a 500."""
    operation, mode = schema[path][method], schemathesis.GenerationMode(mode)
    if mode.is_negative and path in ("/v2", "/v2/health/live", "/v2/health/ready", "/metrics"):
        return  # nothing in them can be wrong
    count = 24 if method == "POST" else 4

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        # Its pictures fit the schema, a string of bytes, and are refused all the same.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


def test_no_route_is_left_out(app):
    assert {path: sorted(method.upper() for method in about) for path, about in app.openapi()["paths"].items()} == {
        path: sorted(methods) for path, methods in PATHS.items()
    }
