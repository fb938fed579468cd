"""A GPU without PyTorch: its context, a stream, device and pinned memory, copies and events.

Two layers do the same few things: PyCUDA, which has to be compiled where it is installed, and `cuda-bindings`, which
comes as a wheel. Both use the driver's primary context, the one that TensorRT and PyTorch use, so that all of them
can live in one process.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ddengine.backends.gpu import find_gpu
from ddengine.errors import BackendUnavailable, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LAYERS = ("pycuda", "cuda-bindings")
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: never waits for the default stream


@dataclass(eq=False)
class Memory:
    """Some bytes on the GPU, until `Device.free` or the end of the device; `owner` is the layer's own object."""

    address: int
    nbytes: int
    owner: Any = None


class Device(ABC):
    """A GPU's primary context, current in this thread from opening to closing, and one stream; use it as a context.

    Copies are asynchronous and in the order of the stream: an array given to `upload` must stay as it is, and one
    given to `download` may be read, only after `synchronize`.
    """

    layer: str
    stream: int

    def __init__(self, index: int) -> None:
        self.gpu = find_gpu(index)
        self._held: dict[int, Memory] = {}
        self._open(index)

    def allocate(self, nbytes: int) -> Memory:
        """Memory on the GPU, aligned to 256 bytes; BackendUnavailable if there is not so much."""
        memory = self._allocate(max(1, nbytes))
        self._held[memory.address] = memory
        return memory

    def free(self, memory: Memory) -> None:
        """Give memory back, once the stream has done with it; twice does no harm."""
        if self._held.pop(memory.address, None) is not None:
            self.synchronize()
            self._free(memory)

    def close(self) -> None:
        """Free all memory and the stream, and leave the context; twice does no harm."""
        if self._held is None:
            return
        for memory in list(self._held.values()):
            self.free(memory)
        self._held = None  # type: ignore[assignment]
        self._close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> NDArray[Any]:
        """A NumPy array in page-locked memory, from and to which copies run beside the computation."""

    @abstractmethod
    def upload(self, memory: Memory, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the GPU."""

    @abstractmethod
    def download(self, array: NDArray[Any], memory: Memory) -> None:
        """Copy from the GPU into a contiguous array."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the stream has done all it was given."""

    @abstractmethod
    def event(self) -> Any:
        """An event recorded now on the stream."""

    @abstractmethod
    def milliseconds(self, first: Any, last: Any) -> float:
        """GPU time between two events; waits for the later one."""

    @abstractmethod
    def _open(self, index: int) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _allocate(self, nbytes: int) -> Memory: ...

    @abstractmethod
    def _free(self, memory: Memory) -> None: ...


class PyCudaDevice(Device):
    """Over `pycuda.driver`."""

    layer = "pycuda"

    def _open(self, index: int) -> None:
        self._cuda = importlib.import_module("pycuda.driver")
        self._cuda.init()
        self._context = self._cuda.Device(index).retain_primary_context()
        self._context.push()
        self._stream = self._cuda.Stream(_NON_BLOCKING)
        self.stream = int(self._stream.handle)

    def _close(self) -> None:
        self.synchronize()
        del self._stream
        # Explicitly: the destructor would destroy the primary context, which is not ours, instead of releasing it.
        self._context.detach()

    def _allocate(self, nbytes: int) -> Memory:
        try:
            owner = self._cuda.mem_alloc(nbytes)
        except self._cuda.MemoryError as error:
            raise _full(nbytes) from error
        return Memory(int(owner), nbytes, owner)

    def _free(self, memory: Memory) -> None:
        memory.owner.free()

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> NDArray[Any]:
        import numpy as np

        array: NDArray[Any] = self._cuda.pagelocked_empty(shape, np.dtype(dtype))
        return array

    def upload(self, memory: Memory, array: NDArray[Any]) -> None:
        _check_copy(memory, array)
        self._cuda.memcpy_htod_async(memory.address, array, self._stream)

    def download(self, array: NDArray[Any], memory: Memory) -> None:
        _check_copy(memory, array)
        self._cuda.memcpy_dtoh_async(array, memory.address, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def event(self) -> Any:
        return self._cuda.Event().record(self._stream)

    def milliseconds(self, first: Any, last: Any) -> float:
        last.synchronize()
        return float(last.time_since(first))


class CudaBindingsDevice(Device):
    """Over `cuda.bindings.driver`."""

    layer = "cuda-bindings"

    def _open(self, index: int) -> None:
        self._cuda = importlib.import_module("cuda.bindings.driver")
        self._do(self._cuda.cuInit, 0)
        self._device = self._do(self._cuda.cuDeviceGet, index)
        self._context = self._do(self._cuda.cuDevicePrimaryCtxRetain, self._device)
        self._do(self._cuda.cuCtxPushCurrent, self._context)
        self._stream = self._do(self._cuda.cuStreamCreate, _NON_BLOCKING)
        self.stream = int(self._stream)
        self._events: list[Any] = []

    def _close(self) -> None:
        self.synchronize()
        for event in self._events:
            self._do(self._cuda.cuEventDestroy, event)
        self._do(self._cuda.cuStreamDestroy, self._stream)
        self._do(self._cuda.cuCtxPopCurrent)
        self._do(self._cuda.cuDevicePrimaryCtxRelease, self._device)

    def _allocate(self, nbytes: int) -> Memory:
        status, pointer = self._cuda.cuMemAlloc(nbytes)
        if status == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise _full(nbytes)
        self._check(status, "cuMemAlloc")
        return Memory(int(pointer), nbytes, pointer)

    def _free(self, memory: Memory) -> None:
        self._do(self._cuda.cuMemFree, memory.owner)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any] | str) -> NDArray[Any]:
        import ctypes
        import math
        import weakref

        import numpy as np

        dtype = np.dtype(dtype)
        nbytes = max(1, math.prod(shape) * dtype.itemsize)
        address = int(self._do(self._cuda.cuMemHostAlloc, nbytes, 0))
        raw = (ctypes.c_byte * nbytes).from_address(address)
        # `raw` is what the array and its views keep alive; the driver's memory goes with it.
        weakref.finalize(raw, self._cuda.cuMemFreeHost, address)
        array: NDArray[Any] = np.frombuffer(memoryview(raw), dtype, math.prod(shape)).reshape(shape)
        return array

    def upload(self, memory: Memory, array: NDArray[Any]) -> None:
        _check_copy(memory, array)
        self._do(self._cuda.cuMemcpyHtoDAsync, memory.owner, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: NDArray[Any], memory: Memory) -> None:
        _check_copy(memory, array)
        self._do(self._cuda.cuMemcpyDtoHAsync, array.ctypes.data, memory.owner, array.nbytes, self._stream)

    def synchronize(self) -> None:
        self._do(self._cuda.cuStreamSynchronize, self._stream)

    def event(self) -> Any:
        event = self._do(self._cuda.cuEventCreate, 0)
        self._events.append(event)
        self._do(self._cuda.cuEventRecord, event, self._stream)
        return event

    def milliseconds(self, first: Any, last: Any) -> float:
        self._do(self._cuda.cuEventSynchronize, last)
        return float(self._do(self._cuda.cuEventElapsedTime, first, last))

    def _do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        status, *results = function(*arguments)
        self._check(status, function.__name__)
        return results[0] if results else None

    def _check(self, status: Any, what: str) -> None:
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(f"{what} failed: {status.name}; check nvidia-smi, or use another backend")


