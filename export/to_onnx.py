"""Passes to ONNX: checked graphs with named, documented tensors, float32 normalisations and all constants folded.

Opset 20 by default: from 21 on GroupNormalization is an operator of its own, which TensorRT takes as it is and ONNX
Runtime takes apart into a dozen (docs/backends.md has the measured difference).
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddengine.backends.graphs import PassGraph, PassShape, PassSpec, TensorSpec, pass_graph
from ddengine.errors import BackendUnavailable, EngineMismatch, InputError, ModelError
from ddengine.export.count import GraphCount, count_graph
from ddengine.progress import Progress

if TYPE_CHECKING:
    import onnx_ir as ir

    from ddengine.models.load import Model
    from ddengine.models.network import Network
    from ddengine.store import Artefact, ArtefactStore

log = logging.getLogger(__name__)

OPSET = 20
OPSETS = range(18, 24)  # GroupNorm, Attention and Resize of every one of them are read by the runtimes used here
_BFLOAT16_OPSET = 22  # the first whose convolutions take it
GRAPH, WEIGHTS = "graph.onnx", "weights.bin"
_FORMAT = 1  # to be raised when the same request gives another graph
_SMALL = 4096  # bytes
_INSIDE = 16 << 20  # bytes of weights up to which they lie in the graph's own file
_FOLD = 1 << 20  # elements of a constant that is computed ahead; the exporter's own limit leaves most of SD 1.5's
_ALIGNMENT = 4096  # of weights in their file: a page, so that runtimes can map them
_STAGE = "export"
_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir")

Reporter = Callable[[Progress], object]


@dataclass(frozen=True)
class GraphRequest:
    """An ONNX graph by what it is made from: equal requests are the same graph.

    weights: `Model.digest`. shape: only as far as the pass depends on it (`GraphRequest.of`). dynamic_batch: the batch
    is left open.
    """

    name: str
    weights: str
    shape: PassShape
    precision: str
    opset: int = OPSET
    dynamic_batch: bool = False

    @classmethod
    def of(
        cls, name: str, model: Model, shape: PassShape, *, opset: int = OPSET, dynamic_batch: bool = False
    ) -> GraphRequest:
        """The request for a pass of a model, which computes in the model's own precision."""
        if opset not in OPSETS:
            raise InputError(f"opset {opset} is not written; use {OPSETS[0]} to {OPSETS[-1]}")
        part = model.vae if name in ("encode", "decode") else model.unet
        precision = str(next(part.parameters()).dtype).removeprefix("torch.")
        if precision == "bfloat16":
            opset = max(opset, _BFLOAT16_OPSET)
        return cls(name, model.digest, needed_shape(name, shape), precision, opset, dynamic_batch)

    def facts(self) -> dict[str, Any]:
        """Plain values, the key of the graph in an `ArtefactStore`."""
        shape = self.shape
        return {
            "pass": self.name,
            "weights": self.weights,
            "image": list(shape.image_hw),
            "batch": "any" if self.dynamic_batch else shape.batch,
            "readout": list(shape.readout_hw) if shape.readout_hw else None,
            "prompt_tokens": shape.prompt_tokens,
            "precision": self.precision,
            "opset": self.opset,
            "format": _FORMAT,
        }


def stored_spec(artefact: Artefact) -> PassSpec:
    """The spec of a graph in the store, from its manifest."""
    facts, about = artefact.facts, artefact.about
    return PassSpec(facts["pass"], _from_json(about["inputs"]), _from_json(about["outputs"]))


def needed_shape(name: str, shape: PassShape) -> PassShape:
    """What of a shape the pass depends on, so that equal graphs are made once."""
    if name in ("encode", "decode"):
        shape = replace(shape, prompt_tokens=None)
    if name != "reference":
        shape = replace(shape, readout_hw=None)
    if name != "encode":
        height, width = shape.latent_hw
        shape = replace(shape, image_hw=(8 * height, 8 * width))
    return shape


@dataclass(frozen=True)
class Exported:
    """A written graph, its counts and the bytes of its weights."""

    path: Path
    count: GraphCount
    weights: int
    seconds: float


