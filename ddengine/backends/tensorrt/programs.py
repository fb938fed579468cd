"""The passes as TensorRT engines: exported, built, found by size, and run on PyTorch's own memory and stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddengine.backends.gpu import find_gpu
from ddengine.backends.graphs import PassGraph, PassShape, PassSpec, pass_graph
from ddengine.backends.tensorrt.cache import EngineCache, EngineRequest
from ddengine.backends.tensorrt.flavour import load_flavour
from ddengine.backends.tensorrt.runner import CapturedEngine, EngineRunner, torch_scratch
from ddengine.errors import BackendUnavailable, EngineMismatch
from ddengine.export.to_onnx import GRAPH, OPSET, GraphRequest, needed_shape, stored_graph
from ddengine.progress import Progress
from ddengine.store import Artefact, ArtefactStore

if TYPE_CHECKING:
    from ddengine.backends.engines import Program
    from ddengine.export.to_tensorrt import BuildOptions, Profile
    from ddengine.models.load import Model
    from ddengine.models.network import Network

log = logging.getLogger(__name__)

WALKS = ("predict", "reference", "denoise")  # run many times in an edit: a captured graph saves each one's launches
MOST = 0.1  # share of the largest value that an engine may differ by from PyTorch; what differs more is broken
BFLOAT16_OPSET = 22  # the first whose convolutions take bfloat16
_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


class TensorRTPrograms:
    """The engines of one model on one GPU, loaded when they are first asked for; see `engines.Programs`.

    `rounding` is measured: each engine of the network is run once beside PyTorch when it is loaded, and twice the
    largest difference of the noise counts.
    """

    name = "tensorrt"

    def __init__(
        self,
        cache: EngineCache,
        model: Model,
        network: Network,
        *,
        options: BuildOptions | None = None,
        opset: int | None = None,
        captures: bool = True,
    ) -> None:
        """options: for engines that are built. opset: of their graphs. captures: run the walks as CUDA graphs."""
        self.cache, self.model, self.network = cache, model, network
        self.rounding = 0.0
        self._options = options
        self._opset = opset or (BFLOAT16_OPSET if model.dtype == torch.bfloat16 else OPSET)
        self._captures = captures and model.device.type == "cuda"
        self._scratch = torch_scratch(model.device)
        self._graphs: dict[tuple[str, PassShape], PassGraph] = {}

    def find(self, name: str, shape: PassShape) -> Program | None:
        """The engine of a pass if it is built; `EngineMismatch` for one that is not for here or computes wrongly."""
        request = self._request(name, shape)
        session = self.cache.load(request, self._scratch)
        if session is None:
            return None
        runner = EngineRunner(session, self.model.device)
        program = TensorRTProgram(runner, self._graph(name, shape).spec, self._captures and name in WALKS)
        self._compare(program, name, shape)
        self.cache.keep_kernels(request, session)
        return program

    def build(
        self,
        name: str,
        shape: PassShape,
        progress: Callable[[Progress], object] | None = None,
        *,
        batches: Sequence[int] = (),
        replace: bool = False,
    ) -> Artefact:
        """Export a pass and build its engine, unless both are there; errors as `stored_graph` and `EngineCache.build`.

        batches: with some, one engine holds the weights once for all of them and is tuned for each; without, it is for
        the shape's own batch alone.
        """
        request = self._request(name, shape, batches)

        def exported() -> Path:
            found = stored_graph(
                self.cache.store,
                self.model,
                self.network,
                name,
                shape,
                opset=self._opset,
                dynamic_batch=len(batches) > 0,
                progress=progress,
            )
            found.path(GRAPH)
            for file in found.files:  # the library opens the weights' file itself: only if it is whole
                found.path(file)
            return found.folder / GRAPH

        return self.cache.build(request, exported, options=self._options, replace=replace, progress=progress)

    def _graph(self, name: str, shape: PassShape) -> PassGraph:
        shape = needed_shape(name, shape)
        if (name, shape) not in self._graphs:
            self._graphs[name, shape] = pass_graph(name, self.model, self.network, shape)
        return self._graphs[name, shape]

    def _request(self, name: str, shape: PassShape, batches: Sequence[int] = ()) -> EngineRequest:
        graph = GraphRequest.of(name, self.model, shape, opset=self._opset)
        precision = _PRECISIONS.get(graph.precision)
        if precision is None:
            raise BackendUnavailable(f"TensorRT has no {graph.precision}; load the model with dtype='float16'")
        spec = self._graph(name, shape).spec
        facts = graph.facts()
        rest = {fact: facts[fact] for fact in ("opset", "format", "prompt_tokens")}
        sizes = {one.name: one.shape for one in (*spec.inputs, *spec.outputs)}
        profiles: list[Profile] = []
        if batches:
            from ddengine.export.to_tensorrt import Profile

            fixed = {one.name for one in spec.inputs if one.dtype == torch.int64}
            free = [one for one in spec.inputs if one.name not in fixed]
            profiles = [Profile.exactly({one.name: (batch, *one.shape[1:]) for one in free}) for batch in batches]
            sizes = {one: size if one in fixed else (-1, *size[1:]) for one, size in sizes.items()}
        return EngineRequest(name, graph.weights, sizes, precision, rest, profiles)

    def _compare(self, program: TensorRTProgram, name: str, shape: PassShape) -> None:
        """Run it once beside PyTorch on normal numbers: an engine that is wrong is found before it is believed."""
        graph = self._graph(name, shape)
        inputs = [one.to(self.model.device) for one in graph.make_inputs(torch.Generator().manual_seed(0))]
        with torch.no_grad():
            wanted = graph(*inputs)
            found = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in wanted]
            program.run(inputs, found)
        for one, mine, theirs in zip(graph.spec.outputs, found, wanted, strict=True):
            error = float((mine.float() - theirs.float()).abs().amax() / theirs.float().abs().amax())
            if not error <= MOST:
                raise EngineMismatch(
                    f"the engine of {name} differs from PyTorch in {one.name} by {error:.2g} of its largest value, at "
                    f"most {MOST} is allowed; run `ddengine cache clear` and build it again, or use backend='eager'"
                )
            if one.name == "noise":
                self.rounding = max(self.rounding, 2 * error)


class TensorRTProgram:
    """An engine at fixed sizes: run where its tensors lie or, captured, over tensors of its own."""

    def __init__(self, runner: EngineRunner, spec: PassSpec, captured: bool) -> None:
        self.spec, self.runner = spec, runner
        self._inputs: dict[str, Tensor] = {}
        self._captured: CapturedEngine | None = None
        if captured:
            # The copies into and out of these are a thousandth of what a walk moves.
            self._inputs = {
                one.name: torch.zeros(one.shape, dtype=one.dtype, device=runner.device) for one in spec.inputs
            }
            self._captured = runner.capture(self._inputs)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fill `outputs` from `inputs`, all contiguous and as the spec says; `Program.run`."""
        given = {one.name: tensor for one, tensor in zip(self.spec.inputs, inputs, strict=True)}
        wanted = {one.name: tensor for one, tensor in zip(self.spec.outputs, outputs, strict=True)}
        if self._captured is None:
            self.runner.run(given, wanted)
            return
        for name, tensor in given.items():
            self._inputs[name].copy_(tensor)
        for name, tensor in self._captured().items():
            wanted[name].copy_(tensor)


def open_programs(
    store: ArtefactStore,
    model: Model,
    network: Network,
    *,
    flavour: str = "auto",
    options: BuildOptions | None = None,
    building: bool = False,
) -> TensorRTPrograms:
    """The engines for a model where it is; BackendUnavailable where that is no GPU or no library suits it.

    flavour: tensorrt, tensorrt_rtx or auto. building: only to build, which TensorRT-RTX does without a GPU.
    """
    if model.device.type == "cuda":
        gpu = find_gpu(model.device.index or 0)
        return TensorRTPrograms(EngineCache(store, load_flavour(flavour, gpu), gpu), model, network, options=options)
    if building:
        return TensorRTPrograms(EngineCache(store, load_flavour(flavour, None), None), model, network, options=options)
    raise BackendUnavailable(
        f"TensorRT runs on NVIDIA GPUs and the model is on {model.device}; use device='cuda' where there is one, or "
        f"backend='onnxruntime'"
    )
