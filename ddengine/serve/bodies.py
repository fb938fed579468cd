"""Bodies of requests: multipart forms of a picture and a JSON part, kept in memory and never in a file."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ddengine.serve.faults import Fault

JSON_BYTES = 1 << 20  # of a request's JSON: read in one go by the event loop


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40  # Guard bounds the whole body: no part of it becomes a file
    ended = False  # whether the last boundary has come

    def on_end(self) -> None:
        super().on_end()
        self.ended = True


@dataclass(frozen=True)
class Form:
    """What came: the picture file's bytes, the JSON part's bytes; None where a part is missing."""

    picture: bytes | None
    json: bytes | None


async def read_form(request: Request, json_part: str) -> Form:
    """multipart/form-data of `picture` and a JSON part, or application/json alone; Fault."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Form(None, _checked(await request.body()))
    if kind != "multipart/form-data":
        raise Fault(
            "unsupported_media", f"send multipart/form-data with the parts picture and {json_part}, or application/json"
        )
    form = None
    try:
        form = await _parsed(request)
        found: dict[str, bytes] = {}
        for name, part in form.multi_items():
            if name not in ("picture", json_part):
                raise Fault("bad_request", f"there is an unknown part; send picture and {json_part}")
            if name in found:
                raise Fault("bad_request", f"the part {name} is there twice")
            found[name] = await part.read() if isinstance(part, UploadFile) else part.encode()
    except MultiPartException as error:
        raise Fault("bad_request", f"the multipart body is broken: {error.message[:200]}") from error
    except (KeyError, ValueError, UnicodeError) as error:  # a boundary that is missing, names that cannot be read
        raise Fault("bad_request", "the multipart body is broken") from error
    finally:
        if form is not None:
            await form.close()
    return Form(found.get("picture"), _checked(found.get(json_part)))


async def _parsed(request: Request) -> FormData:
    """A multipart body that came whole; MultiPartException."""

    async def whole() -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
        if not parser.ended:
            raise MultiPartException("It ends before its last boundary.")  # raised here, the parser closes its parts

    parser = _InMemory(request.headers, whole(), max_files=2, max_fields=2, max_part_size=JSON_BYTES)
    return await parser.parse()


def _checked(data: bytes | None) -> bytes | None:
    if data is not None and len(data) > JSON_BYTES:
        raise Fault("too_large", f"the JSON has {len(data)} bytes, the limit is {JSON_BYTES}")
    return data


def documented(json_part: str, form: str, *, alone: bool) -> dict[str, Any]:
    """The OpenAPI description of such a body; `form` names the JSON part's schema; alone: also as the whole body."""
    part = {"$ref": f"#/components/schemas/{form}"}
    content: dict[str, Any] = {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [json_part] if alone else ["picture"],
                "additionalProperties": False,
                "properties": {
                    "picture": {"type": "string", "format": "binary", "description": "a PNG, JPEG or WebP file"},
                    json_part: part,
                },
            },
            "encoding": {
                "picture": {"contentType": "image/png, image/jpeg, image/webp"},
                json_part: {"contentType": "application/json"},
            },
        }
    }
    if alone:
        content["application/json"] = {"schema": part}
    return {"requestBody": {"required": True, "content": content}}
