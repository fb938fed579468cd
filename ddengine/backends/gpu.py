"""Which NVIDIA GPUs the driver offers, asked of the driver itself: no PyTorch, no other package."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import Any

from ddengine.errors import BackendUnavailable

_LIBRARIES = ("nvcuda.dll", "nvml.dll") if os.name == "nt" else ("libcuda.so.1", "libnvidia-ml.so.1")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A GPU as an engine's key names it.

    `sm`: compute capability without its point (90 is 9.0). `driver`: the driver's version, "" where it does not say.
    `cuda`: newest CUDA version that driver runs.
    """

    index: int
    name: str
    sm: int
    memory: int
    driver: str
    cuda: str

    @property
    def driver_major(self) -> str:
        """The driver's branch: engines are kept apart by it."""
        return self.driver.partition(".")[0]


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Every visible GPU, none where there is no driver; asked once a process."""
    try:
        return _ask()
    except BackendUnavailable:
        return ()


def find_gpu(index: int = 0) -> Gpu:
    """A GPU by its index among the visible ones; `BackendUnavailable` says why there is none."""
    found = gpus()
    if not found:
        _ask()  # for its reason
    if not 0 <= index < len(found):
        raise BackendUnavailable(
            f"there is no GPU {index}: the driver offers {len(found)}; use cuda:0 or set CUDA_VISIBLE_DEVICES"
        )
    return found[index]


def _ask() -> tuple[Gpu, ...]:
    try:
        cuda = ctypes.CDLL(_LIBRARIES[0])
    except OSError as error:
        raise BackendUnavailable(f"no NVIDIA driver ({error}); install one, or use another backend") from error
    _call(cuda, "cuInit", 0)
    count, version = ctypes.c_int(), ctypes.c_int()
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    _call(cuda, "cuDriverGetVersion", ctypes.byref(version))
    runs = f"{version.value // 1000}.{version.value % 1000 // 10}"
    driver = _driver_version()
    found = []
    for index in range(count.value):
        device = ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
        _call(cuda, "cuDeviceGetName", name, len(name), device)
        _call(cuda, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        _call(cuda, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        sm = 10 * major.value + minor.value
        found.append(Gpu(index, name.value.decode(errors="replace"), sm, memory.value, driver, runs))
    if not found:
        raise BackendUnavailable("the NVIDIA driver offers no GPU; check CUDA_VISIBLE_DEVICES, or use another backend")
    return tuple(found)


def _call(library: Any, name: str, *arguments: Any) -> None:
    status = getattr(library, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode(errors="replace") if text.value else f"error {status}"
        raise BackendUnavailable(
            f"the NVIDIA driver does not work ({name}: {reason}); check nvidia-smi, or use another backend"
        )


def _driver_version() -> str:
    """From NVML, which comes with the driver but not into every container."""
    try:
        nvml = ctypes.CDLL(_LIBRARIES[1])
    except OSError:
        return ""
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2():
        return ""
    try:
        return text.value.decode() if not nvml.nvmlSystemGetDriverVersion(text, len(text)) else ""
    finally:
        nvml.nvmlShutdown()