_CLASSES: dict[str, type[Device]] = {"pycuda": PyCudaDevice, "cuda-bindings": CudaBindingsDevice}


def open_device(index: int = 0, layer: str = "auto") -> Device:
    """The GPU with this index over a layer by name, or over the first one that works ("auto": PyCUDA first).

    `BackendUnavailable` where there is no GPU or neither layer can be imported; it says what to install.
    """
    if layer != "auto" and layer not in LAYERS:
        raise InputError(f"device layer {layer!r} is unknown; use one of auto, {', '.join(LAYERS)}")
    find_gpu(index)
    reasons: list[str] = []
    for name in LAYERS if layer == "auto" else (layer,):
        device = _try_layer(name, index, reasons)
        if device is not None:
            return device
    raise BackendUnavailable(
        f"nothing to reach the GPU with ({'; '.join(reasons)}); pip install cuda-bindings, or build PyCUDA"
    )


def _try_layer(name: str, index: int, reasons: list[str]) -> Device | None:
    try:
        return _CLASSES[name](index)
    except ImportError as error:
        reasons.append(f"{name}: {error}")
        return None


def _check_copy(memory: Memory, array: NDArray[Any]) -> None:
    if array.nbytes > memory.nbytes or not array.flags.c_contiguous:
        raise InputError(
            f"cannot copy an array of {array.nbytes} bytes (contiguous: {array.flags.c_contiguous}) and device memory "
            f"of {memory.nbytes}; the array must be contiguous and not larger"
        )


def _full(nbytes: int) -> BackendUnavailable:
    return BackendUnavailable(f"the GPU has no {nbytes / 2**20:.0f} MiB left; free memory, or use a smaller size")
