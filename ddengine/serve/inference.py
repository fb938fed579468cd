"""The Open Inference Protocol's model endpoints: an edit as tensors in and tensors out."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from ddengine.errors import InputError
from ddengine.image import read_image
from ddengine.serve.contract import STAGES, Edited, EditJob, Picture
from ddengine.serve.errors import errors
from ddengine.serve.faults import Fault
from ddengine.serve.health import readiness
from ddengine.serve.jobs import Slot
from ddengine.serve.pictures import decoded_png, from_pil
from ddengine.serve.schemas import EditIn, ProtocolError, read_json
from ddengine.serve.service import Service, outcome, owner_of, service_of
from ddengine.serve.tensors import JSON_VALUES, InferIn, answer, read_tensors, split

router = APIRouter(prefix="/v2/models", tags=["inference"])

OUTPUTS = ("image", "points", "timings")
VERSION = "1"
ModelName = Path(max_length=128, description="the model's name")


class TensorMeta(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class Model(BaseModel):
    """What the model takes and gives; -1 is any length."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMeta]
    outputs: list[TensorMeta]


class ModelReady(BaseModel):
    name: str
    ready: bool


@router.get("/{name}", response_model=Model, responses=errors(401, 403, 404, 421, 422, 503, protocol=True))
async def model(request: Request, name: str = ModelName) -> Any:
    """The model's tensors: an RGB picture, drags as x, y of handle and target; points are where the handles ended."""
    _check(request, name)
    tensors = {
        "image": ("UINT8", [-1, -1, 3]),
        "drags": ("FP32", [-1, 4]),
        "seed": ("INT64", [1]),
        "points": ("FP32", [-1, 2]),
        "timings": ("FP32", [len(STAGES)]),
    }
    found = {key: TensorMeta(name=key, datatype=kind, shape=shape) for key, (kind, shape) in tensors.items()}
    return Model(
        name=name,
        versions=[VERSION],
        platform="ddengine_pytorch",
        inputs=[found["image"], found["drags"], found["seed"]],
        outputs=[found["image"], found["points"], found["timings"]],
    )


@router.get(
    "/{name}/ready",
    response_model=ModelReady,
    responses={
        503: {"model": ModelReady | ProtocolError, "description": "not ready"},
        **errors(401, 403, 404, 421, 422, protocol=True),
    },
)
async def model_ready(request: Request, name: str = ModelName) -> Response:
    """As /v2/health/ready, for the model."""
    _check(request, name)
    found = await readiness(request)
    return JSONResponse({"name": name, "ready": found.ready}, 200 if found.ready else 503)


@router.post(
    "/{name}/infer",
    response_class=Response,
    responses={
        200: {
            "description": "image, points and timings",
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferOut"}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        **errors(400, 401, 403, 404, 408, 409, 413, 421, 422, 429, 500, 503, 504, protocol=True),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferIn"}}},
        }
    },
)
async def infer(
    request: Request,
    name: str = ModelName,
    header: str | None = Header(None, alias="Inference-Header-Content-Length", description="bytes of the JSON part"),
) -> Response:
    """One edit: inputs image [H, W, 3], drags [n, 4] and, if wanted, seed [1]; a large picture only as binary data."""
    _check(request, name)
    service = service_of(request)
    with service.jobs.reserve() as slot:
        asked, work = await service.aside(_read, service, await request.body(), header, owner_of(request))
        final, png = await _edited(request, service, slot, work)
    text, length = await asyncio.to_thread(_tensors, asked, final, png, name)
    if length is None:
        return Response(text, media_type="application/json")
    return Response(
        text, media_type="application/octet-stream", headers={"Inference-Header-Content-Length": str(length)}
    )


def _check(request: Request, name: str) -> None:
    if name != service_of(request).name:
        raise Fault("not_found", "there is no such model")


