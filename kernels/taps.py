"""Windows (`windows.py`) in Triton: what the kernels on patches share.

A position of a patch reads three neighbouring native cells along each axis, its taps. Backwards no two programs add to
one cell: each point writes a window [C,K·K] of its own, and `fold` adds the windows up in the order of the points.
Offsets into maps and patches are 64 bits wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddengine.kernels.compilation import Configuration
from ddengine.kernels.dispatch import jit, launch, tl, triton
from ddengine.kernels.windows import window_cells


@jit
def taps(position, centre, size, native, ratio, RADIUS: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of three native cells that a patch's position (whole, from 0) reads, and their weights."""
    low = tl.floor(centre)
    fraction = centre - low
    one = low - RADIUS + position
    two = one + 1.0
    source_one = tl.minimum(tl.maximum(one, 0.0), size - 1.0)
    source_two = tl.minimum(tl.maximum(two, 0.0), size - 1.0)
    weight_one = 1.0 - fraction
    weight_two = fraction
    if ZERO:
        weight_one = tl.where(source_one == one, weight_one, 0.0)
        weight_two = tl.where(source_two == two, weight_two, 0.0)
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
    here = row + x.to(tl.int64) * stride_x
    one = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(here + stride_x, mask=inside & (x + 1 < w), other=0.0).to(tl.float32)
    three = tl.load(here + 2 * stride_x, mask=inside & (x + 2 < w), other=0.0).to(tl.float32)
    return first * one + second * two + third * three


@jit
def values(maps, inside, y, y1, y2, y3, x, x1, x2, x3, h, w, stride_y, stride_x):  # type: ignore[no-untyped-def]
    """What a patch reads where its taps are y and x: `maps` points to one map a channel; all broadcast together."""
    row = maps + y.to(tl.int64) * stride_y
    total = y1 * _line(row, inside, x, w, stride_x, x1, x2, x3)
    total += y2 * _line(row + stride_y, inside & (y + 1 < h), x, w, stride_x, x1, x2, x3)
    return total + y3 * _line(row + 2 * stride_y, inside & (y + 2 < h), x, w, stride_x, x1, x2, x3)


@jit
def weight_on(cell, start, first, second, third):  # type: ignore[no-untyped-def]
    """The weight that taps from `start` on give to a cell."""
    return tl.where(cell == start, first, tl.where(cell == start + 1, second, tl.where(cell == start + 2, third, 0.0)))


@jit
def window_start(centre, size, native, ratio, count, RADIUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of the `count` native cells of a window along one axis."""
    start, _, _, _ = taps(0, centre, size, native, ratio, RADIUS, False)
    return tl.minimum(start, native - count)


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
    rows,
    columns,
    blocks,
    RADIUS: tl.constexpr,
    LOSS: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """total [B,C,h,w] = Σ windows of the points first ... last − 1, in order; MORE adds to what is there.

    LOSS: also losses [B] = Σ partials [last−first,blocks], and what does not move has no window.
    """
    picture = tl.program_id(2)
    place = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y, x = place // w, place % w
    inside = (channel < channels)[:, None] & (place < h * w)[None, :]
    here = total + picture.to(tl.int64) * stride_b + channel.to(tl.int64)[:, None] * stride_c
    here += (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[None, :]
    sums = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    if MORE:
        sums += tl.load(here, mask=inside, other=0.0)
    top = tl.program_id(0) * BLOCK_S // w
    bottom = (tl.program_id(0) * BLOCK_S + BLOCK_S - 1) // w
    begin = tl.maximum(picture * points, first)
    end = tl.minimum(picture * points + points, last)
    for point in range(begin, end):
        start_y = window_start(tl.load(centres + 2 * point), height, h, ratio_y, rows, RADIUS)
        meets = (start_y <= bottom) & (start_y + rows > top)
        if LOSS:
            meets = meets & (tl.load(moving + point) != 0)
        if meets:
            start_x = window_start(tl.load(centres + 2 * point + 1), width, w, ratio_x, columns, RADIUS)
            cell_y, cell_x = y - start_y, x - start_x
            within = (cell_y >= 0) & (cell_y < rows) & (cell_x >= 0) & (cell_x < columns)
            cell = (point - first).to(tl.int64) * channels + channel[:, None]
            cell = cell * (rows * columns) + (cell_y * columns + cell_x)[None, :]
            sums += tl.load(windows + cell, mask=inside & within[None, :], other=0.0)
    tl.store(here, sums, mask=inside)
    if LOSS:
        if tl.program_id(0) + tl.program_id(1) == 0:
            at = tl.arange(0, BLOCK_S)
            loss = tl.zeros((BLOCK_S,), tl.float32)
            for block in range((begin - first) * blocks, (end - first) * blocks, BLOCK_S):
                loss += tl.load(partials + block + at, mask=block + at < (end - first) * blocks, other=0.0)
            value = tl.sum(loss, 0)
            if MORE:
                value += tl.load(losses + picture)
            tl.store(losses + picture, value)


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MAP = dict.fromkeys(("channels", "h", "w", "stride_b", "stride_c", "stride_y", "stride_x"), "i32")
GRID = {"height": "i32", "width": "i32", "ratio_y": "fp32", "ratio_x": "fp32"}


def map_arguments(maps: Tensor) -> tuple[int, ...]:
    """The arguments `MAP` of maps [B,C,h,w]."""
    return *maps.shape[1:], *maps.stride()


def grid_arguments(maps: Tensor, size_hw: tuple[int, int]) -> tuple[float, ...]:
    """The arguments `GRID`."""
    return *size_hw, maps.shape[2] / size_hw[0], maps.shape[3] / size_hw[1]


def folding(radius: int, loss: bool, more: bool) -> Configuration:
    """The configuration of `_fold`."""
    pointers = dict.fromkeys(("windows", "total", "centres", "moving", "partials", "losses"), "*fp32") | {"moving": "*i1"}
    counts = dict.fromkeys(("rows", "columns", "blocks"), "i32")
    return Configuration(
        f"fold-r{radius}{'-loss' if loss else ''}{'-more' if more else ''}",
        _fold,
        pointers | {"first": "i32", "last": "i32", "points": "i32"} | MAP | GRID | counts,
        {"RADIUS": radius, "LOSS": loss, "MORE": more, "BLOCK_C": 16, "BLOCK_S": 128},
    )


def window_chunks(maps: Tensor, points: int, cells: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the points whose windows, `cells` a channel, are together no larger than the maps."""
    many = max(1, maps.numel() // (maps.shape[1] * cells))
    return ((first, min(first + many, points)) for first in range(0, points, many))


CONFIGURATIONS = tuple(folding(4, loss, more) for loss in (False, True) for more in (False, True))
