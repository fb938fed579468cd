"""DAI, dragging accuracy: what lay at the handle compared with what lies at the target (GoodDrag, for Drag100)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ddengine.drags import Drag, Point
from ddengine.errors import InputError

RADII = (1, 5, 10, 20)


def dai(original: Image.Image, result: Image.Image, drags: Sequence[Drag], radius: int) -> tuple[float | None, ...]:
    """Of each drag: Σ (P − Q)² / (1 + 2r)², P the original's patch at the handle, Q the result's at the target.

    Pictures RGB of one size, values in [0, 1], patches of (1 + 2r)² pixels and three channels around the nearest pixel;
    lower is better. None where a patch crosses the border, where the published script stops with an error. A sample's
    value is the mean over its drags; the published script divides that mean by their number once more, which
    `pooling.Column.published` repeats and `per_image` does not. Method specification, section 13.
    """
    if original.size != result.size:
        raise InputError(f"pictures of {original.size} and {result.size} cannot be compared; resize the result")
    before, after = (np.asarray(each.convert("RGB"), dtype=np.float64) / 255 for each in (original, result))

    def patch(pixels: np.ndarray, point: Point) -> np.ndarray | None:
        x, y = round(point[0]), round(point[1])
        inside = radius <= x < pixels.shape[1] - radius and radius <= y < pixels.shape[0] - radius
        return pixels[y - radius : y + radius + 1, x - radius : x + radius + 1] if inside else None

    values: list[float | None] = []
    for drag in drags:
        one, other = patch(before, drag.handle), patch(after, drag.target)
        if one is None or other is None:
            values.append(None)
        else:
            values.append(float(((one - other) ** 2).sum()) / (1 + 2 * radius) ** 2)
    return tuple(values)
