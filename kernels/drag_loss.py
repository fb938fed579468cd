"""Motion supervision's loss and its gradient to the feature map, in one operator; the step it looks ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddengine.errors import InputError
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


def supervision_step(handles_yx: Tensor, targets_yx: Tensor, longest: float, reach: float) -> tuple[Tensor, Tensor]:
    """The step [...,n,2] each handle is asked to take, and whether [...,n] it still moves.

    d_i = (g_i − p_i)/‖g_i − p_i‖ · min(β, ‖g_i − p_i‖); a pair nearer than `reach` is at rest (motion supervision).
    """
    way = targets_yx - handles_yx
    distance = torch.linalg.vector_norm(way, dim=-1, keepdim=True)
    return way / distance.clamp_min(1e-12) * distance.clamp_max(longest), distance[..., 0] >= reach


def drag_loss(
    feature: Tensor,
    centres_yx: Tensor,
    reference: Tensor,
    moving: Tensor,
    scale: float,
    radius: int,
    size_hw: tuple[int, int],
    *,
    border: str = "clamp",
    kernels: str | None = None,
) -> Tensor:
    """Σ_i moving_i · scale · mean|reference_i − patch_i|, patches read around the centres as by `sample_patches`.

    feature: native map [B,C,h,w], any strides; centres [B,n,2]; reference [B,n,C,2r+1,2r+1]; moving [B,n], bool or
    weights, 0 for a pair that is at rest or mere padding, whatever its centre; the loss [B] is float32 (float64 for a
    float64 map). For one picture also [n,2], [n,C,P,P], [n] and a scalar. Only `feature` has a gradient; it is computed
    along with the value, in float32, and kept until the backward. border, kernels: as in `sample_patches`.
    """
    one = centres_yx.dim() == 2
    centres, reference, moving = (x[None] if one else x for x in (centres_yx, reference, moving))
    check(feature, centres, size_hw, border, BORDERS)
    expected = (*centres.shape[:2], feature.shape[1], 2 * radius + 1, 2 * radius + 1)
    if tuple(reference.shape) != expected or moving.shape != expected[:2]:
        raise InputError(
            f"reference patches {list(reference.shape)} and moving {list(moving.shape)} do not fit; give "
            f"{list(expected)} and {list(expected[:2])}"
        )
    fast = uses_triton(kernels, feature, centres, reference)
    loss, _ = _Loss.apply(feature, centres, reference, moving, scale, radius, size_hw[0], size_hw[1], border, fast)
    return loss[0] if one else loss


class _Loss(torch.autograd.Function):
    """The loss, and the gradient that came with it times whatever arrives.

    It stands before the operator, too, for function transforms refuse an operator's registered derivative.
    """

    @staticmethod
    def forward(
        feature: Tensor,
        centres: Tensor,
        reference: Tensor,
        moving: Tensor,
        scale: float,
        radius: int,
        height: int,
        width: int,
        border: str,
        fast: bool,
    ) -> tuple[Tensor, Tensor]:
        run = _operator if fast else _reference
        return run(feature, centres, reference, moving, scale, radius, height, width, border)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or a map of zeros would be made for it
        ctx.save_for_backward(output[1])
        ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (total,) = ctx.saved_tensors
        return ((total * gradient[:, None, None, None]).to(ctx.dtype), *[None] * (ctx.inputs - 1))


# The reference: plain PyTorch, on any device, in pieces no larger than the map.


def _reference(
    feature: Tensor,
    centres: Tensor,
    reference: Tensor,
    moving: Tensor,
    scale: float,
    radius: int,
    height: int,
    width: int,
    border: str,
) -> tuple[Tensor, Tensor]:
    windows, dtype = Windows.of(feature, centres, radius, (height, width), border), widened(feature.dtype)
    gradient, reference = torch.zeros_like(feature, dtype=dtype), reference.flatten(0, 1)
    factor = (moving.flatten() * (scale / reference[0].numel())).to(dtype)
    live, losses = factor != 0, torch.zeros_like(factor)
    for some, pieces in windows.pieces(feature):
        for channels in pieces:
            patches = windows.read(feature, some, channels)
            patches -= reference[some, channels].permute(0, 2, 3, 1)
            losses[some] += patches.abs().sum(dim=(1, 2, 3)) * factor[some]
            patches.sign_().mul_(factor[some, None, None, None])
            windows.add_adjoint(gradient, patches, some, channels, live)
    return torch.where(live, losses, 0).view(moving.shape).sum(dim=1), gradient


# The Triton version: two launches. The first reads, compares and gathers what each point adds, the second adds it up.


@jit
def _compare(  # type: ignore[no-untyped-def]
    feature,
    centres,
    reference,
    moving,
    windows,
    partials,
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
    rows,
    columns,
    factor,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """windows [m,C,rows·columns] = moving · factor · Rᵀ sign(patch − reference) C, from the point `first` on.

    partials [m,blocks of channels] = moving · factor · Σ |patch − reference|. What does not move costs and writes no
    window. The sums over a patch's rows wait in registers until its columns are done.
    """
    side = 2 * radius + 1
    index = tl.program_id(0).to(tl.int64)
    point = index + first
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.load(moving + point).to(tl.float32) * factor
    loss = partials + index * tl.num_programs(1) + tl.program_id(1)
    if weight != 0.0:
        cell = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
        centre_y, centre_x = tl.load(centres + 2 * point), tl.load(centres + 2 * point + 1)
        cell_y = window_start(centre_y, radius, height, h, ratio_y) + cell // columns
        cell_x = window_start(centre_x, radius, width, w, ratio_x) + cell % columns
        maps = feature + point // points * stride_b + channel.to(tl.int64)[:, None] * stride_c
        sums = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        distance = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
        for begin in range(0, side, BLOCK_R):
            row = begin + tl.arange(0, BLOCK_R)
            inside = (channel < channels)[:, None] & (row < side)[None, :]
            at = reference + ((point * channels + channel)[:, None] * side + row[None, :]) * side
            along = tl.zeros((BLOCK_C, BLOCK_R, BLOCK_K), tl.float32)
            y, y1, y2, y3 = taps(row[None, :], centre_y, radius, reach, height, h, ratio_y)
            for column in range(side):
                x, x1, x2, x3 = taps(column, centre_x, radius, reach, width, w, ratio_x)
                found = values(maps, inside, y, y1, y2, y3, x, x1, x2, x3, h, w, stride_y, stride_x)
                away = found - tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
                distance += tl.abs(away)
                sign = tl.where(away > 0, 1.0, tl.where(away < 0, -1.0, 0.0))
                along += sign[:, :, None] * weight_on(cell_x, x, x1, x2, x3)[None, None, :]
            y, y1, y2, y3 = taps(row[:, None], centre_y, radius, reach, height, h, ratio_y)
            sums += tl.sum(along * weight_on(cell_y[None, :], y, y1, y2, y3)[None, :, :], 1)
        at = windows + (index * channels + channel)[:, None] * (rows * columns) + cell[None, :]
        tl.store(at, sums * weight, mask=(channel < channels)[:, None] & (cell < rows * columns)[None, :])
        if tl.program_id(2) == 0:
            tl.store(loss, tl.sum(tl.sum(distance, 1), 0) * weight)
    elif tl.program_id(2) == 0:
        tl.store(loss, 0.0)


COMPARE = {
    dtype: Configuration(
        f"compare-{name}",
        _compare,
        dict.fromkeys(("feature", "centres", "reference", "moving", "windows", "partials"), "*fp32")
        | {"feature": f"*{name}", "moving": "*i1", "first": "i32", "radius": "i32", "points": "i32"}
        | MAP
        | GRID
        | {"rows": "i32", "columns": "i32", "factor": "fp32"},
        {"BLOCK_C": 16, "BLOCK_R": 16, "BLOCK_K": 32},
        num_warps=8,  # with fewer channels, or fewer warps, one of the compilers spills
    )
    for dtype, name in TYPES.items()
}
CONFIGURATIONS = tuple(COMPARE.values())


def _launch(
    feature: Tensor,
    centres: Tensor,
    reference: Tensor,
    moving: Tensor,
    scale: float,
    radius: int,
    height: int,
    width: int,
    border: str,
) -> tuple[Tensor, Tensor]:
    centres, reference, moving = centres.contiguous(), reference.contiguous(), moving.contiguous()
    (batch, each), channels, size_hw = centres.shape[:2], feature.shape[1], (height, width)
    gradient = torch.empty_like(feature, dtype=torch.float32)
    losses = gradient.new_empty(batch)
    rows, columns = window_cells(radius, height, feature.shape[2]), window_cells(radius, width, feature.shape[3])
    how = COMPARE[feature.dtype]
    blocks = triton.cdiv(channels, how.constants["BLOCK_C"]), triton.cdiv(rows * columns, how.constants["BLOCK_K"])
    factor = scale / reference[0, 0].numel()
    rest = *map_arguments(feature), *grid_arguments(feature, size_hw, border), rows, columns, factor
    for first, last in window_chunks(feature, batch * each, rows * columns):
        windows = gradient.new_empty(last - first, channels, rows * columns)
        partials = gradient.new_empty(last - first, blocks[0])
        pointers = feature, centres, reference, moving, windows, partials
        launch(how, (last - first, *blocks), *pointers, first, radius, each, *rest)
        fold(windows, gradient, centres, first, last, radius, size_hw, (moving, partials, losses))
    return losses, gradient


# The operator that graphs and compilers see as one.

_operator = torch.library.custom_op(
    "ddengine::drag_loss",
    lambda *arguments: (_launch if interpreted() else _reference)(*arguments),
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor feature, Tensor centres_yx, Tensor reference, Tensor moving, float scale, SymInt radius, "
    "SymInt height, SymInt width, str border) -> (Tensor loss, Tensor gradient)",
)
_operator.register_kernel("cuda")(_launch)


@_operator.register_fake
def _(feature: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = widened(feature.dtype)
    return feature.new_empty(feature.shape[:1], dtype=dtype), torch.empty_like(feature, dtype=dtype)


_operator.register_autograd(_Loss.backward, setup_context=_Loss.setup_context)
