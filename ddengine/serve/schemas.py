"""The JSON of requests and answers, and how a request's JSON is read: strictly, or refused with a code."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddengine.serve.faults import Fault

Preset = Literal["default", "paper", "authors", "gooddrag", "fast", "preview"]

Point = tuple[float, float]
Settings = dict[str, bool | int | float | str]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class DragIn(BaseModel):
    """One arrow: what is at `handle` is to move to `target`; (x, y) in pixels of the upright picture."""

    model_config = _STRICT
    handle: Point
    target: Point


class PrepareIn(BaseModel):
    """How to prepare a picture."""

    model_config = _STRICT
    config: Preset | None = Field(None, description="a preset's name")
    settings: Settings = Field({}, max_length=64, description="fields of the configuration to change")
    prompt: str = Field("", description="what the picture shows; never needed")
    deadline_s: float | None = Field(None, gt=0, description="seconds it may take, waiting included")


class EditIn(PrepareIn):
    """An edit, of the picture sent with it or of a prepared source."""

    drags: list[DragIn] = Field(min_length=1)
    source: str | None = Field(None, max_length=128, description="id of a prepared source, in place of a picture")
    seed: int = Field(0, ge=0, lt=2**63)
    previews: bool = Field(False, description="whether progress events carry pictures")


class ErrorIn(BaseModel):
    """What went wrong: `code` for programs, `message` for people."""

    code: str
    message: str


class ErrorBody(BaseModel):
    error: ErrorIn


class ProtocolError(BaseModel):
    """An error in the form of the Open Inference Protocol."""

    error: str
    code: str


class StepOut(BaseModel):
    """Where an edit stands."""

    stage: str
    step: int
    total: int
    points: list[Point] | None = None


class PictureOut(BaseModel):
    href: str
    width: int
    height: int


class EditOut(BaseModel):
    """An edit. state: queued, running, done, failed or cancelled."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    href: str
    events: str
    queued_behind: int | None = None
    progress: StepOut | None = None
    error: ErrorIn | None = None
    picture: PictureOut | None = None
    handles: list[Point] | None = None
    timings: dict[str, float] | None = None
    passes: dict[str, dict[str, int]] | None = None
    backend: dict[str, str] | None = None
    notes: list[str] | None = None
    waited_s: float | None = None
    batch: int | None = None


class SourceOut(BaseModel):
    """A prepared source; it expires `expires_s` seconds after its last use, or earlier where room is needed."""

    source: str
    width: int
    height: int
    nbytes: int
    expires_s: float
    timings: dict[str, float]
    passes: dict[str, dict[str, int]]
    waited_s: float


Read = TypeVar("Read", bound=BaseModel)


def strict_json(data: bytes) -> Any:
    """JSON without NaN, infinities or repeated keys; Fault bad_request."""
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise Fault("bad_request", "the JSON is nested too deeply") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise Fault("bad_request", f"this is not JSON: {str(error)[:200]}") from error


def read_json(data: bytes, form: type[Read], what: str) -> Read:
    """A request's JSON as a record; Fault bad_request for what is no JSON, invalid for what is no such record."""
    strict_json(data)
    try:
        return form.model_validate_json(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        said = "; ".join(f"{'.'.join(map(str, item['loc'])) or what}: {item['msg']}" for item in found[:3])
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise Fault("invalid", f"{what}: {said[:600]}{more}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
