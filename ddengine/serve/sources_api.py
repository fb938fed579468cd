"""/v1/sources: prepare a picture once, so that each edit of it pays only for its drag."""

from __future__ import annotations

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from ddengine.serve.bodies import documented, read_form
from ddengine.serve.contract import Prepared, PrepareJob
from ddengine.serve.errors import errors
from ddengine.serve.faults import Fault
from ddengine.serve.jobs import Slot
from ddengine.serve.schemas import PrepareIn, SourceOut, read_json
from ddengine.serve.service import Service, outcome, owner_of, service_of, unless_gone

router = APIRouter(prefix="/v1/sources", tags=["sources"])


@router.post(
    "",
    status_code=201,
    response_model=SourceOut,
    responses=errors(400, 401, 403, 408, 409, 413, 415, 421, 422, 429, 500, 503, 504),
    openapi_extra=documented("options", "PrepareIn", alone=False),
)
async def prepare(request: Request) -> Response:
    """Prepare a picture; edits that name the returned `source` skip encoding and inversion.

    Send multipart/form-data with the part `picture` and, if wanted, the JSON part `options`. Edits of the source must
    keep its n_inference_step and inversion_strength; by default they take its whole configuration.
    """
    service = service_of(request)
    with service.jobs.reserve() as slot:
        found = await _prepared(request, service, slot)
    request.scope["ddengine.facts"]["nbytes"] = found.nbytes
    out = SourceOut(
        source=found.source,
        width=found.width,
        height=found.height,
        nbytes=found.nbytes,
        expires_s=found.expires_s,
        timings=dict(found.timings),
        passes={stage: dict(counts) for stage, counts in found.passes.items()},
        waited_s=found.waited_s,
    )
    return JSONResponse(out.model_dump(), 201)


@router.delete(
    "/{source}",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "it is gone"}, **errors(401, 403, 404, 410, 421, 422, 503)},
)
async def forget(request: Request, source: str = Path(max_length=128, description="a source's id")) -> Response:
    """Let go of a source; 404 for one that never was, 410 for one that is gone already."""
    service = service_of(request)
    if not service.ids.ours(source, "src", owner_of(request)):
        raise Fault("not_found", "there is no such source")
    if not await service.workers.forget(source):
        raise Fault("gone", "the source is not kept any more")
    return Response(status_code=204)


async def _prepared(request: Request, service: Service, slot: Slot) -> Prepared:
    owner = owner_of(request)
    form = await read_form(request, "options")
    if form.picture is None:
        raise Fault("invalid", "the part picture is missing")
    asked = PrepareIn() if form.json is None else read_json(form.json, PrepareIn, "options")  # type: ignore[call-arg]
    deadline_s = service.check(asked)
    data = form.picture
    picture = await unless_gone(request, lambda: service.picture(data))
    job_id, source = service.ids.new("job", owner), service.ids.new("src", owner)
    work = PrepareJob(job_id, source, picture, asked.config, tuple(asked.settings.items()), asked.prompt, deadline_s)
    job = service.jobs.start(job_id, "source", owner, slot, lambda: service.workers.prepare(work), deadline_s)
    request.scope["ddengine.facts"] = job.facts
    try:
        final = await outcome(request, job)
    except BaseException:
        await job.ended()
        await service.workers.forget(source)  # should it be there all the same: nobody will ever name it
        raise
    assert isinstance(final, Prepared)
    return final