def stored_graph(
    store: ArtefactStore,
    model: Model,
    network: Network,
    name: str,
    shape: PassShape,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = False,
    check: Callable[[PassGraph, Path], Mapping[str, Any]] | None = None,
    progress: Reporter | None = None,
) -> Artefact:
    """The ONNX graph of a pass from the store, exported now if it is not there; `Artefact.path(GRAPH)` is its file.

    check: run on a new graph before it is kept; its findings go into the manifest, what it raises keeps the graph out.
    progress: told a `Progress` of stage "export"; what it raises stops the export. Raises BackendUnavailable without
    the exporter's packages, and what `pass_graph` and `ArtefactStore.make` raise.
    """
    request = GraphRequest.of(name, model, shape, opset=opset, dynamic_batch=dynamic_batch)

    def write(folder: Path) -> dict[str, Any]:
        graph = pass_graph(name, model, network, request.shape)
        exported = export_graph(
            graph,
            folder,
            opset=request.opset,
            dynamic_batch=dynamic_batch,
            larger=_larger_graph(store, request),
            progress=progress,
        )
        about = {
            "inputs": [_as_json(one) for one in graph.spec.inputs],
            "outputs": [_as_json(one) for one in graph.spec.outputs],
            "nodes": exported.count.nodes,
            "flops": exported.count.flops,
            "weights_bytes": exported.weights,
            "seconds": round(exported.seconds, 3),
            "versions": {package: metadata.version(package) for package in _PACKAGES},
            "model": {"name": model.name, "size": model.size},
        }
        return {**about, **(check(graph, folder / GRAPH) if check else {})}

    return store.make("onnx", request.facts(), write, waiting=lambda: _tell(progress, 0))


def export_graph(
    graph: PassGraph,
    folder: Path,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = False,
    larger: Path | None = None,
    progress: Reporter | None = None,
) -> Exported:
    """Write a pass into a folder as graph.onnx, its weights inside or, above 16 MiB, in weights.bin beside it.

    Inputs and outputs are named and documented as in `graph.spec`, whose JSON is also the model's metadata. Weights and
    arithmetic keep the graph's dtype, normalisations are float32. larger: a written graph of the same inputs that has
    these outputs and others, which are then cut off instead of tracing anew. Checked by `check_graph`. Raises
    BackendUnavailable without the exporter's packages, ModelError where the export fails.
    """
    started = time.monotonic()
    _require()
    _tell(progress, 0)
    if larger is not None:
        model = _cut(larger, graph.spec)
    else:
        model = _exported(with_wide_norms(graph), opset, dynamic_batch)
        _tell(progress, 2)
        _fold(model)
        _cast_outputs(model, graph.spec.outputs)
    _document(model, graph)
    path = folder / GRAPH
    weights = _write(model, folder)
    _tell(progress, 3)
    found = check_graph(path, None if dynamic_batch else graph)
    _tell(progress, 4)
    return Exported(path, found, weights, time.monotonic() - started)


def check_graph(path: Path, graph: PassGraph | None = None) -> GraphCount:
    """The counts of a written graph that is as it should be; ModelError otherwise.

    It passes `onnx.checker` with shape inference, computes nothing from constants alone (so that no folded layer is
    left), has the shape of every tensor, and the names, dtypes and sizes of `graph.spec`.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{path} is not valid ONNX: {error}; export it again") from error
    model = onnx.load(path, load_external_data=False)
    count = count_graph(model)
    problems = []
    if count.constant_nodes:
        problems.append(f"{count.constant_nodes} nodes compute from constants alone")
    if graph is not None:
        if count.unknown_shapes:
            problems.append(f"{count.unknown_shapes} tensors have no shape")
        wanted = [_port(one) for one in (*graph.spec.inputs, *graph.spec.outputs)]
        found = [
            (value.name, value.type.tensor_type.elem_type, tuple(d.dim_value for d in value.type.tensor_type.shape.dim))
            for value in (*model.graph.input, *model.graph.output)
        ]
        problems += [f"{b} stands where {a} should" for a, b in zip(wanted, found, strict=False) if a != b]
        if len(wanted) != len(found):
            problems.append(f"it has {len(found)} inputs and outputs, not {len(wanted)}")
    if problems:
        raise ModelError(f"{path}: {'; '.join(problems)}; use other versions of torch, onnx and onnxscript")
    return count


class _WideNorm(nn.Module):
    """A normalisation in float32 whatever its neighbours compute in: sums of halves overflow."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.float()).to(x.dtype)


