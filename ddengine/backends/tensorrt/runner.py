"""Engines on PyTorch's tensors: no copies, the same stream, and a captured graph where every microsecond counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddengine.backends.tensorrt.session import Port, Scratch, Session
from ddengine.errors import InputError

Tensors = Mapping[str, Tensor]


def torch_scratch(device: torch.device | str) -> Scratch:
    """Scratch memory from PyTorch's allocator, for all engines that run on one stream of a device."""

    def allocate(size: int) -> tuple[int, object]:
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        return memory.data_ptr(), memory

    return Scratch(allocate)


class EngineRunner:
    """Runs one engine on tensors by name, on PyTorch's current stream."""

    def __init__(self, session: Session, device: torch.device | str) -> None:
        self.session = session
        self.device = torch.device(device)
        self._own: dict[str, Tensor] = {}

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]:
        """Enqueue one run and return the outputs.

        Inputs and outputs are read and written where they lie, so they must be contiguous, on the device and of the
        engine's types (InputError): nothing is copied or converted. Outputs that are not given are the runner's own
        tensors and the next run overwrites them. Nothing is allocated when the shapes are those of the run before.
        """
        self.prepare(inputs, outputs)
        self.session.execute(self._stream())
        return {**self._own, **(outputs or {})}

    def prepare(self, inputs: Tensors, outputs: Tensors | None = None) -> None:
        """All of `run` but the run: check, allocate what is missing, bind."""
        ports, given = self.session.inputs, dict(outputs or {})
        for name, tensor in inputs.items():
            if name in ports:
                self._check(ports[name], tensor)
        shapes = self.session.shapes({name: tuple(tensor.shape) for name, tensor in inputs.items()}, self._stream())
        unknown = given.keys() - shapes.keys()
        if unknown:
            raise InputError(
                f"{self.session.name} has no output {', '.join(sorted(unknown))}, only {', '.join(shapes)}"
            )
        for name, shape in shapes.items():
            port = self.session.outputs[name]
            if name in given:
                self._check(port, given[name], shape)
                self._own.pop(name, None)
            elif name not in self._own or tuple(self._own[name].shape) != shape:
                self._own[name] = torch.empty(shape, dtype=getattr(torch, port.dtype), device=self.device)
        bound = {**inputs, **self._own, **given}
        self.session.bind({name: tensor.data_ptr() for name, tensor in bound.items()})

    def capture(self, inputs: Tensors, outputs: Tensors | None = None) -> CapturedEngine:
        """The same run as a CUDA graph: write into these inputs, call it, read the outputs it returns."""
        return CapturedEngine(self, inputs, outputs)

    def close(self) -> None:
        """Free the engine."""
        self._own.clear()
        self.session.close()

    def _stream(self) -> int:
        # On the CPU there is no stream; engines run there in tests alone.
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self.device.type == "cuda" else 0

    def _check(self, port: Port, tensor: Tensor, shape: tuple[int, ...] | None = None) -> None:
        problem = None
        if tensor.dtype != getattr(torch, port.dtype):
            problem = f"is {tensor.dtype}, it must be {port.dtype}"
        elif tensor.device.type != self.device.type or self.device.index not in (None, tensor.device.index):
            problem = f"lies on {tensor.device}, it must be on {self.device}"
        elif not tensor.is_contiguous():
            problem = "is not contiguous; pass tensor.contiguous()"
        elif shape is not None and tuple(tensor.shape) != shape:
            problem = f"is {list(tensor.shape)}, it must be {list(shape)}"
        if problem:
            raise InputError(f"{self.session.name}: {port.name} {problem}")


class CapturedEngine:
    """One run of an engine as a CUDA graph with fixed tensors; captured again when the shared scratch memory moves."""

    def __init__(self, runner: EngineRunner, inputs: Tensors, outputs: Tensors | None) -> None:
        self._runner, self._inputs, self._given = runner, dict(inputs), outputs
        self.outputs: dict[str, Tensor] = {}
        self._graph: Any = None
        self._generation = -1

    def __call__(self) -> dict[str, Tensor]:
        """Replay on PyTorch's current stream; captures when needed."""
        if self._generation != self._runner.session.scratch.generation:
            self._capture()
        self._graph.replay()
        return self.outputs

    def _capture(self) -> None:
        runner, device = self._runner, self._runner.device
        # A first run outside the capture: engines settle what depends on shapes when they are first enqueued.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            runner.run(self._inputs, self.outputs or self._given)
        torch.cuda.current_stream(device).wait_stream(side)
        # The outputs are this graph's own from now on: another run must not write into them.
        self.outputs = self.outputs or {**runner._own, **(self._given or {})}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            runner.run(self._inputs, self.outputs)
        self._graph, self._generation = graph, runner.session.scratch.generation
