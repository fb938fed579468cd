"""Engines in a process without PyTorch: NumPy arrays in, NumPy arrays out, over `ddengine.backends.device`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ddengine.backends.device import Device, Memory
from ddengine.backends.tensorrt.session import Scratch, Session
from ddengine.errors import BackendUnavailable, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def device_scratch(device: Device) -> Scratch:
    """Scratch memory of a device, for all engines on its stream."""
    held: list[Memory] = []

    def allocate(size: int) -> tuple[int, object]:
        while held:
            device.free(held.pop())
        held.append(device.allocate(size))
        return held[0].address, held[0]

    return Scratch(allocate)


class StandaloneRunner:
    """Runs one engine on arrays by name; its device and pinned buffers are made once for each set of shapes."""

    def __init__(self, session: Session, device: Device) -> None:
        self.session, self.device = session, device
        self._memory: dict[str, Memory] = {}
        self._pinned: dict[str, NDArray[Any]] = {}

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Copy the inputs to the GPU, run, and return the outputs, which the next run overwrites.

        Arrays must have the engine's types (InputError); "bfloat16" is that of the package `ml_dtypes`.
        """
        ports = self.session.inputs
        for name, array in inputs.items():
            if name in ports and array.dtype != _dtype(ports[name].dtype):
                raise InputError(f"{self.session.name}: {name} is {array.dtype}, it must be {ports[name].dtype}")
        given = {name: tuple(array.shape) for name, array in inputs.items()}
        results = self.session.shapes(given, self.device.stream)
        for name, shape in {**given, **results}.items():
            self._reserve(name, shape)
        self.session.bind({name: memory.address for name, memory in self._memory.items()})
        for name, array in inputs.items():
            self._pinned[name][...] = array
            self.device.upload(self._memory[name], self._pinned[name])
        self.session.execute(self.device.stream)
        for name in results:
            self.device.download(self._pinned[name], self._memory[name])
        self.device.synchronize()
        return {name: self._pinned[name] for name in results}

    def close(self) -> None:
        """Free the engine and its buffers; the device stays open."""
        self.session.close()
        self._pinned.clear()
        for memory in self._memory.values():
            self.device.free(memory)
        self._memory.clear()

    def _reserve(self, name: str, shape: tuple[int, ...]) -> None:
        port = {**self.session.inputs, **self.session.outputs}[name]
        dtype = _dtype(port.dtype)
        if name in self._pinned and self._pinned[name].shape == shape:
            return
        if name in self._memory:
            self.device.free(self._memory.pop(name))
        self._pinned[name] = self.device.pinned(shape, dtype)
        self._memory[name] = self.device.allocate(math.prod(shape) * dtype.itemsize)


def _dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise BackendUnavailable("NumPy has no bfloat16 of its own; pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)
