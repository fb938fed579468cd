"""What exporting does to each pass: nodes and arithmetic before and after folding, and its time in ONNX Runtime.

"Before" is the pass as the model's code has it, exported by torch's exporter as it comes: every call computes the
prompt's keys and values and the time's embedding again, and the readout head resizes before its 1x1 convolutions.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddengine.artifacts import atomic_write
from ddengine.backends.graphs import PASSES, PassGraph, PassShape, pass_graph
from ddengine.backends.ort import OrtProgram, open_session
from ddengine.export.count import GraphCount, count_graph
from ddengine.export.to_onnx import GRAPH, OPSET, export_graph, needed_shape
from ddengine.models.load import Model
from ddengine.models.network import Network
from ddengine.models.unet import time_embedding, unet_forward

Tell = Callable[[str], object]


class Unfolded(nn.Module):
    """A walk of the network with nothing computed ahead, in the order of a pass's spec."""

    context: Tensor

    def __init__(self, name: str, model: Model, readout_hw: tuple[int, int] | None) -> None:
        super().__init__()
        self.name, self.readout_hw = name, readout_hw
        self.unet, self.head = model.unet, model.readout
        self.register_buffer("context", model.empty_context)

    def forward(self, latent: Tensor, timestep: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        context = self.context
        pairs = list(zip(rest[0::2], rest[1::2], strict=True)) if self.name == "denoise" else None
        reads = self.name == "reference"
        out = unet_forward(
            self.unet, latent.to(context.dtype), timestep, context, taps=reads, kv=reads, reference_kv=pairs
        )
        assert out.noise is not None
        if not reads:
            return (out.noise.float(),)
        maps: tuple[Tensor, ...] = ()
        if self.head is not None and self.readout_hw is not None:
            taps = [F.interpolate(tap, self.readout_hw, mode="bilinear", align_corners=False) for tap in out.taps]
            maps = (self.head(taps, time_embedding(self.unet, timestep, context), self.readout_hw),)
        return (out.noise.float(), out.feature, *maps, *(tensor for pair in out.kv for tensor in pair))


def counts(
    model: Model, shape: PassShape, names: Sequence[str] = PASSES, tell: Tell = lambda _: None
) -> dict[str, Any]:
    """Nodes and FLOPs of each pass before and after folding, at the default opset."""
    network = Network(model.unet, model.readout, model.empty_context, len(model.schedule.alphas_cumprod))
    found = {}
    for name in names:
        tell(name)
        wanted = needed_shape(name, shape)
        graph = pass_graph(name, model, network, wanted)
        with tempfile.TemporaryDirectory() as folder:
            after = export_graph(graph, Path(folder)).count
        whole = graph if name in ("encode", "decode") else Unfolded(name, model, wanted.readout_hw)
        found[name] = {"before": _plain(_as_it_comes(whole, graph)), "after": _plain(after)}
    return found


def speed(
    model: Model, shape: PassShape, opsets: Sequence[int] = (OPSET, 23), repeats: int = 25, tell: Tell = lambda _: None
) -> dict[str, Any]:
    """Median milliseconds of each pass in PyTorch and in ONNX Runtime at several opsets, run in turn on one thread."""
    network = Network(model.unet, model.readout, model.empty_context, len(model.schedule.alphas_cumprod))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            name: _speed(pass_graph(name, model, network, needed_shape(name, shape)), opsets, repeats)
            for name in PASSES
            if tell(name) is None
        }
    finally:
        torch.set_num_threads(before)


def table(facts: dict[str, Any]) -> str:
    """The facts for people."""
    lines = []
    if found := facts.get("counts"):
        lines += ["pass        nodes before  after   GFLOP before     after"]
        for name, one in found.items():
            before, after = one["before"], one["after"]
            lines.append(
                f"{name:<12}{before['nodes']:>12}{after['nodes']:>7}{before['gflop']:>15.1f}{after['gflop']:>10.1f}"
            )
    for name, one in facts.get("speed", {}).items():
        times = ", ".join(f"{which} {ms} ms ({one['of_eager'][which]})" for which, ms in one["ms"].items())
        lines.append(f"{name:<12}{times}")
    return "\n".join(lines)


def write(facts: dict[str, Any], path: Path) -> Path:
    """The facts as JSON."""
    return atomic_write(path, json.dumps(facts, indent=1).encode())


def _speed(graph: PassGraph, opsets: Sequence[int], repeats: int) -> dict[str, Any]:
    inputs = graph.make_inputs(torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], object]] = {}
    sizes, nodes = {}, {}
    with torch.no_grad():
        wanted = graph(*inputs)
        runs["eager"] = lambda: graph(*inputs)
        for opset in opsets:
            with tempfile.TemporaryDirectory() as folder:
                exported = export_graph(graph, Path(folder), opset=opset)
                program = OrtProgram(open_session(Path(folder) / GRAPH), graph.spec)
            found = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in wanted]
            program.run(inputs, found)
            for mine, theirs in zip(found, wanted, strict=True):  # equal first, then fast
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
            runs[f"opset {opset}"] = partial(program.run, inputs, found)
            sizes[f"opset {opset}"], nodes[f"opset {opset}"] = exported.weights, exported.count.nodes
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - started))
    milliseconds = {name: round(median(values), 2) for name, values in times.items()}
    ratios = {name: round(ms / milliseconds["eager"], 2) for name, ms in milliseconds.items()}
    return {"ms": milliseconds, "of_eager": ratios, "nodes": nodes, "weights_bytes": sizes, "repeats": repeats}


def _as_it_comes(module: nn.Module, graph: PassGraph) -> GraphCount:
    from ddengine.export.to_onnx import quiet_exporter

    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            graph.make_inputs(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[one.name for one in graph.spec.inputs],
            output_names=[one.name for one in graph.spec.outputs],
            verbose=False,
        )
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        program.save(Path(folder) / GRAPH, external_data=True)
        return count_graph(Path(folder) / GRAPH)


def _plain(count: GraphCount) -> dict[str, Any]:
    return {
        "nodes": count.nodes,
        "gflop": round(count.flops / 1e9, 3),
        "constant_nodes": count.constant_nodes,
        "by_op": dict(count.by_op),
    }
