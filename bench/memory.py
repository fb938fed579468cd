"""The most memory that something took: of a GPU by PyTorch's allocator, of a process by the system."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """A high-water mark that can be set back; `what` says of what.

    On CUDA the allocator's: what TensorRT or a driver allocates past it is not in it. Elsewhere the process's resident
    memory, where Linux lets it be set back; otherwise the largest one so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self.what = "PyTorch's CUDA allocator, peak"
        elif self._set_back():
            self.what = "resident memory of the process, peak"
        else:
            self.what = "resident memory of the process, peak since it started"

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._set_back()

    def read(self) -> int | None:
        """Bytes, None where nobody tells."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            return _largest_so_far()

    def _set_back(self) -> bool:
        try:
            _RESET.write_text("5", encoding="ascii")  # 5: the peak of the resident set alone
        except OSError:
            return False
        return True


def _largest_so_far() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
