"""What one call of an edit is measured with: clock, stages, memory, energy, and on CUDA how busy the device was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ddengine import engine as engine_module
from ddengine.bench.clock import Clock
from ddengine.bench.memory import PeakMemory
from ddengine.bench.nvml import Nvml
from ddengine.bench.waterfall import device_seconds
from ddengine.directdrag import run as run_module
from ddengine.engine import STAGES
from ddengine.errors import BackendUnavailable
from ddengine.result import EditResult

REST = "rest"  # of an edit, outside all stages: reading, checking, the mask at the picture's size
Call = Callable[[], list[EditResult]]


@dataclass(frozen=True)
class Sample:
    """One call: seconds by the clock of the run and by the host's, of which stage how many, joules, bytes."""

    seconds: float
    wall: float
    stages: Mapping[str, float]
    updates: tuple[int, ...]
    joules: float | None
    peak_bytes: int | None
    load: float | None


class Meter:
    """What one call is measured with: clock, memory, energy. Reasons stand where there is none."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock, self.memory = device, Clock(device), PeakMemory(device)
        self.nvml: Nvml | None = None
        self.no_energy = ""
        try:
            self.nvml = Nvml(device)
            if self.nvml.joules() is None:
                self.no_energy = "this GPU counts no energy"
        except BackendUnavailable as error:
            self.no_energy = str(error)

    def take(self, call: Call) -> Sample:
        """Call once, and measure."""
        self.memory.reset()
        with stages_by(self.clock):
            drawn, began, host = self._joules(), self.clock.now(), time.perf_counter()
            results = call()
            seconds, wall, joules = self.clock.now() - began, time.perf_counter() - host, self._joules()
        stages = {stage: results[0].timings.get(stage, 0.0) for stage in STAGES}
        stages["decode"] = sum(result.timings["decode"] for result in results)  # each has its own
        return Sample(
            seconds,
            wall,
            {**stages, REST: max(0.0, seconds - sum(stages.values()))},
            tuple(len(result.history) for result in results),
            None if drawn is None or joules is None else joules - drawn,
            self.memory.read(),
            os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )

    def busy(self, call: Call) -> float:
        """Seconds that a call keeps a CUDA device busy, by its profile."""
        return device_seconds(call)

    def _joules(self) -> float | None:
        return self.nvml.joules() if self.nvml is not None else None


@contextmanager
def stages_by(clock: Clock) -> Iterator[None]:
    """Where the clock is the process's own, the engine's book-keeping of stages reads it too."""
    if not clock.own:
        yield
        return
    stand_in, modules = SimpleNamespace(perf_counter=clock.now), (engine_module, run_module)
    before = [vars(module)["time"] for module in modules]
    for module in modules:
        vars(module)["time"] = stand_in
    try:
        yield
    finally:
        for module, known in zip(modules, before, strict=True):
            vars(module)["time"] = known