def with_wide_norms(graph: PassGraph) -> PassGraph:
    """The graph with float32 normalisations; all else is shared with it, and a float32 graph is returned as it is."""
    halves = (torch.float16, torch.bfloat16)
    named = [
        name
        for name, module in graph.named_modules()
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and any(p.dtype in halves for p in module.parameters())
    ]
    if not named:
        return graph
    from ddengine.models.identity import copy_sharing

    wide: PassGraph = copy_sharing(graph)
    for name in named:
        parent, _, last = name.rpartition(".")
        setattr(wide.get_submodule(parent), last, _WideNorm(wide.get_submodule(name)))
    return wide


def _require() -> None:
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"exporting needs {' and '.join(missing)}; pip install 'ddengine[onnx]'")


def _exported(graph: PassGraph, opset: int, dynamic_batch: bool) -> ir.Model:
    device = next(iter(graph.state_dict().values())).device
    inputs = tuple(tensor.to(device) for tensor in graph.make_inputs(torch.Generator().manual_seed(0)))
    options: dict[str, Any] = {}
    if dynamic_batch:
        batch = torch.export.Dim("batch", min=1, max=64)
        fixed = ("timestep", "cross_")  # one time and one prompt for all
        free = [None if one.name.startswith(fixed) else {0: batch} for one in graph.spec.inputs]
        # `forward` of the walks takes what follows the time as *rest.
        options["dynamic_shapes"] = (*free[:2], tuple(free[2:])) if len(free) > 2 else tuple(free)
    with quiet_exporter(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph.eval(),
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=[one.name for one in graph.spec.inputs],
                output_names=[one.name for one in graph.spec.outputs],
                verbose=False,
                optimize=False,  # `_fold` does the same with other limits
                **options,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = " ".join(str(error).split())[:400]
            raise ModelError(f"the pass {graph.spec.name} cannot be exported: {reason}; use backend='eager'") from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter tells of torchvision's absence and of its own deprecations, which is nobody's concern here."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _cut(larger: Path, spec: PassSpec) -> ir.Model:
    """A written graph without the outputs that a spec does not have, and without what leads to them alone."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = ir.load(larger)
    wanted = {one.name for one in spec.outputs}
    kept = [value for value in model.graph.outputs if value.name in wanted]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)
    return model


def _fold(model: ir.Model) -> None:
    """Compute ahead what has only constant inputs, of any size this family has, and drop what changes nothing.

    The exporter's own optimiser does this up to sizes that leave most of SD 1.5's constants where they are, and then
    tries a hundred rewrites on each node, for most of its time.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model, onnx_shape_inference=True, input_size_limit=_FOLD, output_size_limit=_FOLD)
    for node in list(model.graph):
        if _changes_nothing(node):
            source, result = node.inputs[0], node.outputs[0]
            assert source is not None
            result.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
    for cleaning in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    ):
        cleaning(model)


def _changes_nothing(node: ir.Node) -> bool:
    """Whether it expands to the shape that is there, or divides by one."""
    source, result = (node.inputs[0] if node.inputs else None), node.outputs[0]
    if source is None or result.is_graph_output() or source.dtype != result.dtype:
        return False
    if node.op_type == "Expand":
        shapes = source.shape, result.shape
        return None not in shapes and shapes[0] == shapes[1] and all(isinstance(side, int) for side in shapes[0] or ())
    if node.op_type == "Div" and node.inputs[1] is not None:
        one = node.inputs[1].const_value
        return one is not None and one.size == 1 and float(one.numpy().reshape(())) == 1
    return False


