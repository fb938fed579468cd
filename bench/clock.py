"""What time means where something is measured by whole edits."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clock:
    """Seconds that pass on a device. On a CPU with one thread: those that the process itself was computing.

    Others on the machine then cost no more than what they do to its caches; with nobody else there it is the host's
    clock. On CUDA the device is waited for first.
    """

    device: torch.device

    @property
    def name(self) -> str:
        return "the process's own time" if self.own else "host"

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.own else time.perf_counter()

    @property
    def own(self) -> bool:
        """Whether others on the machine are left out."""
        return self.device.type == "cpu" and torch.get_num_threads() == 1
