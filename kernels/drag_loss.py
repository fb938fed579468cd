"""Motion supervision's loss and its gradient to the feature map, in one operator; the step it looks ahead."""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of kernels have no Python types)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddengine.errors import InputError
from ddengine.kernels.dispatch import uses_triton
from ddengine.kernels.windows import BORDERS, Windows, check, widened


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
    """Σ_i moving_i · scale · mean|reference_i − patch_i|, the patches as `sample_patches` reads them around the centres.

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


def _eager(
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
    losses = torch.zeros_like(factor)
    for points, pieces in windows.pieces(feature):
        for channels in pieces:
            patches = windows.read(feature, points, channels)
            patches -= reference[points, channels].permute(0, 2, 3, 1)
            losses[points] += patches.abs().sum(dim=(1, 2, 3)) * factor[points]
            signs = patches.sign_().mul_(factor[points, None, None, None])
            windows.add_adjoint(gradient, signs, points, channels, factor != 0)
    return torch.where(factor != 0, losses, 0).view(moving.shape).sum(dim=1), gradient


class _Loss(torch.autograd.Function):
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
        return _eager(feature, centres, reference, moving, scale, radius, height, width, border)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (total,) = ctx.saved_tensors
        return ((total * gradient[:, None, None, None]).to(ctx.dtype), *[None] * (ctx.inputs - 1))
