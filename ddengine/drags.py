"""Drags (handle -> target), their validation, and every coordinate space they pass through in one edit.

Spaces, from the user's picture to the UNet's latent. `xy` is (right, down), `yx` is (row, column); a whole
number is the centre of a pixel, so the left edge of the first pixel lies at -0.5:

- image: the upright input picture, as the user sees it (`xy_image`);
- work: the picture at the size the model edits (`xy_work`);
- feature: half the working size, the grid of feature maps, tracking and the soft mask (`yx_feature`);
- latent: an eighth of the working size, four feature cells to a latent cell (`yx_latent`).

This file needs no torch: tensors are accepted and returned where tensors come in.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from ddengine.errors import InputError

Point = tuple[float, float]

MAX_DRAGS = 64
MAX_NUMBERS = 4096  # of an array: above those of MAX_DRAGS, so that a few drags too many are counted in the refusal
MAX_ASPECT = 8
MIN_WORK_SIDE = 16
VAE_REDUCTION = 8
FEATURE_REDUCTION = 2

_EXPECTED = "a list of ((x, y), (x2, y2)) pairs, for example [((153, 445), (210, 443))]"


@dataclass(frozen=True)
class Drag:
    """One arrow: what is at `handle` is to move to `target`; both (x, y) in pixels of the upright input picture."""

    handle: Point
    target: Point


def parse_drags(drags: Any, width: int, height: int) -> tuple[Drag, ...]:
    """Check the user's drags against a picture of `width` x `height` pixels and return them as `Drag` records.

    `drags`: an iterable of `Drag` or of pairs of (x, y) points, or a numeric array [n, 2, 2]; pixels, x
    right, y down, origin at the centre of the top left pixel, fractions allowed. A point is inside if 0 <= x
    <= width - 1 and 0 <= y <= height - 1. Raises InputError for anything else: no drags, more than MAX_DRAGS,
    a bare pair, points that are not two finite numbers, points outside, a handle equal to its target.
    """
    items = _items(drags)
    if not items:
        raise InputError(f"no drags were given; pass {_EXPECTED}")
    if _is_bare_pair(items):
        raise InputError(
            f"drags is one bare pair of points, {_short(drags)}; a list of pairs is needed: put "
            f"it in brackets, [{_short(drags)}]"
        )
    if len(items) > MAX_DRAGS:
        raise InputError(f"{len(items)} drags were given, the limit is {MAX_DRAGS}; use fewer drags in one edit")
    return tuple(_parse_drag(item, index, width, height) for index, item in enumerate(items))


def _items(drags: Any) -> list[Any]:
    drags = _listed(drags)
    if isinstance(drags, Drag):
        raise InputError("drags is one Drag; a list is needed: put it in brackets, [drag]")
    if isinstance(drags, (str, bytes, dict)) or not isinstance(drags, Iterable):
        raise InputError(f"drags is {_short(drags)}; pass {_EXPECTED}")
    # An endless generator must not hang the call: one item past the limit is enough to refuse it.
    items: list[Any] = []
    for item in drags:
        items.append(item)
        if len(items) > MAX_DRAGS and not isinstance(drags, Sequence):
            raise InputError(f"more than {MAX_DRAGS} drags were given; use fewer drags in one edit")
    return items


def _is_bare_pair(items: Sequence[Any]) -> bool:
    return len(items) in (2, 4) and (
        all(_is_number(item) for item in items) or all(not isinstance(item, Drag) and _is_point(item) for item in items)
    )


def _parse_drag(item: Any, index: int, width: int, height: int) -> Drag:
    if isinstance(item, Drag):
        ends: list[Any] = [item.handle, item.target]
    else:
        item = _listed(item)
        if isinstance(item, (str, bytes, dict)) or not isinstance(item, Iterable):
            raise InputError(f"drag {index} is {_short(item)}; pass {_EXPECTED}")
        ends = list(item)
        if len(ends) != 2:
            raise InputError(
                f"drag {index} has {len(ends)} parts, {_short(item)}; it needs a handle and a target: {_EXPECTED}"
            )
    handle = _parse_point(ends[0], f"drag {index}: handle", width, height)
    target = _parse_point(ends[1], f"drag {index}: target", width, height)
    if handle == target:
        raise InputError(
            f"drag {index}: handle and target are the same point, {_format(handle)}; move one of "
            "them or leave the drag out"
        )
    return Drag(handle, target)


def _parse_point(point: Any, what: str, width: int, height: int) -> Point:
    point = _listed(point)
    if not _is_point(point):
        raise InputError(f"{what} is {_short(point)}; a point is two numbers (x, y)")
    try:
        x, y = float(point[0]), float(point[1])
    except OverflowError:  # an int beyond float's range
        x = y = math.inf
    if not (math.isfinite(x) and math.isfinite(y)):
        raise InputError(f"{what} is {_short(point)}; both coordinates must be finite numbers")
    if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
        raise InputError(
            f"{what} {_format((x, y))} lies outside the picture of {width} x {height} pixels; "
            f"x must be from 0 to {width - 1}, y from 0 to {height - 1} (in the upright picture)"
        )
    return x, y


def _is_point(value: Any) -> bool:
    value = _listed(value)
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(part) for part in value)


def _listed(value: Any) -> Any:
    """An array or tensor as lists, other values as they are; InputError for one far too large to hold drags."""
    if not hasattr(value, "tolist"):
        return value
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(max(side, 1) for side in shape) > MAX_NUMBERS:  # an empty one has as many lists as its other sides say
        raise InputError(f"an array of shape {shape} was given for drags; the limit is {MAX_DRAGS} drags, {_EXPECTED}")
    return value.tolist()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _format(point: Point) -> str:
    return f"({point[0]:g}, {point[1]:g})"


def _short(value: Any) -> str:
    """A value in a message: of large and of deep ones only the beginning is ever printed."""
    try:
        text = _PRINTER.repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints; a caller near the end of the stack
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else text[:77] + "..."


_PRINTER = reprlib.Repr()
_PRINTER.maxlevel = 4
_PRINTER.maxstring = _PRINTER.maxlong = _PRINTER.maxother = 80


@dataclass(frozen=True)
class Spaces:
    """The sizes of every coordinate space of one edit and the maps between them.

    The maps take points [n, 2] (any leading shape; nested lists, NumPy arrays or tensors) and return float64 of the
    same kind: NumPy unless a tensor came in. Each axis has its own scale; pixel centres are kept:
    p' = (p + 0.5) * s - 0.5. `snapped` says that the working sides were rounded to multiples of 8, so that the latent
    covers the working picture exactly.
    """

    image_size: tuple[int, int]  # (width, height) of the upright input picture
    work_size: tuple[int, int]  # (width, height) the model edits
    snapped: bool = True

    @property
    def work_hw(self) -> tuple[int, int]:
        return self.work_size[1], self.work_size[0]

    @property
    def latent_hw(self) -> tuple[int, int]:
        """(rows, columns) of the latent; the VAE's encoder floors, so an odd rest is not seen."""
        return self.work_size[1] // VAE_REDUCTION, self.work_size[0] // VAE_REDUCTION

    @property
    def feature_hw(self) -> tuple[int, int]:
        """(rows, columns) of the feature grid: half the working size, floored."""
        return self.work_size[1] // FEATURE_REDUCTION, self.work_size[0] // FEATURE_REDUCTION

    def work_from_image(self, xy_image: Any) -> Any:
        return _resampled(xy_image, self.image_size, self.work_size)

    def image_from_work(self, xy_work: Any) -> Any:
        return _resampled(xy_work, self.work_size, self.image_size)

    def feature_from_image(self, xy_image: Any) -> Any:
        """(x, y) in image pixels -> (row, column) on the feature grid."""
        return _swapped(_resampled(xy_image, self.image_size, self.feature_hw[::-1]))

    def image_from_feature(self, yx_feature: Any) -> Any:
        """(row, column) on the feature grid -> (x, y) in image pixels; the inverse of `feature_from_image`."""
        return _resampled(_swapped(_as_float64(yx_feature)), self.feature_hw[::-1], self.image_size)

    def feature_from_work(self, xy_work: Any) -> Any:
        return _swapped(_resampled(xy_work, self.work_size, self.feature_hw[::-1]))

    def work_from_feature(self, yx_feature: Any) -> Any:
        return _resampled(_swapped(_as_float64(yx_feature)), self.feature_hw[::-1], self.work_size)

    def latent_from_feature(self, yx_feature: Any) -> Any:
        """(row, column) on the feature grid -> (row, column) on the latent grid."""
        return _resampled(yx_feature, self.feature_hw, self.latent_hw)

    def feature_from_latent(self, yx_latent: Any) -> Any:
        return _resampled(yx_latent, self.latent_hw, self.feature_hw)


