"""Motion supervision: the features a small step ahead of each handle shall become those of the handle."""

from __future__ import annotations

import torch
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.errors import InputError
from ddengine.kernels.drag_loss import drag_loss, supervision_step
from ddengine.kernels.sample_patches import sample_patches


def reference_patches(
    reference_feature: Tensor, first_handles_yx: Tensor, feature_hw: tuple[int, int], config: DirectDragConfig
) -> Tensor:
    """R_i of `supervision_loss` as the published code has it: patches of the unedited map at the first handles."""
    return sample_patches(reference_feature, first_handles_yx, config.r1, feature_hw, border=_border(config))


def supervision_loss(
    feature: Tensor,
    patches: Tensor | None,
    handles_yx: Tensor,
    targets_yx: Tensor,
    feature_hw: tuple[int, int],
    config: DirectDragConfig,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """The drag loss [B] with a gradient to `feature` [B,C,h,w]; points [B,n,2] on the feature grid, valid bool [B,n].

        L = Σ_i s · mean| R_i − F⟨(p_i + d_i) ± r1⟩ |      d_i = (g_i − p_i)/‖g_i − p_i‖ · min(β, ‖g_i − p_i‖)

    R_i: `patches` of the unedited picture [B,n,C,P,P], or, with ms_reference "current", the current features at p_i,
    detached (DirectDrag's formula). s: the number of positions, or (2 r1)². A pair nearer than `reach` adds nothing.
    For one picture also [n,2], [n] and a scalar.
    """
    step, moving = supervision_step(handles_yx, targets_yx, config.d, config.reach)
    if valid is not None:
        moving = moving & valid
    if config.ms_reference == "current" or patches is None:
        patches = reference_patches(feature.detach(), handles_yx, feature_hw, config)
    scale = (2 * config.r1 + 1) ** 2 if config.ms_scale == "positions" else (2 * config.r1) ** 2
    border = _border(config)
    return drag_loss(feature, handles_yx + step, patches, moving, scale, config.r1, feature_hw, border=border)


def refuse_outside(
    handles_yx: Tensor,
    first_handles_yx: Tensor,
    targets_yx: Tensor,
    feature_hw: tuple[int, int],
    config: DirectDragConfig,
) -> None:
    """InputError if a patch of a moving pair leaves the grid and ms_border is "refuse", as in the published code."""
    if config.ms_border != "refuse":
        return
    step, moving = supervision_step(handles_yx, targets_yx, config.d, config.reach)
    fixed = handles_yx if config.ms_reference == "current" else first_handles_yx
    centres = torch.stack([fixed, handles_yx + step])[:, moving].reshape(-1, 2)
    first, last = centres.floor() - config.r1, centres.floor() + config.r1 + 1
    outside = ((first < 0) | (last > centres.new_tensor(feature_hw))).any(dim=1)
    if outside.any():
        point = [round(value, 2) for value in centres[outside][0].tolist()]
        raise InputError(
            f"the supervision patch of radius {config.r1} around (row, column) {point} leaves the feature grid of "
            f"{feature_hw[0]} x {feature_hw[1]}; keep drags away from the border or set ms_border to 'clamp'"
        )


def _border(config: DirectDragConfig) -> str:
    return "zero" if config.ms_border == "zero" else "clamp"
