"""The mask that says where the picture may change: drawn from the drags, or given by the user."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.errors import InputError
from ddengine.kernels.gaussian_mask import gaussian_mask

REFERENCE_GRID = 256  # feature cells along the 512 pixel pictures that the method's sigma was chosen on


def edit_mask(
    handles_yx: Tensor,
    targets_yx: Tensor,
    feature_hw: tuple[int, int],
    config: DirectDragConfig,
    *,
    user_mask: Tensor | None = None,
) -> Tensor:
    """The mask M [Hs,Ws] in 0..1 on the feature grid, 1 where the picture may change.

    A user's mask replaces the automatic one; with neither (soft_mask off) the whole picture may change.
    """
    if user_mask is not None:
        return user_mask
    if not config.soft_mask:
        return handles_yx.new_ones(feature_hw)
    return path_mask(handles_yx, targets_yx, feature_hw, config)


def path_mask(handles_yx: Tensor, targets_yx: Tensor, feature_hw: tuple[int, int], config: DirectDragConfig) -> Tensor:
    """The auto soft mask of the drags' paths, [Hs,Ws] in 0..1 on the feature grid."""
    scale = max(feature_hw) / REFERENCE_GRID if config.mask_unit == "grid" else 1
    return gaussian_mask(
        handles_yx,
        targets_yx,
        feature_hw,
        config.soft_mask_sigma * scale,
        truncated=config.mask_form == "truncated",
        epsilon=config.mask_epsilon,
        transposed=config.mask_transposed,
    )


def work_mask(mask: Tensor, work_hw: tuple[int, int]) -> Tensor:
    """A user's picture-sized mask [H,W] in 0..1 as zeros and ones at the working size, 1 where the picture may change.

    A working pixel is free where more than half of its area is; a mask too thin for that frees all it touches.
    """
    free = F.adaptive_avg_pool2d(mask[None], work_hw)[0] > 0.5
    if not free.any():
        free = F.adaptive_max_pool2d(mask[None], work_hw)[0] > 0.5
    return free.float()


def feature_mask(user_mask: Tensor, work_hw: tuple[int, int], feature_hw: tuple[int, int]) -> Tensor:
    """A user's mask, bool or 0..1, at the working or the feature size, as float32 [Hs,Ws] on the feature grid.

    A cell has the largest value in it, so that a thin mask does not slip between cells. Raises InputError.
    """
    size = tuple(user_mask.shape)
    if size not in (tuple(work_hw), tuple(feature_hw)):
        raise InputError(
            f"the mask is {size} (rows, columns); it must have the working size {tuple(work_hw)} or the feature grid's "
            f"{tuple(feature_hw)}"
        )
    mask = user_mask.float()
    if not (mask.min() >= 0 and mask.max() <= 1):
        raise InputError(f"the mask has values from {mask.min():g} to {mask.max():g}; they must lie in 0 to 1")
    return F.adaptive_max_pool2d(mask[None], feature_hw)[0]


def latent_mask(mask: Tensor, latent_hw: tuple[int, int]) -> Tensor:
    """A feature-grid mask [Hs,Ws] on the latent grid, [1,1,h,w], by the nearest lower index (DirectDrag, soft mask)."""
    return F.interpolate(mask[None, None], size=latent_hw, mode="nearest")
