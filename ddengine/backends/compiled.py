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
from ddengine.errors import BackendUnavailable
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
        remedy: Callable[[Any], str] | None = None,
        capture: Capture | None = None,
        compile: Callable[..., Callable[..., Sequence[Tensor]] | None] = compiled,
    ) -> None:
        """strict: a missing package is an error, with what `remedy` says of its shape; building: it is compiled.

        capture, compile: stand-ins for a CUDA graph and for the compiler (tests); with a capture, also on a CPU.
        """
        super().__init__(model, context)
        self.store, self.strict, self.building = store, strict, building
        self.remedy = remedy or (lambda _: "run `ddengine build --backend compile`")
        self.capture, self._compile = capture, compile
        self.packaged = capture is not None or self.device.type == "cuda"
        self.any_batch = not self.packaged
        self.units: dict[Any, Any] = {}  # of the drag step, for as long as these passes live
        self._replays: dict[tuple[str, PassShape], Replayed | None] = {}
        self.rounding = ROUNDING[self.dtype] if self.packaged else 0.0

    def account(self) -> str:
        """What runs the gradient-free passes, in words."""
        if not self.packaged:
            return "eager (on a CPU the drag step alone is compiled)"
        missing = [name for (name, _), replayed in self._replays.items() if replayed is None]
        kept = f"eager (no compiled {', '.join(dict.fromkeys(missing))})"
        return kept if missing else "compile (packages, replayed as CUDA graphs)"

    def encode(self, image: Tensor) -> Tensor:
        found = self._replay("encode", _shape(image.shape, 1), image)
        return super().encode(image) if found is None else found[0]

    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        found = self._replay("predict", _shape(latent.shape), latent, timestep)
        return super().predict(latent, timestep) if found is None else found[0].to(latent.dtype)

    def reference(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        readout_hw: Size | None = None,
        readout_times: Sequence[int] | None = None,
    ) -> Observation:
        found = None
        if readout_times is None and (readout_hw is None or self.has_readout):
            found = self._replay("reference", _shape(latent.shape, readout_hw=readout_hw), latent, timestep)
        if found is None:
            return super().reference(latent, timestep, readout_hw=readout_hw, readout_times=readout_times)
        noise, feature, *rest = found
        maps, kv = rest[: readout_hw is not None], rest[readout_hw is not None :]
        pairs = tuple(zip(kv[0::2], kv[1::2], strict=True))
        return Observation(noise.to(latent.dtype), feature, tuple(maps), pairs)

    def denoise(self, latent: Tensor, timestep: int | Tensor, reference_kv: Sequence[KeyValue]) -> Tensor:
        flat = [tensor for pair in reference_kv for tensor in pair]
        found = self._replay("denoise", _shape(latent.shape), latent, timestep, *flat)
        return super().denoise(latent, timestep, reference_kv) if found is None else found[0].to(latent.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        found = self._replay("decode", _shape(latent.shape), latent)
        return super().decode(latent) if found is None else found[0]

    def open(self, name: str, shape: PassShape, *, make: bool) -> bool:
        """Load, or with `make` compile, a pass at one size; whether it is there."""
        if self._replays.get((name, shape)) is None:
            self._replays[name, shape] = self._make(name, shape, make)
        return self._replays[name, shape] is not None

    def _replay(self, name: str, shape: PassShape, *given: Any) -> list[Tensor] | None:
        """One run of a pass, None where it has no package; results are copies, which the next run leaves alone."""
        if not self.packaged:
            return None
        if (name, shape) not in self._replays and not self.open(name, shape, make=self.building) and self.strict:
            width, height = shape.image_hw[::-1]
            raise BackendUnavailable(f"no compiled {name} for {width} x {height} pixels; {self.remedy(shape)}")
        replayed = self._replays[name, shape]
        if replayed is None:
            return None
        # A time given as a number is written by the device: no pageable copy for the stream to wait for.
        for buffer, value in zip(replayed.constants, given, strict=True):
            # Keys and values of one picture spread over all edits of it.
            buffer.fill_(value) if isinstance(value, int) else buffer.copy_(value)
        replayed.replay()
        return [buffer.clone() for buffer in replayed.state]

    @torch.no_grad()
    def _make(self, name: str, shape: PassShape, make: bool) -> Replayed | None:
        graph = pass_graph(name, self.model, self.network, shape).eval()
        names, weights = parameters_of(graph)
        inputs = [tensor.to(self.device) for tensor in graph.make_inputs()]

        def function(given: Sequence[Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad():
                return functional_call(graph, dict(zip(names, given, strict=True)), tuple(tensors))

        facts = {"pass": name, "shape": repr(shape), "modules": str(graph)}
        package = self._compile(f"pass {name}", function, weights, (inputs,), facts=facts, store=self.store, make=make)
        if package is None:
            return None
        outputs = [torch.empty(one.shape, dtype=one.dtype, device=self.device) for one in graph.spec.outputs]
        return Replayed(lambda _, constants: package(weights, list(constants)), outputs, inputs, self.capture)


def parameters_of(module: PassGraph | Network) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of all parameters and buffers, in a settled order."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return list(named), [tensor.detach() for tensor in named.values()]


def _shape(shape: torch.Size, cell: int = 8, *, readout_hw: Size | None = None) -> PassShape:
    return PassShape((shape[-2] * cell, shape[-1] * cell), batch=shape[0], readout_hw=readout_hw)
