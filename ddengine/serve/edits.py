"""/v1/edits: start an edit, follow it, fetch its picture, cancel it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ddengine.serve.accept import JSON, media_for
from ddengine.serve.bodies import documented, read_form
from ddengine.serve.contract import FINAL, Edited, EditJob, Event, Failed, Queued, Step
from ddengine.serve.errors import errors
from ddengine.serve.faults import Fault
from ddengine.serve.jobs import Job, Slot, told
from ddengine.serve.pictures import MEDIA, transcoded
from ddengine.serve.schemas import EditIn, EditOut, ErrorIn, PictureOut, StepOut, read_json
from ddengine.serve.service import Service, owner_of, service_of, unless_gone

router = APIRouter(prefix="/v1/edits", tags=["edits"])

_HEARTBEAT_S = 15.0
_KEY = r"^[\x21-\x7e]{1,200}$"
_PICTURES = {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA}
_JSON_EDIT = {"schema": {"$ref": "#/components/schemas/EditOut"}}
_REPORT = {
    "Edit-Id": {"schema": {"type": "string"}, "description": "the edit's id"},
    "Edit-Report": {"schema": {"type": "string"}, "description": "JSON of handles, timings, passes, waited_s, batch"},
}
EditId = Path(max_length=128, description="an edit's id")


@router.post(
    "",
    summary="Edit a picture",
    response_class=Response,
    responses={
        200: {
            "description": "the edited picture, or JSON of the edit if Accept asks for it",
            "content": {**_PICTURES, JSON: _JSON_EDIT},
            "headers": _REPORT,
        },
        202: {"description": "taken; follow it at `href` or `events`", "model": EditOut},
        **errors(400, 401, 403, 406, 408, 409, 410, 404, 413, 415, 421, 422, 429, 500, 503, 504),
    },
    openapi_extra=documented("edit", "EditIn", alone=True),
)
async def start(
    request: Request,
    prefer: str | None = Header(None, description="respond-async: answer at once, with 202"),
    key: str | None = Header(
        None,
        alias="Idempotency-Key",
        pattern=_KEY,
        description="requests with one key are one edit; an edit that ended for the service's reasons is tried again",
    ),
    in_background: bool = Query(False, alias="async", description="as Prefer: respond-async"),
) -> Response:
    """Move what lies at each drag's handle to its target, in a picture or a prepared source.

    Send multipart/form-data with the parts `picture` and `edit`, or the JSON of `edit` alone with a `source`. The
    answer is the picture (PNG, or what Accept asks for), or with `Accept: application/json` what there is to say of it.
    """
    service, owner = service_of(request), owner_of(request)
    media = media_for(request.headers.get("accept", "*/*"))
    detached = in_background or "respond-async" in (prefer or "").lower()
    with service.jobs.reserve() as slot:
        job = await _job(request, service, owner, key, slot)
    request.scope["ddengine.facts"] = job.facts
    if detached:
        job.detached = True
        return JSONResponse(_body(job), 202, {"Location": f"/v1/edits/{job.id}"})
    await _wait(request, job)
    return await _answer(job, media)


@router.get("/{edit_id}", response_model=EditOut, responses=errors(401, 403, 404, 410, 421, 422, 503))
async def state(request: Request, edit_id: str = EditId) -> Response:
    """Where an edit stands, or how it ended; 404 for an edit that never was, 410 for one that is not kept any more."""
    return JSONResponse(_body(_found(request, edit_id)))


@router.get(
    "/{edit_id}/picture",
    response_class=Response,
    responses={
        200: {"description": "the edited picture", "content": _PICTURES, "headers": _REPORT},
        **errors(401, 403, 404, 406, 409, 410, 421, 422, 500, 503, 504),
    },
)
async def picture(request: Request, edit_id: str = EditId) -> Response:
    """The edited picture; 409 while the edit runs, and the edit's own error where it failed."""
    job = _found(request, edit_id)
    media = media_for(request.headers.get("accept", "*/*"), among=tuple(MEDIA))
    if job.final is None:
        raise Fault("not_finished", "the edit has not ended; follow its events")
    return await _answer(job, media)


