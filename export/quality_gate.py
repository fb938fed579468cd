"""The gate before fp8: edits with the candidate graph beside edits with the accepted one, judged by their pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddengine.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LIMIT_DB = 40.0  # an error of about 2.5 of 255: below what 8-bit pictures show side by side
MIN_PICTURES = 4


@dataclass(frozen=True)
class GateResult:
    """What a gate measured for one graph (`GraphFacts.digest`): PSNR of every picture, in dB."""

    graph: str
    decibels: tuple[float, ...]
    limit: float = LIMIT_DB

    @property
    def passed(self) -> bool:
        """Enough pictures, and the worst of them within the limit."""
        return len(self.decibels) >= MIN_PICTURES and min(self.decibels) >= self.limit

    def says(self) -> str:
        """The result in words."""
        if len(self.decibels) < MIN_PICTURES:
            return f"{len(self.decibels)} pictures were measured, {MIN_PICTURES} are needed"
        return f"the worst picture has {min(self.decibels):.1f} dB, {self.limit:.1f} are needed"


def image_quality_gate(
    graph: str,
    accepted: Sequence[NDArray[np.uint8]],
    candidates: Sequence[NDArray[np.uint8]],
    limit: float = LIMIT_DB,
) -> GateResult:
    """Compare edited pictures, uint8 H x W x 3, pair by pair; `graph`: digest of the candidate (`GraphFacts.digest`).

    Raises InputError for pictures that are no pairs.
    """
    import numpy as np

    if len(accepted) != len(candidates):
        raise InputError(f"{len(accepted)} accepted and {len(candidates)} candidate pictures; give pairs")
    decibels = []
    for number, (left, right) in enumerate(zip(accepted, candidates, strict=True)):
        if left.shape != right.shape or left.dtype != np.uint8 or right.dtype != np.uint8:
            raise InputError(
                f"pair {number} is {left.dtype} {left.shape} and {right.dtype} {right.shape}; give uint8 pictures of "
                f"one size"
            )
        square = float(np.mean((left.astype(np.float64) - right.astype(np.float64)) ** 2))
        decibels.append(math.inf if square == 0 else 10 * math.log10(255.0**2 / square))
    return GateResult(graph, tuple(decibels), limit)
