"""What an edit returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.artifacts import save_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


@dataclass(frozen=True)
class EditResult:
    """An edited picture and how it came about.

    image: RGB, the size of the (upright) input.
    handles: final tracked points, (x, y) in input pixels, in the order of the drags.
    mask: float32 [H, W] in 0..1 at the input's size, 1 where the picture was free to change.
    timings: seconds by stage (load, encode, invert, reference, warp, drag, denoise, decode, total); a stage that was
    paid for earlier (a loaded engine, a prepared source) counts 0.
    passes: UNet forwards and backwards by stage, e.g. {"drag": {"forward": 210, "backward": 210}}; the autoencoder and
    the readout head are not counted.
    history: one dictionary per latent update: step, t, drag_loss, background_loss, readout_loss, total_loss, updated,
    and handles, (x, y) in input pixels.
    backend: what ran each stage and why, e.g. {"drag": "eager (auto: ...)"}.
    notes: what a user should know, e.g. that the model has no readout head.
    """

    image: Image.Image
    handles: tuple[tuple[float, float], ...]
    mask: NDArray[np.float32]
    timings: dict[str, float]
    passes: dict[str, dict[str, int]]
    history: tuple[dict[str, Any], ...]
    backend: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    def save(self, path: str | Path) -> Path:
        """Write the picture atomically in the format of the suffix; InputError if that cannot be done."""
        return save_picture(self.image, path)
