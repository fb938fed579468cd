"""Motion supervision: the features a small step ahead of each handle shall become those of the handle."""

from __future__ import annotations

import torch
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.directdrag.precision import wide
from ddengine.errors import InputError
from ddengine.kernels.sample_patches import drag_loss, sample_patches, supervision_step


def supervision_loss(
    feature: Tensor,
    reference_feature: Tensor,
    handles_yx: Tensor,
    first_handles_yx: Tensor,
    targets_yx: Tensor,
    feature_hw: tuple[int, int],
    config: DirectDragConfig,
) -> Tensor:
    """The drag loss, a scalar with a gradient to `feature` [1,C,h,w]; points [n,2] on the feature grid.

        L = Σ_i s · mean| R_i − F⟨(p_i + d_i) ± r1⟩ |      d_i = (g_i − p_i)/‖g_i − p_i‖ · min(β, ‖g_i − p_i‖)

    R_i: the current features at p_i, detached (DirectDrag's formula), or the reference trajectory's at the first
    handle (the published code). s: the number of positions, or (2 r1)². A pair nearer than `reach` adds nothing.
    """
    feature, reference_feature = wide(feature), wide(reference_feature)
    step, moving = supervision_step(handles_yx, targets_yx, config.d, config.reach)
    if config.ms_reference == "current":
        source, centres = feature.detach(), handles_yx
    else:
        source, centres = reference_feature, first_handles_yx
    if config.ms_border == "refuse":
        _refuse_outside(torch.cat([centres, handles_yx + step])[moving.repeat(2)], config.r1, feature_hw)
    border = "zero" if config.ms_border == "zero" else "clamp"
    reference = sample_patches(source, centres, config.r1, feature_hw, border=border)
    patches = sample_patches(feature, handles_yx + step, config.r1, feature_hw, border=border)
    scale = (2 * config.r1 + 1) ** 2 if config.ms_scale == "positions" else (2 * config.r1) ** 2
    return drag_loss(reference, patches, moving, scale)


def _refuse_outside(centres_yx: Tensor, radius: int, size_hw: tuple[int, int]) -> None:
    first, last = centres_yx.floor() - radius, centres_yx.floor() + radius + 1
    limits = centres_yx.new_tensor(size_hw)
    outside = ((first < 0) | (last > limits)).any(dim=1)
    if outside.any():
        point = [round(value, 2) for value in centres_yx[outside][0].tolist()]
        raise InputError(
            f"the supervision patch of radius {radius} around (row, column) {point} leaves the feature grid of "
            f"{size_hw[0]} x {size_hw[1]}; keep drags away from the border or set ms_border to 'clamp'"
        )
