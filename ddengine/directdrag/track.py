"""Point tracking: find each handle again by the feature it had in the unedited picture."""

from __future__ import annotations

import torch
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.directdrag.precision import wide
from ddengine.kernels.sample_patches import sample_patches, track


def track_handles(
    feature: Tensor,
    reference_feature: Tensor,
    handles_yx: Tensor,
    first_handles_yx: Tensor,
    feature_hw: tuple[int, int],
    config: DirectDragConfig,
) -> Tensor:
    """New handles [n,2] on the feature grid: the best match of the first handle's feature within ± r2 of each handle.

    Template: the reference trajectory's feature, at the same time, at the first handle; distance: L1 over channels
    (DirectDrag, point tracking). feature and reference_feature are native maps [1,C,h,w].
    """
    with torch.no_grad():
        feature, reference_feature = wide(feature), wide(reference_feature)
        template = sample_patches(reference_feature, first_handles_yx, 0, feature_hw)[:, :, 0, 0]
        return track(feature, template, handles_yx, config.r2, feature_hw, border=config.track_pad)


def arrived(handles_yx: Tensor, targets_yx: Tensor, reach: float) -> bool:
    """Whether every handle [n,2] is nearer than `reach` feature cells to its target."""
    return bool((torch.linalg.vector_norm(handles_yx - targets_yx, dim=1) < reach).all())
