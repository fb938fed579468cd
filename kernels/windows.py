"""Where a patch of the enlarged feature map lies in the native one: what the operators on patches share.

The method's points live on the feature grid, a bilinear enlargement of the UNet's feature map (four times a side). That
map is never built: enlarging and fractional sampling are both linear and separable, so a patch of P x P positions is

    patch = R F Cᵀ        R [P,K], F [K,K] cells of the native map, C [P,K]: at most three non-zero weights a row

which is exact. K is the number of native cells that P positions can touch: 5 for 9 positions at four times a side. The
adjoint adds Rᵀ G C to those cells, point after point: deterministic, for the cells of one window differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddengine.errors import InputError

BORDERS = ("clamp", "zero")
SMALL = 1 << 18  # values, a megabyte of float32: a limit below it would cost more in pieces than it saves


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type that patches are computed in: float32, or float64 for float64 features."""
    return torch.promote_types(dtype, torch.float32)


def window_cells(radius: int, size: int, native: int) -> int:
    """How many native cells K the 2r+2 enlarged cells of a patch can touch along one axis."""
    return min(native, (2 * radius + 1) * native // size + 3)


def check(feature: Tensor, points_yx: Tensor, size_hw: tuple[int, int], border: str, borders: tuple[str, ...]) -> None:
    """Refuse what no window can be read from (InputError): wrong shapes, a shrinking grid, an unknown border."""
    fits = feature.dim() == 4 and points_yx.dim() == 3 and tuple(points_yx.shape[::2]) == (feature.shape[0], 2)
    if not fits or points_yx.shape[1] < 1:
        raise InputError(
            f"a feature map {list(feature.shape)} and points {list(points_yx.shape)} do not fit; give a map [B,C,h,w] "
            f"and at least one point [B,n,2], or [n,2] for one picture"
        )
    if size_hw[0] < feature.shape[2] or size_hw[1] < feature.shape[3]:
        raise InputError(
            f"the feature grid of {size_hw[0]} x {size_hw[1]} is smaller than the map of {feature.shape[2]} x "
            f"{feature.shape[3]}; give a grid at least as large"
        )
    if border not in borders:
        raise InputError(f"border {border!r} is unknown; use one of {', '.join(borders)}")


def room(feature: Tensor) -> int:
    """How many values a tensor made on the way may hold: as many as the map [B,C,h,w], or `SMALL` for a smaller one."""
    return max(feature.numel(), SMALL)


class Axis(NamedTuple):
    """One axis of m windows: their native cells [m,K] (int64) and the weights [m,P,K] of each position on them."""

    cells: Tensor
    weights: Tensor


def axis_of(centres: Tensor, radius: int, size: int, native: int, border: str, dtype: torch.dtype) -> Axis:
    """The axis that reads a native one at centres [m] − r ... + r of its enlargement to `size` cells.

    The enlargement is bilinear with pixel centres kept (align_corners=False); between enlarged cells values are
    interpolated linearly. border, for cells outside the enlarged axis: "clamp" repeats the last, "zero" reads zero.
    A centre that is no number gives cells within the map and weights that are no numbers.
    """
    low = centres.floor()[:, None]
    fraction = (centres[:, None] - low)[..., None]  # one for the whole patch: rounding does not grow with the position
    low = low + torch.arange(-radius, radius + 1, dtype=centres.dtype, device=centres.device)

    def source(cell: Tensor) -> Tensor:
        return ((cell.clamp(0, size - 1) + 0.5) * (native / size) - 0.5).clamp(0, native - 1)

    count = window_cells(radius, size, native)
    start = source(low[:, 0]).floor().long().clamp(0, native - count)  # also for what was no number
    cells = start[:, None] + torch.arange(count, device=centres.device)

    def enlarged(cell: Tensor) -> Tensor:
        weights = (1 - (source(cell)[..., None] - cells[:, None]).abs()).clamp_min(0)
        if border == "zero":
            weights = weights * ((cell >= 0) & (cell <= size - 1))[..., None]
        return weights

    return Axis(cells, ((1 - fraction) * enlarged(low) + fraction * enlarged(low + 1)).to(dtype))


class Windows(NamedTuple):
    """The windows of m points, `each` of them a picture, in maps [B,C,h,w]."""

    rows: Axis
    columns: Axis
    each: int

    @classmethod
    def of(cls, feature: Tensor, centres_yx: Tensor, radius: int, size_hw: tuple[int, int], border: str) -> Windows:
        """Windows around centres [B,n,2]."""
        centres, dtype = centres_yx.flatten(0, 1), widened(feature.dtype)
        rows, columns = (
            axis_of(centres[:, k], radius, size_hw[k], feature.shape[2 + k], border, dtype) for k in (0, 1)
        )
        return cls(rows, columns, centres_yx.shape[1])

    def pieces(self, feature: Tensor) -> Iterator[tuple[slice, list[slice]]]:
        """Slices of points and, for each, of channels, whose patches together take half the `room`, or less.

        At the least one channel of one point.
        """
        points, channels, budget = len(self.rows.cells), feature.shape[1], room(feature) // 2
        rows, columns = (max(*axis.weights.shape[1:]) for axis in (self.rows, self.columns))
        positions = rows * columns
        wide = min(channels, max(1, budget // positions))
        many = max(1, budget // (wide * positions))
        for point in range(0, points, many):
            some = [slice(channel, min(channel + wide, channels)) for channel in range(0, channels, wide)]
            yield slice(point, min(point + many, points)), some

    def read(self, feature: Tensor, points: slice, channels: slice) -> Tensor:
        """Patches [m,P,P,C], channels last, of some points and channels; widened after the read.

        One axis, then the other, each as one matrix product a point: the columns' cells come first meanwhile.
        """
        pictures = torch.arange(points.start, points.stop, device=feature.device) // self.each
        rows, columns = self._part(points)
        cells = pictures[:, None, None], rows.cells[:, None], columns.cells[:, :, None]
        window = feature[:, channels].permute(0, 2, 3, 1)[cells].to(rows.weights.dtype)
        half = (columns.weights @ window.flatten(2)).unflatten(2, window.shape[2:]).transpose(1, 2)
        return (rows.weights @ half.flatten(2)).unflatten(2, half.shape[2:])

    def add_adjoint(self, total: Tensor, patches: Tensor, points: slice, channels: slice, live: Tensor | None) -> None:
        """Add to maps [B,C,h,w] what `read`, transposed, makes of patches [m,P,P,C]; 0 for points that are not live."""
        rows, columns = self._part(points)
        half = (rows.weights.mT @ patches.flatten(2)).unflatten(2, patches.shape[2:]).transpose(1, 2)
        windows = (columns.weights.mT @ half.flatten(2)).unflatten(2, half.shape[2:])
        if live is not None:
            windows = torch.where(live[points, None, None, None], windows, 0)
        for k, window in enumerate(windows):
            picture = total[(points.start + k) // self.each, channels].permute(1, 2, 0)
            picture.index_put_((rows.cells[k], columns.cells[k][:, None]), window, accumulate=True)

    def _part(self, points: slice) -> tuple[Axis, Axis]:
        rows, columns = (Axis(axis.cells[points], axis.weights[points]) for axis in (self.rows, self.columns))
        return rows, columns
