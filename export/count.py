"""Counting an ONNX graph: nodes, and the arithmetic of those that do more than one operation an element."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GraphCount:
    """What a graph consists of.

    nodes: all of them; by_op: by operator. flops: 2 for each multiply-add of convolutions, matrix products and
    attention, by operator in flops_by_op; element-wise operations, normalisations and softmax are not counted.
    constant_nodes: nodes that read constants alone. unknown_shapes: tensors without a full shape
    that something reads.
    """

    nodes: int
    flops: int
    constant_nodes: int
    unknown_shapes: int
    by_op: Mapping[str, int] = field(repr=False)
    flops_by_op: Mapping[str, int] = field(repr=False)


def count_graph(graph: onnx.ModelProto | str | Path) -> GraphCount:
    """The counts of a graph (or of an ONNX file, whose weights are not read) that carries its shapes."""
    import onnx

    if not isinstance(graph, onnx.ModelProto):
        graph = onnx.load(graph, load_external_data=False)
    inside = graph.graph
    shapes = _shapes(inside)
    constants = {weight.name for weight in inside.initializer}
    by_op: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    idle = 0
    for node in inside.node:
        by_op[node.op_type] += 1
        flops[node.op_type] += _flops(node, shapes)
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
            idle += 1
    read = {name for node in inside.node for name in node.input} | {value.name for value in inside.output}
    unknown = sum(shapes.get(name) is None for node in inside.node for name in node.output if name in read)
    return GraphCount(
        nodes=len(inside.node),
        flops=sum(flops.values()),
        constant_nodes=idle,
        unknown_shapes=unknown,
        by_op=dict(by_op.most_common()),
        flops_by_op={op: total for op, total in flops.most_common() if total},
    )


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape | None]:
    """Shapes by name; None where a size is open."""
    found: dict[str, Shape | None] = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        sides = [side.dim_value if side.HasField("dim_value") else -1 for side in tensor.shape.dim]
        found[value.name] = None if not tensor.HasField("shape") or -1 in sides else tuple(sides)
    return found


def _flops(node: onnx.NodeProto, shapes: Mapping[str, Shape | None]) -> int:
    """2 for each multiply-add; 0 where a shape is not known."""
    inputs = [shapes.get(name) for name in node.input]
    output = shapes.get(node.output[0])
    if output is None or not inputs or inputs[0] is None:
        return 0
    if node.op_type in ("Conv", "ConvTranspose") and inputs[1] is not None:
        # Weights are [out, in / groups, rows, columns]; of a transposed convolution [in, out / groups, ...].
        each = math.prod(inputs[1][1:])
        return 2 * each * math.prod(output if node.op_type == "Conv" else inputs[0])
    if node.op_type == "MatMul":
        return 2 * math.prod(output) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * math.prod(output) * inputs[0][0 if transposed else 1]
    if node.op_type == "Attention" and inputs[1] is not None:
        # [B, heads, n, d] and [B, heads, m, d]: q kᵀ, and the weights times v of the output's width.
        keys = inputs[1][-2]
        return 2 * keys * (math.prod(inputs[0]) + math.prod(output))
    return 0
