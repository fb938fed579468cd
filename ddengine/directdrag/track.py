"""Point tracking: find each handle again by the feature it had in the unedited picture."""

from __future__ import annotations

import torch
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.track import track


def templates(reference_feature: Tensor, first_handles_yx: Tensor, feature_hw: tuple[int, int]) -> Tensor:
    """What is tracked: the unedited map [B,C,h,w] at the first handles [B,n,2], as [B,n,C] ([n,2] gives [n,C])."""
    return sample_patches(reference_feature, first_handles_yx, 0, feature_hw)[..., 0, 0]


def track_handles(
    feature: Tensor,
    template: Tensor,
    handles_yx: Tensor,
    feature_hw: tuple[int, int],
    config: DirectDragConfig,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """New handles [B,n,2] on the feature grid: the best match of each template within ± r2 of its handle.

    Distance: L1 over channels of the native map [B,C,h,w] (DirectDrag, point tracking). Handles that are not valid,
    bool [B,n], stay. For one picture also [n,C], [n,2] and [n].
    """
    return track(feature, template, handles_yx, config.r2, feature_hw, border=config.track_pad, valid=valid)


def arrived(handles_yx: Tensor, targets_yx: Tensor, reach: float, valid: Tensor) -> Tensor:
    """Whether every valid handle [B,n,2] is nearer than `reach` feature cells to its target: bool [B]."""
    near = torch.linalg.vector_norm(handles_yx - targets_yx, dim=-1) < reach
    return (near | ~valid).all(dim=-1)
