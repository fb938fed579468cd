"""The latent warpage function: the edit starts from a latent moved a little along its drags."""

from __future__ import annotations

from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.directdrag.mask import latent_mask, path_mask
from ddengine.kernels.warpage import warp_latent, warpage_field


def warp(
    inverted: Tensor,
    handles_yx: Tensor,
    targets_yx: Tensor,
    feature_hw: tuple[int, int],
    config: DirectDragConfig,
    *,
    user_mask: Tensor | None = None,
) -> Tensor:
    """The warped inverted latent [1,4,h,w]; handles and targets [n,2] on the feature grid, (row, column).

    Every latent cell moves by the weighted, stretched displacements D_i = ρ (g_i − p_i) of the drags, ρ the warpage
    ratio (DirectDrag, latent warpage function). user_mask: feature-grid mask; only cells inside it move. With
    warp_reach "mask" the displacement fades with the soft mask: whole up to M = 1/2, nothing where M is 0.
    """
    latent_hw = (inverted.shape[-2], inverted.shape[-1])
    shortened_yx = handles_yx + config.latent_warpage_ratio * (targets_yx - handles_yx)
    if config.warp_grid == "corner":
        handles, shortened = handles_yx / 4, shortened_yx / 4
    else:
        scale = handles_yx.new_tensor(latent_hw) / handles_yx.new_tensor(feature_hw)
        handles, shortened = ((points + 0.5) * scale - 0.5 for points in (handles_yx, shortened_yx))
    area = None if user_mask is None else latent_mask(user_mask, latent_hw)[0, 0] > 0
    if area is not None and not area.any():
        return inverted
    field = warpage_field(handles, shortened - handles, latent_hw, area=area, handle_cell=config.warp_handle_cell)
    if config.warp_reach == "mask":
        near = latent_mask(path_mask(handles_yx, targets_yx, feature_hw, config), latent_hw)[0, 0]
        field = field * (2 * near).clamp_max(1)[..., None]
    return warp_latent(inverted, field, area=area, fill=config.warp_fill, holes=config.warp_holes)