@router.get(
    "/{edit_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "server-sent events queued, progress, done and failed, each with a number as its id",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **errors(401, 403, 404, 410, 421, 422, 503),
    },
)
async def events(
    request: Request,
    edit_id: str = EditId,
    last: str | None = Header(None, alias="Last-Event-ID", description="go on after this one"),
) -> Response:
    """Progress as server-sent events, from the beginning or after Last-Event-ID; the stream ends with the edit."""
    job = _found(request, edit_id)
    after = int(last) if last is not None and last.isascii() and last.isdigit() and len(last) < 10 else 0
    return StreamingResponse(_stream(job, after), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


@router.delete("/{edit_id}", response_model=EditOut, responses=errors(401, 403, 404, 410, 421, 422, 503))
async def cancel(request: Request, edit_id: str = EditId) -> Response:
    """Cancel an edit: at once where it waits, at the engine's next step where it runs. An ended one stays as it is."""
    job = _found(request, edit_id)
    if job.cancel("cancelled", "the edit was cancelled"):
        await job.ended()
    return JSONResponse(_body(job))


async def _job(request: Request, service: Service, owner: str, key: str | None, slot: Slot) -> Job:
    """The request's job, new or, by its key, one that is there."""
    form = await read_form(request, "edit")
    if form.json is None:
        raise Fault("invalid", "the part edit is missing; send JSON with drags in it")
    asked = read_json(form.json, EditIn, "edit")
    if (form.picture is None) == (asked.source is None):
        raise Fault("invalid", "send a picture or name a source, one of the two")
    deadline_s = service.check(asked)
    fingerprint = b"" if key is None else await service.aside(_fingerprint, form.picture, asked)
    if key is not None and (known := service.jobs.known(owner, key, fingerprint)) is not None:
        slot.free()
        return known
    found = None
    if asked.source is not None:
        if not service.ids.ours(asked.source, "src", owner):
            raise Fault("not_found", "there is no such source")
    else:
        assert form.picture is not None
        data = form.picture
        found = await unless_gone(request, lambda: service.picture(data))
    job_id = service.ids.new("edt", owner)
    work = EditJob(
        job_id,
        tuple((drag.handle, drag.target) for drag in asked.drags),
        found,
        asked.source,
        asked.config,
        tuple(asked.settings.items()),
        asked.prompt,
        asked.seed,
        deadline_s,
        asked.previews,
    )
    # Nothing is awaited from here on, so of two requests with one key one starts the job and the other finds it.
    if key is not None and (known := service.jobs.known(owner, key, fingerprint)) is not None:
        slot.free()
        return known
    job = service.jobs.start(job_id, "edit", owner, slot, lambda: service.workers.edit(work), deadline_s)
    if key is not None:
        service.jobs.remember(owner, key, fingerprint, job)
    return job


async def _wait(request: Request, job: Job) -> None:
    """Wait for a job's end; where the last one who waits for it goes, it is cancelled."""
    job.waiting += 1
    try:
        await unless_gone(request, job.ended)
    finally:
        job.waiting -= 1
        if not job.waiting and not job.detached:
            job.cancel("client_gone", "the client has gone")


def _found(request: Request, edit_id: str) -> Job:
    service, owner = service_of(request), owner_of(request)
    job = service.jobs.get(edit_id, owner)
    if job is not None and job.kind == "edit":
        return job
    if service.ids.ours(edit_id, "edt", owner):
        raise Fault("gone", "the edit is not kept any more")
    raise Fault("not_found", "there is no such edit")


async def _answer(job: Job, media: str) -> Response:
    """An ended edit's picture, or JSON of it; its own error where it failed."""
    if isinstance(job.final, Failed):
        raise Fault.of(job.final)
    assert isinstance(job.final, Edited)
    if media == JSON:
        return JSONResponse(_body(job))
    body = job.png if media == "image/png" else await asyncio.to_thread(transcoded, job.png, media)
    report = json.dumps(_report(job.final), separators=(",", ":"))
    return Response(body, media_type=media, headers={"Edit-Id": job.id, "Edit-Report": report, "Vary": "Accept"})


def _report(final: Edited) -> dict[str, Any]:
    handles = [[round(x, 3), round(y, 3)] for x, y in final.handles]
    timings = {stage: round(seconds, 4) for stage, seconds in final.timings.items()}
    counts = {stage: dict(found) for stage, found in final.passes.items()}
    return {
        "handles": handles,
        "timings": timings,
        "passes": counts,
        "waited_s": round(final.waited_s, 4),
        "batch": final.batch,
    }


def _body(job: Job) -> dict[str, Any]:
    href = f"/v1/edits/{job.id}"
    out = EditOut(id=job.id, state=job.state, href=href, events=f"{href}/events")  # type: ignore[arg-type]
    at, final = told(job), job.final
    if isinstance(at, Queued):
        out.queued_behind = at.ahead
    elif isinstance(at, Step):
        out.progress = _step(at)
    if isinstance(final, Failed):
        out.error = ErrorIn(code=final.code, message=final.message)
    elif isinstance(final, Edited):
        out.picture = PictureOut(href=f"{href}/picture", width=final.picture.width, height=final.picture.height)
        out.handles, out.timings = list(final.handles), dict(final.timings)
        out.passes = {stage: dict(counts) for stage, counts in final.passes.items()}
        out.backend, out.notes = dict(final.backend), list(final.notes)
        out.waited_s, out.batch = final.waited_s, final.batch
    return out.model_dump(exclude_none=True)


def _step(at: Step) -> StepOut:
    return StepOut(stage=at.stage, step=at.step, total=at.total, points=None if at.points is None else list(at.points))


async def _stream(job: Job, after: int) -> AsyncIterator[str]:
    events = job.follow(after)
    following = asyncio.ensure_future(_next(events))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=_HEARTBEAT_S)
            if not done:
                yield ": still there\n\n"
                continue
            found = following.result()
            if found is None:
                return
            number, event = found
            name, data = _sse(job, event)
            yield f"id: {number}\nevent: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
            if isinstance(event, FINAL):
                return
            following = asyncio.ensure_future(_next(events))
    finally:
        following.cancel()


async def _next(events: AsyncIterator[tuple[int, Event]]) -> tuple[int, Event] | None:
    async for found in events:
        return found
    return None


def _sse(job: Job, event: Event) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Queued):
        return "queued", {"ahead": event.ahead}
    if isinstance(event, Step):
        data = _step(event).model_dump(exclude_none=True)
        if event.preview is not None:
            data["preview"] = "data:image/jpeg;base64," + base64.b64encode(event.preview).decode()
        return "progress", data
    return ("failed" if isinstance(event, Failed) else "done"), _body(job)


def _fingerprint(picture: bytes | None, asked: EditIn) -> bytes:
    found = hashlib.sha256(picture or b"")
    found.update(asked.model_dump_json().encode())
    return found.digest()
