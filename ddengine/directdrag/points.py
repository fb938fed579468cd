"""From the user's drags to handles and targets on the feature grid, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.drags import Drag, Spaces


def points_for(config: DirectDragConfig, drags: Sequence[Drag], spaces: Spaces) -> tuple[Tensor, Tensor]:
    """Handles and targets [n,2] float32 of drags given in image pixels, as (row, column) on the feature grid.

    Ours keeps pixel centres and fractions. round_points: scale from the corner and round to whole working pixels, then
    to whole feature cells (halves to even). clamp_margin keeps points that far from the border, with clamp_swapped
    mistaking width for height (both: DirectDrag, published code).
    """
    xy_image = np.array([(drag.handle, drag.target) for drag in drags], dtype=np.float64)
    width, height = spaces.work_size
    if config.round_points:
        xy_work = np.rint(xy_image * _shrinking(spaces))
    else:
        xy_work = spaces.work_from_image(xy_image)
    if config.clamp_margin:
        limits = (height, width) if config.clamp_swapped else (width, height)
        low = config.clamp_margin
        xy_work = np.clip(xy_work, low, np.array(limits) - low - 1)
    if config.round_points:
        scale = np.array(spaces.feature_hw) / np.array(spaces.work_hw)
        yx_feature = np.rint(xy_work[..., ::-1] * scale)
    else:
        yx_feature = spaces.feature_from_work(xy_work)
    points = torch.from_numpy(np.ascontiguousarray(yx_feature, dtype=np.float32))
    return points[:, 0], points[:, 1]


def image_points(config: DirectDragConfig, yx_feature: Tensor, spaces: Spaces) -> np.ndarray:
    """Feature-grid points [n,2] as (x, y) float64 in image pixels: the way back of `points_for` but for the clamp."""
    yx = yx_feature.detach().cpu().double().numpy()  # in this order: not every device has float64
    if not config.round_points:
        return spaces.image_from_feature(yx)
    scale = np.array(spaces.work_hw) / np.array(spaces.feature_hw)
    return np.rint(yx * scale)[..., ::-1] / _shrinking(spaces)


def _shrinking(spaces: Spaces) -> float:
    """The one scale of both axes, before the sides were rounded to pixels."""
    return max(spaces.work_size) / max(spaces.image_size)
