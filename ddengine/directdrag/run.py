"""The book-keeping of one prepare or edit: progress reports, network passes and seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where a run stands: `step` of `total` steps of a stage are done.

    points_yx: current handles [n,2] on the feature grid; latent: what a preview decodes [1,4,h,w]; None where a stage
    has none.
    """

    stage: str
    step: int
    total: int
    points_yx: Tensor | None = None
    latent: Tensor | None = None


class Run:
    """Counts what one run of the method costs, and tells its caller where it stands.

    `passes`: UNet forwards and backwards by stage; `seconds` by stage. What the progress callable raises
    (`Cancelled` above all) passes straight through.
    """

    def __init__(self, device: torch.device, progress: Callable[[Step], None] | None = None) -> None:
        self.passes: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, float] = {}
        self._device, self._progress = device, progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, waiting for the device at both ends; a stage entered again adds up."""
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def count(self, stage: str, *, forward: int = 0, backward: int = 0) -> None:
        """Add UNet passes to a stage."""
        counts = self.passes.setdefault(stage, {"forward": 0, "backward": 0})
        counts["forward"] += forward
        counts["backward"] += backward

    def report(
        self, stage: str, step: int, total: int, *, points_yx: Tensor | None = None, latent: Tensor | None = None
    ) -> None:
        """Tell the caller that `step` of `total` steps of a stage are done."""
        if self._progress is not None:
            self._progress(Step(stage, step, total, points_yx, latent))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