def _cast_outputs(model: ir.Model, wanted: Sequence[TensorSpec]) -> None:
    """Give outputs the dtype they have in PyTorch: the exporter leaves a sum of halves in the float32 it is done in."""
    import onnx_ir as ir

    for number, (found, one) in enumerate(zip(list(model.graph.outputs), wanted, strict=True)):
        dtype = ir.DataType[str(one.dtype).removeprefix("torch.").replace("float32", "float").upper()]
        if found.dtype == dtype:
            continue
        cast = ir.node("Cast", [found], attributes={"to": dtype})
        found.name, cast.outputs[0].name = f"{one.name}_wide", one.name
        cast.outputs[0].dtype, cast.outputs[0].shape = dtype, found.shape
        model.graph.append(cast)
        model.graph.outputs[number] = cast.outputs[0]


def _document(model: ir.Model, graph: PassGraph) -> None:
    """Say what every tensor means, and forget how the graph came about (it names files of this machine)."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    spec = graph.spec
    for node in model.graph:
        for result in node.outputs:
            result.metadata_props.clear()
    for weight in model.graph.initializers.values():
        weight.metadata_props.clear()
    for value, one in zip((*model.graph.inputs, *model.graph.outputs), (*spec.inputs, *spec.outputs), strict=True):
        value.metadata_props.clear()
        value.doc_string = one.meaning
    model.graph.name = spec.name
    model.producer_name, model.producer_version = "ddengine", None
    model.metadata_props.clear()
    model.metadata_props["pass"] = spec.name
    model.metadata_props["inputs"] = json.dumps([_as_json(one) for one in spec.inputs])
    model.metadata_props["outputs"] = json.dumps([_as_json(one) for one in spec.outputs])


def _write(model: ir.Model, folder: Path) -> int:
    """Write the graph and its weights; returns their bytes."""
    import onnx_ir as ir

    # Graphs do not share a file of weights, though most of them hold the same: onnx refuses one with several names.
    tensors = [value.const_value for value in model.graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    outside = WEIGHTS if total > _INSIDE else None
    # Small tensors stay inside, where the checker reads what it needs to know, the sizes of a Split for one.
    ir.save(model, folder / GRAPH, external_data=outside, alignment=_ALIGNMENT, size_threshold_bytes=_SMALL)
    return total


def _larger_graph(store: ArtefactStore, request: GraphRequest) -> Path | None:
    """A sound graph in the store that has all that the request asks for and more outputs: one of the reference pass."""
    if request.name not in ("predict", "reference") or request.shape.readout_hw is not None:
        return None
    ours = {key: value for key, value in request.facts().items() if key not in ("pass", "readout")}
    for entry in store.entries():
        rest = {key: value for key, value in entry.facts.items() if key not in ("pass", "readout")}
        more = entry.facts.get("pass") == "reference"
        if entry.kind == "onnx" and not entry.problem and more and rest == ours and entry.facts != request.facts():
            try:
                artefact = store.get("onnx", entry.facts)
                if artefact is not None:
                    for name in artefact.files:
                        artefact.path(name)
                    return artefact.folder / GRAPH
            except EngineMismatch as error:
                log.warning("%s is not used: %s", entry.folder, error)
    return None


def _as_json(one: TensorSpec) -> dict[str, Any]:
    dtype = str(one.dtype).removeprefix("torch.")
    return {"name": one.name, "shape": list(one.shape), "dtype": dtype, "meaning": one.meaning}


def _from_json(described: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(one["name"], tuple(one["shape"]), getattr(torch, one["dtype"]), one["meaning"]) for one in described
    )


def _port(one: TensorSpec) -> tuple[str, int, tuple[int, ...]]:
    import onnx

    kinds = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
        torch.float64: onnx.TensorProto.DOUBLE,
        torch.int64: onnx.TensorProto.INT64,
    }
    return one.name, kinds[one.dtype], one.shape


def _tell(progress: Reporter | None, step: int, total: int = 4) -> None:
    if progress is not None:
        progress(Progress(_STAGE, step, total))
