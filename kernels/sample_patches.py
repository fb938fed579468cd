"""Square patches of the enlarged feature map, read straight from the native one (geometry: `windows.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddengine.kernels.compilation import Configuration
from ddengine.kernels.dispatch import interpreted, jit, launch, tl, triton, uses_triton
from ddengine.kernels.taps import (
    GRID,
    MAP,
    TYPES,
    fold,
    grid_arguments,
    map_arguments,
    taps,
    values,
    weight_on,
    window_chunks,
    window_start,
)
from ddengine.kernels.windows import BORDERS, Windows, check, widened, window_cells


def sample_patches(
    feature: Tensor,
    centres_yx: Tensor,
    radius: int,
    size_hw: tuple[int, int],
    *,
    border: str = "clamp",
    kernels: str | None = None,
) -> Tensor:
    """Patches [B,n,C,2r+1,2r+1] around centres [B,n,2] (row, column, fractions allowed) of the enlarged feature map.

    feature: native map [B,C,h,w], any strides; size_hw: the grid the centres live on, at least the map's size. For
    centres [n,2] of one picture: [n,C,2r+1,2r+1]. Differentiable in `feature`. Equals enlarging to size_hw bilinearly
    and sampling with one bilinear weight quadruple a patch (DirectDrag, motion supervision); computed and returned in
    float32 for half precision. border: "clamp" or "zero", as in `windows.axis_of`; kernels: as in
    `dispatch.uses_triton`. Raises InputError for shapes that do not fit.
    """
    centres = centres_yx if centres_yx.dim() == 3 else centres_yx[None]
    check(feature, centres, size_hw, border, BORDERS)
    fast = uses_triton(kernels, feature, centres)
    patches = _Sample.apply(feature, centres, radius, size_hw[0], size_hw[1], border, fast)
    return patches if centres_yx.dim() == 3 else patches[0]


class _Sample(torch.autograd.Function):
    """Reading patches and its transpose `_Spread`, each the other's derivative.

    Autograd's own would scatter what the gather read, in racing additions. They stand before the operators, too, for
    function transforms refuse an operator's registered derivative.
    """

    @staticmethod
    def forward(
        feature: Tensor, centres: Tensor, radius: int, height: int, width: int, border: str, fast: bool
    ) -> Tensor:
        return (_operator if fast else _reference)(feature, centres, radius, height, width, border)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        feature, centres, *ctx.rest = inputs
        ctx.save_for_backward(centres)
        ctx.dtype, ctx.hw = feature.dtype, feature.shape[2:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        radius, *rest = (*ctx.rest, True)[:5]  # an operator's derivative has no `fast`
        total = _Spread.apply(gradient, *ctx.saved_tensors, radius, *ctx.hw, *rest)
        return (total.to(ctx.dtype), *[None] * (1 + len(ctx.rest)))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        gradient: Tensor, centres: Tensor, radius: int, h: int, w: int, height: int, width: int, border: str, fast: bool
    ) -> Tensor:
        run = _backward_operator if fast else _backward_reference
        return run(gradient, centres, radius, h, w, height, width, border)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.rest = inputs[2:]

    @staticmethod
    def backward(ctx: Any, total: Tensor) -> tuple[Tensor | None, ...]:
        radius, _, _, *rest = (*ctx.rest, True)[:7]
        return (_Sample.apply(total, *ctx.saved_tensors, radius, *rest), *[None] * (1 + len(ctx.rest)))


# The reference: plain PyTorch, on any device, in pieces no larger than the map.


def _reference(feature: Tensor, centres: Tensor, radius: int, height: int, width: int, border: str) -> Tensor:
    windows, side = Windows.of(feature, centres, radius, (height, width), border), 2 * radius + 1
    points = centres.shape[0] * centres.shape[1]
    patches = feature.new_empty((points, feature.shape[1], side, side), dtype=widened(feature.dtype))
    for some, pieces in windows.pieces(feature):
        for channels in pieces:
            patches[some, channels] = windows.read(feature, some, channels).permute(0, 3, 1, 2)
    return patches.unflatten(0, centres.shape[:2])


def _backward_reference(
    gradient: Tensor, centres: Tensor, radius: int, h: int, w: int, height: int, width: int, border: str
) -> Tensor:
    total = gradient.new_zeros(gradient.shape[0], gradient.shape[2], h, w)
    windows, gradient = Windows.of(total, centres, radius, (height, width), border), gradient.flatten(0, 1)
    for some, pieces in windows.pieces(total):
        for channels in pieces:
            windows.add_adjoint(total, gradient[some, channels].permute(0, 2, 3, 1), some, channels, None)
    return total


# The Triton version: one launch forwards, two backwards.


@jit
def _sample(  # type: ignore[no-untyped-def]
    feature,
    centres,
    patches,
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
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """patches [B·n,C,P·P]: one program reads some positions and channels of one point."""
    side = 2 * radius + 1
    point = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    place = (tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    inside = (channel < channels) & (place < side * side)
    y, y1, y2, y3 = taps(place // side, tl.load(centres + 2 * point), radius, reach, height, h, ratio_y)
    x, x1, x2, x3 = taps(place % side, tl.load(centres + 2 * point + 1), radius, reach, width, w, ratio_x)
    maps = feature + point // points * stride_b + channel.to(tl.int64) * stride_c
    found = values(maps, inside, y, y1, y2, y3, x, x1, x2, x3, h, w, stride_y, stride_x)
    tl.store(patches + (point * channels + channel) * (side * side) + place, found, mask=inside)


@jit
def _spread(  # type: ignore[no-untyped-def]
    gradient,
    centres,
    windows,
    first,
    radius,
    channels,
    h,
    w,
    height,
    width,
    ratio_y,
    ratio_x,
    reach,
    rows,
    columns,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """windows [m,C,rows·columns] = Rᵀ G C of the points from `first` on, for gradients G [B·n,C,P,P]."""
    side = 2 * radius + 1
    index = tl.program_id(0).to(tl.int64)
    point = index + first
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    centre_y, centre_x = tl.load(centres + 2 * point), tl.load(centres + 2 * point + 1)
    cell_y = window_start(centre_y, radius, height, h, ratio_y) + cell // columns
    cell_x = window_start(centre_x, radius, width, w, ratio_x) + cell % columns
    sums = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for begin in range(0, side, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        inside = (channel < channels)[:, None] & (row < side)[None, :]
        at = gradient + ((point * channels + channel)[:, None] * side + row[None, :]) * side
        along = tl.zeros((BLOCK_C, BLOCK_R, BLOCK_K), tl.float32)
        for column in range(side):
            x, x1, x2, x3 = taps(column, centre_x, radius, reach, width, w, ratio_x)
            given = tl.load(at + column, mask=inside, other=0.0)
            along += given[:, :, None] * weight_on(cell_x, x, x1, x2, x3)[None, None, :]
        y, y1, y2, y3 = taps(row[:, None], centre_y, radius, reach, height, h, ratio_y)
        sums += tl.sum(along * weight_on(cell_y[None, :], y, y1, y2, y3)[None, :, :], 1)
    at = (index * channels + channel)[:, None] * (rows * columns) + cell[None, :]
    tl.store(windows + at, sums, mask=(channel < channels)[:, None] & (cell < rows * columns)[None, :])


SAMPLE = {
    dtype: Configuration(
        f"sample-{name}",
        _sample,
        {"feature": f"*{name}", "centres": "*fp32", "patches": "*fp32", "radius": "i32", "points": "i32"} | MAP | GRID,
        {"BLOCK_C": 16, "BLOCK_P": 32},
    )
    for dtype, name in TYPES.items()
}
SPREAD = Configuration(
    "spread",
    _spread,
    {"gradient": "*fp32", "centres": "*fp32", "windows": "*fp32"}
    | dict.fromkeys(("first", "radius", "channels", "h", "w", "rows", "columns"), "i32")
    | GRID,
    {"BLOCK_C": 8, "BLOCK_R": 16, "BLOCK_K": 32},
)
CONFIGURATIONS = (*SAMPLE.values(), SPREAD)


def _launch(feature: Tensor, centres: Tensor, radius: int, height: int, width: int, border: str) -> Tensor:
    (batch, each), channels, side = centres.shape[:2], feature.shape[1], 2 * radius + 1
    patches = feature.new_empty((batch, each, channels, side, side), dtype=torch.float32)
    how = SAMPLE[feature.dtype]
    blocks = triton.cdiv(channels, how.constants["BLOCK_C"]), triton.cdiv(side * side, how.constants["BLOCK_P"])
    sizes = radius, each, *map_arguments(feature), *grid_arguments(feature, (height, width), border)
    launch(how, (batch * each, *blocks), feature, centres.contiguous(), patches, *sizes)
    return patches


def _backward_launch(
    gradient: Tensor, centres: Tensor, radius: int, h: int, w: int, height: int, width: int, border: str
) -> Tensor:
    gradient, centres, (batch, each, channels) = gradient.contiguous(), centres.contiguous(), gradient.shape[:3]
    total, size_hw = gradient.new_empty(batch, channels, h, w), (height, width)
    rows, columns = window_cells(radius, height, h), window_cells(radius, width, w)
    how, grid = SPREAD, grid_arguments(total, size_hw, border)
    blocks = triton.cdiv(channels, how.constants["BLOCK_C"]), triton.cdiv(rows * columns, how.constants["BLOCK_K"])
    for first, last in window_chunks(total, batch * each, rows * columns):
        windows = total.new_empty(last - first, channels, rows * columns)
        sizes = first, radius, channels, h, w, *grid, rows, columns
        launch(how, (last - first, *blocks), gradient, centres, windows, *sizes)
        fold(windows, total, centres, first, last, radius, size_hw)
    return total


# The operators that graphs and compilers see as one.

_SIZES = "SymInt height, SymInt width, str border"
_operator = torch.library.custom_op(
    "ddengine::sample_patches",
    lambda *arguments: (_launch if interpreted() else _reference)(*arguments),
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor feature, Tensor centres_yx, SymInt radius, {_SIZES}) -> Tensor",
)
_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _(feature: Tensor, centres: Tensor, radius: int, *_: Any) -> Tensor:
    shape = *centres.shape[:2], feature.shape[1], 2 * radius + 1, 2 * radius + 1
    return feature.new_empty(shape, dtype=widened(feature.dtype))


_operator.register_autograd(_Sample.backward, setup_context=_Sample.setup_context)
_backward_operator = torch.library.custom_op(
    "ddengine::sample_patches_backward",
    lambda *arguments: (_backward_launch if interpreted() else _backward_reference)(*arguments),
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor gradient, Tensor centres_yx, SymInt radius, SymInt h, SymInt w, {_SIZES}) -> Tensor",
)
_backward_operator.register_kernel("cuda")(_backward_launch)


@_backward_operator.register_fake
def _(gradient: Tensor, centres: Tensor, radius: int, h: int, w: int, *_: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[0], gradient.shape[2], h, w)


_backward_operator.register_autograd(_Spread.backward, setup_context=_Spread.setup_context)
