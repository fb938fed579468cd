"""Windows (`windows.py`) in Triton: what the kernels on patches share.

A position of a patch reads three neighbouring native cells along each axis, its taps. Backwards no two programs add to
one cell: each point writes a window [C,K·K] of its own, and `fold` adds the windows up in the order of the points.
Offsets into maps and patches are 64 bits wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddengine.kernels.compilation import Configuration
from ddengine.kernels.dispatch import jit, launch, tl, triton
from ddengine.kernels.windows import room, window_cells


@jit
def taps(position, centre, radius, reach, size, native, ratio):  # type: ignore[no-untyped-def]
    """The first of three native cells that a patch's position (whole, from 0) reads, and their weights.

    reach: how far outside the axis a cell counts, ∞ for border "clamp" and 0 for "zero".
    """
    low = tl.floor(centre)
    fraction = centre - low
    one = low - radius + position
    two = one + 1.0
    source_one = tl.minimum(tl.maximum(one, 0.0), size - 1.0)
    source_two = tl.minimum(tl.maximum(two, 0.0), size - 1.0)
    weight_one = tl.where(tl.abs(source_one - one) > reach, 0.0, 1.0 - fraction)
    weight_two = tl.where(tl.abs(source_two - two) > reach, 0.0, fraction)
    source_one = tl.minimum(tl.maximum((source_one + 0.5) * ratio - 0.5, 0.0), native - 1.0)
    source_two = tl.minimum(tl.maximum((source_two + 0.5) * ratio - 0.5, 0.0), native - 1.0)
    start = tl.floor(source_one)
    source_one -= start
    source_two -= start
    # Neighbours on the enlarged axis are at most one native cell apart, so the first never reaches the third cell.
    first = weight_one * (1.0 - source_one) + weight_two * tl.maximum(1.0 - source_two, 0.0)
    second = weight_one * source_one + weight_two * (1.0 - tl.abs(source_two - 1.0))
    third = weight_two * tl.maximum(source_two - 1.0, 0.0)
    # Clamped again as a whole number: what is no number reads within the map, too.
    return tl.minimum(tl.maximum(start.to(tl.int32), 0), native - 1), first, second, third


@jit
def _line(row, inside, x, w, stride_x, first, second, third):  # type: ignore[no-untyped-def]
    at = row + x.to(tl.int64) * stride_x
    next_at = at + stride_x  # step by step: twice a stride may not fit in 32 bits
    one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(next_at, mask=inside & (x + 1 < w), other=0.0).to(tl.float32)
    three = tl.load(next_at + stride_x, mask=inside & (x + 2 < w), other=0.0).to(tl.float32)
    return first * one + second * two + third * three


@jit
def values(maps, inside, y, y1, y2, y3, x, x1, x2, x3, h, w, stride_y, stride_x):  # type: ignore[no-untyped-def]
    """What a patch reads where its taps are y and x: `maps` points to one map a channel; all broadcast together."""
    row = maps + y.to(tl.int64) * stride_y
    next_row = row + stride_y
    total = y1 * _line(row, inside, x, w, stride_x, x1, x2, x3)
    total += y2 * _line(next_row, inside & (y + 1 < h), x, w, stride_x, x1, x2, x3)
    return total + y3 * _line(next_row + stride_y, inside & (y + 2 < h), x, w, stride_x, x1, x2, x3)


@jit
def weight_on(cell, start, first, second, third):  # type: ignore[no-untyped-def]
    """The weight that taps from `start` on give to a cell."""
    return tl.where(cell == start, first, tl.where(cell == start + 1, second, tl.where(cell == start + 2, third, 0.0)))


@jit
def window_start(centre, radius, size, native, ratio):  # type: ignore[no-untyped-def]
    """The first native cell of a window along one axis; its last ones may lie beyond the map."""
    start, _, _, _ = taps(0, centre, radius, 0.0, size, native, ratio)
    return start


@jit
def _fold(  # type: ignore[no-untyped-def]
    windows,
    total,
    centres,
    moving,
    partials,
    losses,
    first,
    last,
    radius,
    points,
    channels,
    h,
    w,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    height,
    width,
    ratio_y,
    ratio_x,
    reach,
    rows,
    columns,
    blocks,
    LOSS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """total [B,C,h,w] = Σ windows of the points first ... last − 1, in order, on top of those before `first`.

    LOSS: also losses [B] = Σ partials [last−first,blocks], and what does not move has no window.
    """
    picture = tl.program_id(2)
    place = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y, x = place // w, place % w
    inside = (channel < channels)[:, None] & (place < h * w)[None, :]
    here = total + picture.to(tl.int64) * stride_b + channel.to(tl.int64)[:, None] * stride_c
    here += (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[None, :]
    sums = tl.load(here, mask=inside & (first > 0), other=0.0)
    top = tl.program_id(0) * BLOCK_S // w
    bottom = (tl.program_id(0) * BLOCK_S + BLOCK_S - 1) // w
    begin = tl.maximum(picture * points, first)
    end = tl.minimum(picture * points + points, last)
    for point in range(begin, end):
        start_y = window_start(tl.load(centres + 2 * point), radius, height, h, ratio_y)
        meets = (start_y <= bottom) & (start_y + rows > top)
        if LOSS:
            meets = meets & (tl.load(moving + point) != 0)
        if meets:
            start_x = window_start(tl.load(centres + 2 * point + 1), radius, width, w, ratio_x)
            cell_y, cell_x = y - start_y, x - start_x
            within = (cell_y >= 0) & (cell_y < rows) & (cell_x >= 0) & (cell_x < columns)
            cell = (point - first).to(tl.int64) * channels + channel[:, None]
            cell = cell * (rows * columns) + (cell_y * columns + cell_x)[None, :]
            sums += tl.load(windows + cell, mask=inside & within[None, :], other=0.0)
    tl.store(here, sums, mask=inside)
    if LOSS:  # noqa: SIM102
        if tl.program_id(0) + tl.program_id(1) == 0:
            at = tl.arange(0, BLOCK_S)
            loss = tl.zeros((BLOCK_S,), tl.float32)
            for block in range((begin - first) * blocks, (end - first) * blocks, BLOCK_S):
                loss += tl.load(partials + block + at, mask=block + at < (end - first) * blocks, other=0.0)
            before = tl.load(losses + picture, mask=first > 0, other=0.0)
            tl.store(losses + picture, before + tl.sum(loss, 0))


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MAP = dict.fromkeys(("channels", "h", "w", "stride_b", "stride_c", "stride_y", "stride_x"), "i32")
GRID = {"height": "i32", "width": "i32", "ratio_y": "fp32", "ratio_x": "fp32", "reach": "fp32"}


def map_arguments(maps: Tensor) -> tuple[int, ...]:
    """The arguments `MAP` of maps [B,C,h,w]."""
    return *maps.shape[1:], *maps.stride()


def grid_arguments(maps: Tensor, size_hw: tuple[int, int], border: str) -> tuple[float, ...]:
    """The arguments `GRID`."""
    reach = 0.0 if border == "zero" else math.inf
    return *size_hw, maps.shape[2] / size_hw[0], maps.shape[3] / size_hw[1], reach


def window_chunks(maps: Tensor, points: int, cells: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the points whose windows, `cells` a channel, together fit in the `room`."""
    many = max(1, room(maps) // (maps.shape[1] * cells))
    return ((first, min(first + many, points)) for first in range(0, points, many))


def _folding(loss: bool) -> Configuration:
    pointers = dict.fromkeys(("windows", "total", "centres", "moving", "partials", "losses"), "*fp32")
    if loss:
        pointers["moving"] = "*i1"
    counts = dict.fromkeys(("first", "last", "radius", "points"), "i32")
    return Configuration(
        "fold-loss" if loss else "fold",
        _fold,
        pointers | counts | MAP | GRID | {"rows": "i32", "columns": "i32", "blocks": "i32"},
        {"LOSS": loss, "BLOCK_C": 16, "BLOCK_S": 64},
    )


FOLD, FOLD_LOSS = CONFIGURATIONS = _folding(False), _folding(True)


def fold(
    windows: Tensor,
    total: Tensor,
    centres: Tensor,
    first: int,
    last: int,
    radius: int,
    size_hw: tuple[int, int],
    loss: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Add the windows of some points, in order, to maps [B,C,h,w], which the first points find uninitialised.

    loss: moving [B,n], partial sums [m,blocks] and losses [B], if losses are to be added up as well.
    """
    how = FOLD_LOSS if loss else FOLD
    moving, partials, losses = loss or (centres, centres, centres)
    cells = (window_cells(radius, size, native) for size, native in zip(size_hw, total.shape[2:], strict=True))
    grid = (
        triton.cdiv(total[0, 0].numel(), how.constants["BLOCK_S"]),
        triton.cdiv(total.shape[1], how.constants["BLOCK_C"]),
        total.shape[0],
    )
    pointers = windows, total, centres, moving, partials, losses
    sizes = first, last, radius, centres.shape[1], *map_arguments(total), *grid_arguments(total, size_hw, "clamp")
    launch(how, grid, *pointers, *sizes, *cells, partials.shape[-1])
