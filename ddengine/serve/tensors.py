"""Tensors in requests and answers of the Open Inference Protocol, as JSON or by its binary extension."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ddengine.serve.faults import Fault

# Pictures of 512 x 512 fit, and as numbers in text nothing much larger should come or go. A small JSON text can mean
# many objects in memory; binary data cannot.
JSON_BYTES = 4 << 20  # of a request's JSON part
JSON_VALUES = 1 << 20  # of an answer's tensor in JSON

TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}
Parameters = dict[str, bool | int | float | str]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TensorIn(BaseModel):
    """An input: its values as (nested) lists in `data`, or behind the JSON with parameters.binary_data_size."""

    model_config = _STRICT
    name: Literal["image", "drags", "seed"]
    shape: list[int] = Field(min_length=1, max_length=3)
    datatype: Literal["UINT8", "FP32", "INT64"]
    parameters: Parameters = {}
    data: list[Any] | None = None


class OutputIn(BaseModel):
    """An output that is asked for; parameters.binary_data: behind the JSON."""

    model_config = _STRICT
    name: Literal["image", "points", "timings"]
    parameters: Parameters = {}


class InferIn(BaseModel):
    """An inference request; parameters may hold `config`, a preset's name, and `binary_data_output`."""

    model_config = _STRICT
    id: str | None = Field(None, max_length=200)
    parameters: Parameters = {}
    inputs: list[TensorIn] = Field(min_length=2, max_length=3)
    outputs: list[OutputIn] | None = Field(None, max_length=3)


class TensorOut(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[float] | list[int] | None = None


class InferOut(BaseModel):
    """An inference answer; `data` is flat, row by row."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[TensorOut]


def split(body: bytes, header: str | None) -> tuple[bytes, bytes]:
    """JSON and binary part of a body, by the header Inference-Header-Content-Length; Fault."""
    if header is not None and not (header.isascii() and header.isdigit() and len(header) < 12):
        raise Fault("bad_request", "Inference-Header-Content-Length is no length")
    size = len(body) if header is None else int(header)
    if size > len(body):
        raise Fault("bad_request", "Inference-Header-Content-Length is no length of a part of the body")
    if size > JSON_BYTES:
        raise Fault(
            "too_large",
            f"the JSON part has {size} bytes, the limit is {JSON_BYTES}; send the image as binary data behind it "
            f"(binary_data_size)",
        )
    return body[:size], body[size:]


def read_tensors(inputs: Sequence[TensorIn], binary: bytes) -> dict[str, np.ndarray]:
    """The inputs by name; Fault for values that do not fit their type or shape."""
    found: dict[str, np.ndarray] = {}
    for tensor in inputs:
        if tensor.name in found:
            raise Fault("invalid", f"the input {tensor.name} is there twice")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            found[tensor.name] = _listed(tensor)
            continue
        wanted = _count(tensor) * TYPES[tensor.datatype].itemsize
        if tensor.data is not None or size != wanted or isinstance(size, bool) or wanted > len(binary):
            raise Fault("invalid", f"{tensor.name}: its shape takes {wanted} bytes, which are not there")
        values = np.frombuffer(binary[:wanted], TYPES[tensor.datatype]).reshape(tensor.shape)
        found[tensor.name], binary = values, binary[wanted:]
    if binary:
        raise Fault("invalid", f"{len(binary)} bytes are left over behind the last input")
    return found


def _count(tensor: TensorIn) -> int:
    if min(tensor.shape) < 1 or max(tensor.shape) > 1 << 20:
        raise Fault("invalid", f"{tensor.name}: the shape {tensor.shape} is not one")
    return math.prod(tensor.shape)


def _listed(tensor: TensorIn) -> np.ndarray:
    if tensor.data is None:
        raise Fault("invalid", f"{tensor.name}: data is missing")
    kind = TYPES[tensor.datatype]
    try:
        values = np.asarray(tensor.data)
    except (ValueError, OverflowError) as error:  # rows of unequal length, numbers beyond all types
        raise Fault("invalid", f"{tensor.name}: data is no tensor of numbers") from error
    if values.size != _count(tensor) or (values.ndim > 1 and list(values.shape) != tensor.shape):
        raise Fault("invalid", f"{tensor.name}: data has {values.size} values in {list(values.shape)}, not its shape")
    if values.dtype.kind not in ("iu" if kind.kind != "f" else "iuf"):
        raise Fault("invalid", f"{tensor.name}: data does not fit {tensor.datatype}")
    if kind.kind != "f" and (values.min() < np.iinfo(kind).min or values.max() > np.iinfo(kind).max):
        raise Fault("invalid", f"{tensor.name}: data goes beyond {tensor.datatype}")
    with np.errstate(over="ignore"):  # beyond FP32 lies infinity, which is refused
        return values.astype(kind).reshape(tensor.shape)


def answer(
    facts: dict[str, Any], outputs: dict[str, tuple[np.ndarray, Parameters]], binary: dict[str, bool]
) -> tuple[bytes, int | None]:
    """A response's body, and the length of its JSON part where tensors follow it."""
    listed, behind = [], []
    for name, (values, about) in outputs.items():
        kind = next(known for known, dtype in TYPES.items() if dtype == values.dtype)
        tensor: dict[str, Any] = {"name": name, "shape": list(values.shape), "datatype": kind}
        if binary.get(name):
            behind.append(values.tobytes())
            about = {**about, "binary_data_size": values.nbytes}
        else:
            tensor["data"] = values.ravel().tolist()
        listed.append({**tensor, **({"parameters": about} if about else {})})
    text = json.dumps({**facts, "outputs": listed}, separators=(",", ":")).encode()
    return b"".join([text, *behind]), (len(text) if behind else None)
