"""The `compile` backend: on CUDA every pass is an ahead-of-time compiled package, replayed as a CUDA graph.

On a CPU only the drag step is compiled (`directdrag.unit`), and the gradient-free passes stay eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ddengine.backends.aot import compiled
from ddengine.backends.eager import EagerPasses
from ddengine.backends.graphs import PassGraph, PassShape, pass_graph
from ddengine.backends.passes import Size
from ddengine.backends.replay import Capture, Replayed
from ddengine.models.load import Model
from ddengine.models.network import Network, Observation
from ddengine.models.unet import KeyValue
from ddengine.store import ArtefactStore

# What the same network's noise may differ by between two compilations, of its largest value.
ROUNDING = {torch.float64: 0.0, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class CompiledPasses(EagerPasses):
    """`Passes` whose gradient-free part runs from packages; `supervise` is the eager one, for what has no package."""

    def __init__(
        self,
        model: Model,
        context: Tensor | None = None,
        *,
        store: ArtefactStore,
        strict: bool = True,
        building: bool = False,
        remedy: Callable[[Any], str] = lambda _: "run `ddengine build`",
        capture: Capture | None = None,
        compile: Callable[..., Callable[..., Sequence[Tensor]] | None] = compiled,
    ) -> None:
        """strict: a missing package is an error, with what `remedy` says of its shape; building: it is compiled.

        capture, compile: stand-ins for a CUDA graph and for the compiler (tests); with a capture, also on a CPU.
        """
        super().__init__(model, context)
        self.store, self.strict, self.building, self.remedy = store, strict, building, remedy
        self.capture, self._compile = capture, compile
        self.packaged = capture is not None or self.device.type == "cuda"
        self.units: dict[Any, Any] = {}  # of the drag step, for as long as these passes live
        self._replays: dict[tuple[str, PassShape], Replayed] = {}
        self.rounding = ROUNDING[self.dtype]

    def encode(self, image: Tensor) -> Tensor:
        if not self.packaged:
            return super().encode(image)
        return self._replay("encode", _shape(image.shape, 1), image)[0]

    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        if not self.packaged:
            return super().predict(latent, timestep)
        return self._replay("predict", _shape(latent.shape), latent, timestep)[0].to(latent.dtype)

    def reference(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        readout_hw: Size | None = None,
        readout_times: Sequence[int] | None = None,
    ) -> Observation:
        if not self.packaged or readout_times is not None or (readout_hw is not None and not self.has_readout):
            return super().reference(latent, timestep, readout_hw=readout_hw, readout_times=readout_times)
        shape = _shape(latent.shape, readout_hw=readout_hw)
        noise, feature, *rest = self._replay("reference", shape, latent, timestep)
        maps, kv = rest[: readout_hw is not None], rest[readout_hw is not None :]
        pairs = tuple(zip(kv[0::2], kv[1::2], strict=True))
        return Observation(noise.to(latent.dtype), feature, tuple(maps), pairs)

    def denoise(self, latent: Tensor, timestep: int | Tensor, reference_kv: Sequence[KeyValue]) -> Tensor:
        if not self.packaged:
            return super().denoise(latent, timestep, reference_kv)
        flat = [tensor for pair in reference_kv for tensor in pair]
        return self._replay("denoise", _shape(latent.shape), latent, timestep, *flat)[0].to(latent.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        if not self.packaged:
            return super().decode(latent)
        return self._replay("decode", _shape(latent.shape), latent)[0]

    def _replay(self, name: str, shape: PassShape, *given: Any) -> list[Tensor]:
        """One run of a pass; the results are copies, which the next run does not touch."""
        key = (name, shape)
        if key not in self._replays:
            self._replays[key] = self._make(name, shape)
        replayed = self._replays[key]
        # A time given as a number is written by the device: no pageable copy for the stream to wait for.
        for buffer, value in zip(replayed.constants, given, strict=True):
            # Keys and values of one picture spread over all edits of it.
            buffer.fill_(value) if isinstance(value, int) else buffer.copy_(value)
        replayed.replay()
        return [buffer.clone() for buffer in replayed.state]

    @torch.no_grad()
    def _make(self, name: str, shape: PassShape) -> Replayed:
        graph = pass_graph(name, self.model, self.network, shape).eval()
        names, weights = parameters_of(graph)
        inputs = [tensor.to(self.device) for tensor in graph.make_inputs()]

        def function(given: Sequence[Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad():
                return functional_call(graph, dict(zip(names, given, strict=True)), tuple(tensors))

        facts = {"pass": name, "shape": repr(shape), "modules": str(graph)}
        package = self._compile(f"pass {name}", function, weights, (inputs,), facts=facts, store=self.store)
        outputs = [torch.empty(one.shape, dtype=one.dtype, device=self.device) for one in graph.spec.outputs]
        return Replayed(lambda _, constants: package(weights, list(constants)), outputs, inputs, self.capture)


def parameters_of(module: PassGraph | Network) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of all parameters and buffers, in a settled order."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return list(named), [tensor.detach() for tensor in named.values()]


def _shape(shape: torch.Size, cell: int = 8, *, readout_hw: Size | None = None) -> PassShape:
    return PassShape((shape[-2] * cell, shape[-1] * cell), batch=shape[0], readout_hw=readout_hw)
