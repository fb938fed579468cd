"""Point tracking: the position in each handle's window whose feature is nearest to a template."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddengine.errors import InputError
from ddengine.kernels.compilation import Configuration
from ddengine.kernels.dispatch import interpreted, jit, launch, tl, triton, uses_triton
from ddengine.kernels.taps import GRID, MAP, TYPES, grid_arguments, map_arguments, taps, values
from ddengine.kernels.windows import BORDERS, Windows, check, room, widened

TRACK_BORDERS = ("slice", *BORDERS)


def track(
    feature: Tensor,
    template: Tensor,
    handles_yx: Tensor,
    radius: int,
    size_hw: tuple[int, int],
    *,
    border: str = "slice",
    valid: Tensor | None = None,
    kernels: str | None = None,
) -> Tensor:
    """The position [B,n,2] in each handle's window of ± radius cells whose feature is nearest to its template.

    feature: native map [B,C,h,w], any strides; template [B,n,C]; handles [B,n,2] on the grid size_hw; valid: bool
    [B,n], None for all true; for one picture also [n,C], [n,2] and [n]. Distance: L1 summed over channels; ties go to
    the first position in raster order (DirectDrag, point tracking). border: "slice" leaves positions outside the grid
    out, "clamp" moves them to the border, "zero" reads zeros there, so that a handle may leave the picture. A handle
    that is not valid, or whose window has no finite distance, comes back as it is. No gradient. Raises InputError for
    shapes that do not fit.
    """
    one = handles_yx.dim() == 2
    handles, template = (x[None] if one else x for x in (handles_yx, template))
    valid = valid[None] if one and valid is not None else valid
    check(feature, handles, size_hw, border, TRACK_BORDERS)
    expected = (*handles.shape[:2], feature.shape[1])
    if tuple(template.shape) != expected or (valid is not None and valid.shape != expected[:2]):
        raise InputError(
            f"a template {list(template.shape)} and valid {None if valid is None else list(valid.shape)} do not fit; "
            f"give {list(expected)} and None or {list(expected[:2])}"
        )
    with torch.no_grad():
        run = _operator if uses_triton(kernels, feature, template, handles) else _reference
        found = run(feature, template, handles, valid, radius, size_hw[0], size_hw[1], border)
    return found[0] if one else found


# The reference: plain PyTorch, on any device, in pieces no larger than the map.


def _reference(
    feature: Tensor,
    template: Tensor,
    handles: Tensor,
    valid: Tensor | None,
    radius: int,
    height: int,
    width: int,
    border: str,
) -> Tensor:
    windows = Windows.of(feature, handles, radius, (height, width), "zero" if border == "zero" else "clamp")
    points, template, side = handles.flatten(0, 1), template.flatten(0, 1), 2 * radius + 1
    # Filled on the device: a copy from the host could not be captured.
    limits = torch.cat([handles.new_full((1,), height - 1), handles.new_full((1,), width - 1)])
    order = torch.arange(side * side, device=handles.device)
    places = torch.stack([order // side, order % side], dim=1)
    found = []
    for some, pieces in windows.pieces(feature):
        distance = template.new_zeros((), dtype=widened(feature.dtype))
        for channels in pieces:
            patches = windows.read(feature, some, channels)
            patches -= template[some, None, None, channels]
            distance = distance + patches.abs_().sum(dim=-1)
        distance, start = distance.flatten(1), points[some, None]
        positions = start + places - radius
        if border == "slice":
            distance = distance.masked_fill(((positions < 0) | (positions > limits)).any(dim=-1), math.inf)
        distance = torch.where(distance.isfinite(), distance, math.inf)
        least = distance.amin(dim=1, keepdim=True)
        # argmin breaks ties by position on the CPU but promises nothing elsewhere; the first minimum is spelled out.
        best = torch.where(distance == least, order, side * side).amin(dim=1, keepdim=True)
        moved = start[:, 0] + torch.cat([best // side, best % side], dim=1) - radius
        if border == "clamp":
            moved = torch.minimum(moved.clamp_min(0), limits)
        found.append(torch.where(least.isfinite(), moved, start[:, 0]))
    result = torch.cat(found).unflatten(0, handles.shape[:2])
    return result if valid is None else torch.where(valid[..., None], result, handles)


# The Triton version: two launches. The first leaves distances of some channels each, the second adds and compares them.


@jit
def _distances(  # type: ignore[no-untyped-def]
    feature,
    template,
    handles,
    valid,
    distances,
    first,
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
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """distances [m,parts,P·P] of the points from `first` on, each part over CHANNELS channels; none if not valid."""
    side = 2 * radius + 1
    index = tl.program_id(0).to(tl.int64)
    point = index + first
    if tl.load(valid + point) != 0:
        place = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
        row, column = (place // side)[None, :], (place % side)[None, :]
        y, y1, y2, y3 = taps(row, tl.load(handles + 2 * point), radius, reach, height, h, ratio_y)
        x, x1, x2, x3 = taps(column, tl.load(handles + 2 * point + 1), radius, reach, width, w, ratio_x)
        sums = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        begin = tl.program_id(2) * CHANNELS
        for part in range(begin, tl.minimum(begin + CHANNELS, channels), BLOCK_C):
            channel = (part + tl.arange(0, BLOCK_C))[:, None]
            inside = (channel < channels) & (place < side * side)[None, :]
            maps = feature + point // points * stride_b + channel.to(tl.int64) * stride_c
            found = values(maps, inside, y, y1, y2, y3, x, x1, x2, x3, h, w, stride_y, stride_x)
            sought = tl.load(template + point * channels + channel, mask=channel < channels, other=0.0)
            sums += tl.abs(found - sought.to(tl.float32))
        at = (index * tl.num_programs(2) + tl.program_id(2)) * (side * side) + place
        tl.store(distances + at, tl.sum(sums, 0), mask=place < side * side)


@jit
def _choose(  # type: ignore[no-untyped-def]
    distances,
    handles,
    valid,
    found,
    first,
    radius,
    parts,
    height,
    width,
    BORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found [B·n,2]: the first least distance of each point from `first` on; one program a point."""
    side = 2 * radius + 1
    index = tl.program_id(0).to(tl.int64)
    point = index + first
    y, x = tl.load(handles + 2 * point), tl.load(handles + 2 * point + 1)
    if tl.load(valid + point) != 0:
        least = tl.full((), float("inf"), tl.float32)
        best = tl.full((), 0, tl.int32)
        for begin in range(0, side * side, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for part in range(parts):
                at = (index * parts + part) * (side * side) + place
                total += tl.load(distances + at, mask=place < side * side, other=float("inf"))
            total = tl.where(total < float("inf"), total, float("inf"))  # what is no number is as far
            if BORDER == "slice":
                row, column = y + place // side - radius, x + place % side - radius
                inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
                total = tl.where(inside, total, float("inf"))
            here = tl.min(total, 0)
            where = tl.min(tl.where(total == here, place, side * side), 0)
            best = tl.where(here < least, where, best)  # a later block must be nearer
            least = tl.minimum(here, least)
        if least < float("inf"):
            y = y + best // side - radius
            x = x + best % side - radius
            if BORDER == "clamp":
                y = tl.minimum(tl.maximum(y, 0.0), height - 1.0)
                x = tl.minimum(tl.maximum(x, 0.0), width - 1.0)
    tl.store(found + 2 * point, y)
    tl.store(found + 2 * point + 1, x)


DISTANCES = {
    dtype: Configuration(
        f"distances-{name}",
        _distances,
        dict.fromkeys(("feature", "template", "handles", "valid", "distances"), "*fp32")
        | {"feature": f"*{name}", "valid": "*i1", "first": "i32", "radius": "i32", "points": "i32"}
        | MAP
        | GRID,
        {"CHANNELS": 64, "BLOCK_C": 8, "BLOCK_P": 32},
    )
    for dtype, name in TYPES.items()
}
CHOOSE = {
    border: Configuration(
        f"choose-{border}",
        _choose,
        {"distances": "*fp32", "handles": "*fp32", "valid": "*i1", "found": "*fp32"}
        | dict.fromkeys(("first", "radius", "parts", "height", "width"), "i32"),
        {"BORDER": border, "BLOCK": 1024},
    )
    for border in TRACK_BORDERS
}
CONFIGURATIONS = (*DISTANCES.values(), *CHOOSE.values())


def _launch(
    feature: Tensor,
    template: Tensor,
    handles: Tensor,
    valid: Tensor | None,
    radius: int,
    height: int,
    width: int,
    border: str,
) -> Tensor:
    template, handles, found = template.contiguous(), handles.contiguous(), torch.empty_like(handles.contiguous())
    (batch, each), places = handles.shape[:2], (2 * radius + 1) ** 2
    valid = handles.new_ones((batch, each), dtype=torch.bool) if valid is None else valid.contiguous()
    measure, choose = DISTANCES[feature.dtype], CHOOSE[border]
    parts = triton.cdiv(feature.shape[1], measure.constants["CHANNELS"])
    sizes = *map_arguments(feature), *grid_arguments(feature, (height, width), border)
    many = max(1, room(feature) // (parts * places))
    for first in range(0, batch * each, many):
        points = min(many, batch * each - first)
        distances = handles.new_empty(points, parts, places)
        grid = points, triton.cdiv(places, measure.constants["BLOCK_P"]), parts
        launch(measure, grid, feature, template, handles, valid, distances, first, radius, each, *sizes)
        launch(choose, (points,), distances, handles, valid, found, first, radius, parts, height, width)
    return found


# The operator that graphs and compilers see as one; backward through it raises.

_operator = torch.library.custom_op(
    "ddengine::track",
    lambda *arguments: (_launch if interpreted() else _reference)(*arguments),
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor feature, Tensor template, Tensor handles_yx, Tensor? valid, SymInt radius, SymInt height, "
    "SymInt width, str border) -> Tensor",
)
_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _(feature: Tensor, template: Tensor, handles: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(handles, memory_format=torch.contiguous_format)
