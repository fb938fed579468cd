"""What an ONNX file says of itself: inputs, outputs, and the types its weights have; weights are not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ddengine.artifacts import sha256_bytes, sha256_file
from ddengine.errors import ModelError

if TYPE_CHECKING:
    import onnx

_NAMES = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "DOUBLE": "fp64",
    "FLOAT8E4M3FN": "fp8",
    "FLOAT8E5M2": "fp8",
}


@dataclass(frozen=True)
class GraphPort:
    """An input or output of a graph; -1 in a shape is a size left open."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphFacts:
    """`files`: the graph's own and those that hold its weights; `types`: the floating types of its weights and casts;
    `precision`: that of most weights."""

    path: Path
    files: tuple[Path, ...]
    opset: int
    inputs: dict[str, GraphPort]
    outputs: dict[str, GraphPort]
    precision: str
    types: frozenset[str] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the graph and its weights; reads them all."""
        return sha256_bytes("".join(sha256_file(path) for path in self.files).encode())


def read_graph(path: str | Path) -> GraphFacts:
    """The facts of an ONNX file; ModelError if it is missing or no ONNX."""
    import onnx

    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has its own exceptions
        raise ModelError(f"cannot read {path} as ONNX ({error}); export it again") from error
    external = sorted(set(_external_files(model)))
    missing = [name for name in external if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(f"{path} keeps its weights in {', '.join(missing)}, which is not beside it; export it again")
    held: Counter[str] = Counter()
    used: set[str] = set()
    for graph in _graphs(model.graph):
        for weight in graph.initializer:
            kind = _type_name(weight.data_type)
            size = 1
            for side in weight.dims:
                size *= side
            held[kind] += size
        for node in graph.node:
            used |= {_type_name(a.i) for a in node.attribute if a.name in {"to", "output_dtype", "dtype"}}
            if node.op_type.startswith("TRT_FP8"):
                used.add("fp8")
    floats = {kind: size for kind, size in held.items() if kind in _NAMES.values()}
    precision = max(floats, key=lambda kind: floats[kind], default="fp32")
    known = {weight.name for weight in model.graph.initializer}
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    return GraphFacts(
        path=path,
        files=(path, *(path.parent / name for name in external)),
        opset=opset,
        inputs={value.name: _port(value) for value in model.graph.input if value.name not in known},
        outputs={value.name: _port(value) for value in model.graph.output},
        precision=precision,
        types=frozenset((set(floats) | used) & set(_NAMES.values())),
    )


def _port(value: onnx.ValueInfoProto) -> GraphPort:
    tensor = value.type.tensor_type
    shape = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in tensor.shape.dim)
    return GraphPort(_type_name(tensor.elem_type), shape)


def _type_name(number: int) -> str:
    import onnx

    try:
        name = onnx.TensorProto.DataType.Name(number)
    except ValueError:
        return f"type {number}"
    return _NAMES.get(name, name.lower())


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _external_files(model: onnx.ModelProto) -> Iterator[str]:
    for graph in _graphs(model.graph):
        for weight in graph.initializer:
            for entry in weight.external_data:
                if entry.key == "location":
                    yield entry.value
