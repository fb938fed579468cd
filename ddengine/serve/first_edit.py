"""The edit that has to pass before a worker is ready: all stages on what will run later, in as few steps as can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ddengine.config import DirectDragConfig
from ddengine.errors import Cancelled, DDEngineError

if TYPE_CHECKING:
    from ddengine.engine import Engine
    from ddengine.progress import Progress

SETTINGS = {"n_inference_step": 4, "drag_end_step": 1, "track_per_step": 1, "max_drag_per_track": 1}


def try_out(engine: Engine, stopping: Callable[[], bool]) -> None:
    """A short edit of a drawn picture; raises what it raises, DDEngineError for a result that is none, Cancelled."""

    def report(at: Progress) -> None:
        if stopping():
            raise Cancelled("the service is being stopped")

    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    pixels = np.stack([np.broadcast_to(ramp, (96, 96)), np.broadcast_to(ramp[:, None], (96, 96)), _disc()], -1)
    config = DirectDragConfig.preset("default", **SETTINGS)
    result = engine.edit(Image.fromarray(pixels), [((40, 48), (56, 48))], config=config, progress=report)
    if result.image.size != (96, 96) or not np.isfinite(result.handles).all():
        raise DDEngineError(f"the first edit gave {result.image.size} pixels and handles {result.handles}")


def _disc() -> np.ndarray:
    rows, columns = np.mgrid[:96, :96]
    return np.where((rows - 48) ** 2 + (columns - 40) ** 2 < 200, 255, 30).astype(np.uint8)
