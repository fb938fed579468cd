"""What the NVIDIA driver tells of a GPU: its own version, clocks, power limit, and the energy it has drawn so far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from ddengine.errors import BackendUnavailable


class Nvml:
    """One CUDA device as the NVIDIA Management Library sees it (nvidia-ml-py, an optional package).

    Raises BackendUnavailable, with the reason, for another device, without the package, or where the driver does not
    answer.
    """

    def __init__(self, device: torch.device | str) -> None:
        on = torch.device(device)
        if on.type != "cuda":
            raise BackendUnavailable(f"NVML knows NVIDIA GPUs; this is {on.type}")
        try:
            lib: Any = import_module("pynvml")  # untyped
        except ImportError as error:
            raise BackendUnavailable("nvidia-ml-py is not installed; pip install 'ddengine[bench]'") from error
        self._lib = lib
        about = torch.cuda.get_device_properties(on)
        try:
            lib.nvmlInit()
            # By its own name: CUDA may number the devices otherwise than the driver does.
            self._handle = lib.nvmlDeviceGetHandleByUUID(f"GPU-{about.uuid}")
        except lib.NVMLError as error:
            raise BackendUnavailable(f"NVML does not answer for {about.name}: {error}") from error

    def facts(self) -> dict[str, Any]:
        """Driver, clocks in MHz as they are now and at most, power limit in watts; None for what is not told."""
        lib, handle = self._lib, self._handle
        kinds = {"sm": lib.NVML_CLOCK_SM, "memory": lib.NVML_CLOCK_MEM}
        clocks = {name: self._asked(partial(lib.nvmlDeviceGetClockInfo, handle, kind)) for name, kind in kinds.items()}
        for name, kind in kinds.items():
            clocks[f"{name}_max"] = self._asked(partial(lib.nvmlDeviceGetMaxClockInfo, handle, kind))
        limit = self._asked(lambda: lib.nvmlDeviceGetPowerManagementLimit(handle))
        return {
            "driver": self._asked(lib.nvmlSystemGetDriverVersion),
            "clocks_mhz": clocks,
            "power_limit_watts": None if limit is None else limit / 1e3,
        }

    def joules(self) -> float | None:
        """Energy drawn since the driver was loaded, None where the GPU does not count it (before Volta)."""
        counted = self._asked(lambda: self._lib.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if counted is None else counted / 1e3

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._lib.NVMLError:
            return None
