"""The scene bench: held-out drags whose right answer is known, so quality is a number and not an impression.

A drag's scene, its goal (the same scene with the part moved) and the embedded model's edit give three figures:

- goal gain = 1 - MSE(edit, goal) / MSE(input, goal) over the pixels that differ between input and goal: 1 is
  the perfect answer, 0 is what doing nothing scores, below 0 is worse than nothing;
- distance from where the part is found in the edit to its target, as a share of the drag's length: 1 for no motion;
- PSNR in dB against the input over all pixels that should not change.

`ddengine eval --suite scenes` edits them and makes the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddengine.drags import Drag
from ddengine.scenes.scene import TrueDrag, true_drag

SIZE = 128
SEED = 30_000_000  # training and the choice of the default settings used other seeds
CHANGED = 12  # levels of 255 by which a pixel must differ between input and goal to count as changed
MARGIN = 6  # pixels around the changed region that belong to neither region
RIM = 2  # pixels around a part that are compared along with it
FLAWLESS = 60.0  # dB that stand for identical pixels, so that a mean exists

Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """Figures of one edit; `moved` is the part's name."""

    moved: str
    goal_gain: float
    distance: float
    psnr_outside: float


def held_out(count: int, seed: int = SEED) -> list[TrueDrag]:
    """`count` drags that no training run has seen."""
    return [held_out_drag(k, seed) for k in range(count)]


def held_out_drag(number: int, seed: int = SEED) -> TrueDrag:
    """The `number`-th of them, from 0; each is drawn on its own."""
    return true_drag(np.random.default_rng((seed, number)))


def arrow(drag: TrueDrag) -> Drag:
    """The drag in pixels of a picture of `SIZE` x `SIZE`."""
    handle, target = ((x * SIZE - 0.5, y * SIZE - 0.5) for x, y in (drag.handle, drag.target))
    return Drag(handle, target)


def score(drag: TrueDrag, edited: Image.Image) -> Score:
    """Judge an edited picture (`SIZE` x `SIZE`) against the drag's goal."""
    before, goal, after = (np.asarray(x, np.float32) for x in (drag.scene.render(SIZE), drag.goal.render(SIZE), edited))
    changed = np.abs(before - goal).max(2) > CHANGED
    still = ~_grown(changed, MARGIN)
    gain = 1 - np.square(after - goal)[changed].mean() / np.square(before - goal)[changed].mean()
    error = float(np.square(after - before)[still].mean()) if still.any() else 0.0
    psnr = min(FLAWLESS, 10 * math.log10(255**2 / max(error, 1e-9)))
    return Score(drag.part, float(gain), distance(drag, before, after), psnr)


def distance(drag: TrueDrag, before: Picture, after: Picture) -> float:
    """How far from its target the part lies, over the drag's length.

    The part's own pixels around the handle are looked for in the edit, at every pixel within 1.25 drag lengths of the
    drag's path, by the smallest mean squared difference of colours. No network judges.
    """
    handle, target = (np.array(p) * SIZE - 0.5 for p in (drag.handle, drag.target))
    length = float(np.hypot(*(target - handle)))
    radius = int(np.clip(round(drag.radius * SIZE), 4, 12))
    origin = np.rint(handle).astype(int)
    template = _patch(_padded(before, radius), origin, radius)
    part = _patch(_padded(_part_pixels(drag, before), radius), origin, radius)
    padded = _padded(after, radius)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE]
    near = _near(xs, ys, handle, target, 1.25 * length)
    best, where = math.inf, handle
    for x, y in zip(xs[near], ys[near], strict=True):
        error = float((part * np.square(_patch(padded, (x, y), radius) - template)).sum())
        if error < best:
            best, where = error, np.array((x, y), float)
    return float(np.hypot(*(where - np.rint(target)))) / length


def _part_pixels(drag: TrueDrag, before: Picture) -> Picture:
    """1 where the part is seen in the input, and on a rim around it that holds its outline, [SIZE, SIZE, 1].

    The part is what changes when it is drawn far away. Without the rim, a part of one colour would be found anywhere
    inside a larger one of that colour (a hill's peak in the hill).
    """
    (x0, y0), (x1, y1) = drag.handle, drag.target
    away = 4 * drag.radius / math.hypot(x1 - x0, y1 - y0)
    without = drag.scene.moved(drag.subject, drag.part, away * (x0 - x1), away * (y0 - y1)).render(SIZE)
    seen = np.abs(before - np.asarray(without, np.float32)).max(2) > CHANGED
    return _grown(seen, RIM)[..., None].astype(np.float32)


def _near(xs: NDArray, ys: NDArray, start: NDArray, end: NDArray, reach: float) -> NDArray[np.bool_]:
    along = end - start
    share = np.clip(((xs - start[0]) * along[0] + (ys - start[1]) * along[1]) / (along @ along), 0, 1)
    return np.hypot(xs - start[0] - share * along[0], ys - start[1] - share * along[1]) <= reach


def _padded(picture: Picture, radius: int) -> Picture:
    return np.pad(picture, ((radius, radius), (radius, radius), (0, 0)), mode="edge")


def _patch(padded: Picture, xy: Sequence[int] | NDArray, radius: int) -> Picture:
    """The square patch of `radius` around a pixel (x, y) of the unpadded picture."""
    x, y = xy
    return padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1]


def _grown(region: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    out = region.copy()
    for axis in (0, 1):
        padded = np.pad(out, [(margin, margin) if a == axis else (0, 0) for a in (0, 1)])
        out = np.lib.stride_tricks.sliding_window_view(padded, 2 * margin + 1, axis).any(-1)
    return out