def _read(service: Service, body: bytes, header: str | None, owner: str) -> tuple[InferIn, EditJob]:
    text, binary = split(body, header)
    asked = read_json(text, InferIn, "request")
    found = read_tensors(asked.inputs, binary)
    for name, kind, wanted in (("image", "u1", 3), ("drags", "<f4", 2)):
        if name not in found or found[name].dtype != np.dtype(kind) or found[name].ndim != wanted:
            raise Fault("invalid", f"the input {name} is missing, or not of its type and shape")
    pixels, drags = found["image"], found["drags"]
    if pixels.shape[0] * pixels.shape[1] > service.limits.pixels:
        raise Fault("too_large", f"the image has more than {service.limits.pixels} pixels; scale it down")
    if _as_binary(asked).get("image") is False and pixels.size > JSON_VALUES:
        raise Fault(
            "too_large",
            f"the image has {pixels.size} values, as JSON it may have {JSON_VALUES}; ask for it as binary data "
            f"(binary_data_output)",
        )
    if drags.shape[1] != 4:
        raise Fault("invalid", f"drags has {drags.shape[1]} columns; it needs x, y of the handle and of the target")
    if drags.shape[0] > service.limits.points:
        raise Fault("invalid", f"{drags.shape[0]} drags were given, the limit is {service.limits.points}; use fewer")
    if not np.isfinite(drags).all():
        raise Fault("invalid", "drags holds a value that is not finite")
    seed = found.get("seed", np.zeros(1, np.int64))
    if seed.dtype != np.dtype("<i8") or seed.shape != (1,):
        raise Fault("invalid", "the input seed is not INT64 of shape [1]")
    unknown = asked.parameters.keys() - {"config", "binary_data_output"}
    if unknown:
        raise Fault("invalid", "parameters may hold config and binary_data_output alone")
    try:
        picture = from_pil(read_image(pixels))
        pairs = [{"handle": row[:2], "target": row[2:]} for row in drags.astype(float).tolist()]
        form = EditIn.model_validate(
            {"drags": pairs, "seed": int(seed[0]), "config": asked.parameters.get("config")}, strict=False
        )
    except InputError as error:
        raise Fault("invalid", str(error)[:600]) from error
    except ValidationError as error:
        raise Fault("invalid", str(error.errors(include_url=False)[0]["msg"])[:600]) from error
    deadline_s = service.check(form)
    pairs_in = tuple((drag.handle, drag.target) for drag in form.drags)
    # The edit can take a while: what was read goes without its tensors.
    return asked.model_copy(update={"inputs": []}), EditJob(
        service.ids.new("edt", owner), pairs_in, picture, config=form.config, seed=form.seed, deadline_s=deadline_s
    )


def _as_binary(asked: InferIn) -> dict[str, bool]:
    """The outputs that are asked for, and whether as binary data."""
    by_default = asked.parameters.get("binary_data_output") is True
    if asked.outputs is None:
        return dict.fromkeys(OUTPUTS, by_default)
    return {one.name: one.parameters.get("binary_data", by_default) is True for one in asked.outputs}


async def _edited(request: Request, service: Service, slot: Slot, work: EditJob) -> tuple[Edited, bytes]:
    assert work.deadline_s is not None
    job = service.jobs.start(
        work.id, "edit", owner_of(request), slot, lambda: service.workers.edit(work), work.deadline_s
    )
    request.scope["ddengine.facts"] = job.facts
    final = await outcome(request, job)
    assert isinstance(final, Edited)
    return final, job.png


def _tensors(asked: InferIn, final: Edited, png: bytes, name: str) -> tuple[bytes, int | None]:
    picture: Picture = decoded_png(png)
    pixels = np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3)
    seconds = np.array([final.timings.get(stage, 0.0) for stage in STAGES], "<f4")
    outputs: dict[str, Any] = {
        "image": (pixels, {}),
        "points": (np.array(final.handles, "<f4").reshape(-1, 2), {}),
        "timings": (seconds, {"stages": ",".join(STAGES)}),
    }
    binary = _as_binary(asked)
    chosen = {wanted: outputs[wanted] for wanted in binary}
    facts = {"model_name": name, "model_version": VERSION, **({} if asked.id is None else {"id": asked.id})}
    return answer(facts, chosen, binary)