def _as_float64(points: Any) -> Any:
    if hasattr(points, "new_tensor"):  # a torch tensor, without importing torch here
        return points.double()
    return np.asarray(points, dtype=np.float64)


def _swapped(points: Any) -> Any:
    return points[..., [1, 0]]


def _resampled(points: Any, size: tuple[int, int], new_size: tuple[int, int]) -> Any:
    """Map points from a grid of `size` to one of `new_size` (both in the order of the points' two columns)."""
    points = _as_float64(points)
    ratio = [new / old for new, old in zip(new_size, size, strict=True)]
    scale = points.new_tensor(ratio) if hasattr(points, "new_tensor") else np.asarray(ratio)
    return (points + 0.5) * scale - 0.5


def fit(width: int, height: int, model_size: int, *, upscale: bool = True, snap: int = VAE_REDUCTION) -> Spaces:
    """The size rule: the working size at which a picture of `width` x `height` pixels is edited.

    The picture is scaled, up or down, so that its long side equals `model_size`; then each side is rounded to
    the nearest multiple of `snap`, at least MIN_WORK_SIDE. With `upscale=False` a smaller picture keeps its
    size before the rounding. The published code's rule (only shrink, no snapping; method specification,
    section 1) is `upscale=False, snap=1`. Raises InputError if the sides' ratio is above MAX_ASPECT: the
    short side would hold too few latent cells to edit.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"the picture is {width} x {height} pixels, a ratio of "
            f"{max(width, height) / min(width, height):.1f}:1, the limit "
            f"is {MAX_ASPECT}:1; crop it around the part to edit"
        )
    scale = model_size / max(width, height)
    if not upscale:
        scale = min(scale, 1.0)
    work_width, work_height = (max(round(side * scale / snap) * snap, MIN_WORK_SIDE) for side in (width, height))
    return Spaces((width, height), (work_width, work_height), snapped=snap % VAE_REDUCTION == 0)
