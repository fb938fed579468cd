"""The passes in ONNX Runtime: ONNX graphs from the store, run on PyTorch's own memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddengine.backends.engines import Program
from ddengine.backends.graphs import PassGraph, PassShape, PassSpec
from ddengine.errors import BackendUnavailable, EngineMismatch, ModelError
from ddengine.export.to_onnx import GRAPH, WEIGHTS, GraphRequest, stored_graph, stored_spec
from ddengine.progress import Progress
from ddengine.store import Artefact, ArtefactStore

if TYPE_CHECKING:
    import onnxruntime

    from ddengine.models.load import Model
    from ddengine.models.network import Network

log = logging.getLogger(__name__)

# How far its noise may lie from the eager pass's, as a share of the largest: four times what any model showed, or more.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3}
_QUIET = 3  # errors alone: a session warns of every weight it does not need
_REMEDY = "install what is missing with pip install 'ddengine[onnx]', or use backend='eager'"


class OnnxRuntimePrograms:
    """The ONNX Runtime sessions of one model, made when they are first asked for; see `engines.Programs`."""

    name = "onnxruntime"

    def __init__(self, store: ArtefactStore, model: Model, network: Network) -> None:
        """Raises BackendUnavailable where ONNX Runtime cannot compute on the model's device or in its dtype."""
        self.store, self.model, self.network = store, model, network
        self._providers = providers(model.device, model.dtype)
        self.rounding = ROUNDING[model.dtype]

    def find(self, name: str, shape: PassShape) -> Program | None:
        """A session over a pass's graph if it has been exported; `EngineMismatch` for a file that was changed."""
        artefact = self.built(name, shape)
        if artefact is None:
            return None
        if WEIGHTS in artefact.files:
            artefact.path(WEIGHTS)  # ONNX Runtime opens it itself: only if it is whole
        return OrtProgram(self._session(artefact.path(GRAPH)), stored_spec(artefact))

    def built(self, name: str, shape: PassShape) -> Artefact | None:
        """The pass's graph if it has been exported."""
        return self.store.get("onnx", GraphRequest.of(name, self.model, shape).facts())

    def build(self, name: str, shape: PassShape, progress: Callable[[Progress], object] | None = None) -> Artefact:
        """Export a pass, run it once beside the eager pass, and keep it if they agree; ModelError if not."""
        return stored_graph(self.store, self.model, self.network, name, shape, check=self._compare, progress=progress)

    def _compare(self, graph: PassGraph, path: Path) -> Mapping[str, Any]:
        program = OrtProgram(self._session(path), graph.spec)
        inputs = [one.to(self.model.device) for one in graph.make_inputs(torch.Generator().manual_seed(0))]
        with torch.no_grad():
            wanted = graph(*inputs)
        found = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in wanted]
        program.run(inputs, found)
        errors = {
            one.name: float((a.float() - b.float()).abs().amax() / b.float().abs().amax())
            for one, a, b in zip(graph.spec.outputs, found, wanted, strict=True)
        }
        worst = max(errors, key=lambda name: errors[name])
        limit = 10 * self.rounding  # on noise of normal numbers, where keys and values may be a little further off
        if not errors[worst] <= limit:
            raise ModelError(
                f"ONNX Runtime differs from PyTorch in {graph.spec.name}'s {worst} by {errors[worst]:.2g} of its "
                f"largest value, at most {limit:.2g} is allowed; use backend='eager' and report it"
            )
        return {"error": errors[worst]}

    def _session(self, path: Path) -> onnxruntime.InferenceSession:
        return open_session(path, self._providers)


def open_session(path: Path, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> onnxruntime.InferenceSession:
    """A session over a graph with as many threads as PyTorch has now; `EngineMismatch` for a file it does not take."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    # PyTorch runs between the passes: threads that spin for the next one would take its cores.
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # its exceptions share no base but this
        raise EngineMismatch(
            f"ONNX Runtime {onnxruntime.__version__} refuses {path}: {' '.join(str(error).split())[:300]}; run "
            f"`ddengine cache clear`, then `ddengine build`"
        ) from error


class OrtProgram:
    """A session whose inputs and outputs are tensors where they lie; not for two threads at once."""

    def __init__(self, session: onnxruntime.InferenceSession, spec: PassSpec) -> None:
        self.spec = spec
        self._session, self._binding = session, session.io_binding()
        self._bound: dict[str, int] = {}

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fill `outputs` from `inputs`, all contiguous and as the spec says; `Program.run`."""
        for specs, tensors, bind in (
            (self.spec.inputs, inputs, self._binding.bind_input),
            (self.spec.outputs, outputs, self._binding.bind_output),
        ):
            for one, tensor in zip(specs, tensors, strict=True):
                assert tensor.is_contiguous() and tensor.dtype == one.dtype and tuple(tensor.shape) == one.shape, one
                address = tensor.data_ptr()
                if self._bound.get(one.name) != address:
                    kind, index = tensor.device.type, tensor.device.index or 0
                    bind(one.name, kind, index, _NUMPY[one.dtype], one.shape, address)
                    self._bound[one.name] = address
        self._session.run_with_iobinding(self._binding)


def providers(device: torch.device, dtype: torch.dtype) -> list[Any]:
    """ONNX Runtime's providers for a device and dtype; `BackendUnavailable` says why there are none."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f"ONNX Runtime cannot be imported ({error}); {_REMEDY}") from error
    if dtype not in ROUNDING:
        raise BackendUnavailable(
            f"ONNX Runtime does not compute these passes in {str(dtype).removeprefix('torch.')}; use dtype='float32', "
            f"or backend='eager'"
        )
    offered = onnxruntime.get_available_providers()
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in offered:
        stream = torch.cuda.current_stream(device).cuda_stream
        return [("CUDAExecutionProvider", {"device_id": device.index or 0, "user_compute_stream": str(stream)})]
    raise BackendUnavailable(
        f"ONNX Runtime {onnxruntime.__version__} has no provider for {device.type}, only {', '.join(offered)}; "
        f"pip install onnxruntime-gpu in place of onnxruntime for a GPU, or use device='cpu'"
    )


def _numpy_types() -> dict[torch.dtype, Any]:
    import numpy as np

    return {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


_NUMPY = _numpy_types()
