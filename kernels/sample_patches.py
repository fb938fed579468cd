"""Square patches of the enlarged feature map, read straight from the native one; supervision loss and tracking on them.

The method's points live on the feature grid, a bilinear enlargement of the UNet's feature map (four times a side). That
map is never built: enlarging and fractional sampling are both linear and separable, so a patch of P x P positions is

    patch = R F Cᵀ        R [P,h], C [P,w]: at most four non-zero weights a row

which is exact, and deterministic forwards and backwards (no atomics).
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_weights(centres: Tensor, radius: int, size: int, native: int, border: str) -> Tensor:
    """Weights [n,2r+1,native] that read a native axis at centre − r ... centre + r of its enlargement to `size` cells.

    The enlargement is bilinear with pixel centres kept (align_corners=False); between enlarged cells values are
    interpolated linearly. border, for cells outside the enlarged axis: "clamp" repeats the last, "zero" reads zero.
    """
    low = centres.floor()[:, None]
    fraction = centres[:, None] - low  # one fraction for the whole patch: rounding does not grow with the position
    low = low + torch.arange(-radius, radius + 1, dtype=centres.dtype, device=centres.device)
    index = torch.arange(native, dtype=centres.dtype, device=centres.device)

    def enlarged(cell: Tensor) -> Tensor:
        inside = cell.clamp(0, size - 1)
        source = ((inside + 0.5) * (native / size) - 0.5).clamp(0, native - 1)
        weights = (1 - (source[..., None] - index).abs()).clamp_min(0)
        if border == "zero":
            weights = weights * (inside == cell)[..., None]
        return weights

    return (1 - fraction)[..., None] * enlarged(low) + fraction[..., None] * enlarged(low + 1)


def sample_patches(
    feature: Tensor, centres_yx: Tensor, radius: int, size_hw: tuple[int, int], *, border: str = "clamp"
) -> Tensor:
    """Patches [n,C,2r+1,2r+1] around centres [n,2] (row, column, fractions allowed) of the enlarged feature map.

    feature: [1,C,h,w] native map; size_hw: the grid the centres live on. Differentiable in `feature`. `border` as in
    `axis_weights`. Equals enlarging to size_hw bilinearly and sampling with one bilinear weight quadruple a patch
    (DirectDrag, motion supervision).
    """
    rows, columns = (
        axis_weights(centres_yx[:, axis], radius, size_hw[axis], feature.shape[2 + axis], border).to(feature.dtype)
        for axis in (0, 1)
    )
    return rows[:, None] @ feature @ columns.transpose(1, 2)[:, None]


def supervision_step(handles_yx: Tensor, targets_yx: Tensor, longest: float, reach: float) -> tuple[Tensor, Tensor]:
    """The step [n,2] each handle is asked to take, and whether [n] it still moves.

    d_i = (g_i − p_i)/‖g_i − p_i‖ · min(β, ‖g_i − p_i‖); a pair nearer than `reach` is at rest (motion supervision).
    """
    way = targets_yx - handles_yx
    distance = torch.linalg.vector_norm(way, dim=1, keepdim=True)
    return way / distance.clamp_min(1e-12) * distance.clamp_max(longest), distance[:, 0] >= reach


def drag_loss(reference: Tensor, patches: Tensor, moving: Tensor, scale: float) -> Tensor:
    """Σ_i scale · mean|reference_i − patch_i| over the moving pairs; patches [n,C,P,P], moving bool [n] (scalar)."""
    return scale * ((reference - patches).abs().mean(dim=(1, 2, 3)) * moving).sum()


def track(
    feature: Tensor,
    template: Tensor,
    handles_yx: Tensor,
    radius: int,
    size_hw: tuple[int, int],
    *,
    border: str = "slice",
) -> Tensor:
    """The position [n,2] in each handle's window of ± radius cells whose feature is nearest to its template.

    feature: [1,C,h,w] native map; template: [n,C]; distance: L1 summed over channels; ties go to the first position
    in raster order (DirectDrag, point tracking). border: "slice" leaves positions outside the grid out, "clamp" moves
    them to the border, "zero" reads zeros there, so that a handle may leave the picture.
    """
    window = sample_patches(feature, handles_yx, radius, size_hw, border="zero" if border == "zero" else "clamp")
    distance = (window - template[:, :, None, None]).abs().sum(dim=1)
    offsets = torch.arange(-radius, radius + 1, dtype=handles_yx.dtype, device=handles_yx.device)
    rows, columns = handles_yx[:, 0, None] + offsets, handles_yx[:, 1, None] + offsets
    limits = handles_yx.new_tensor(size_hw) - 1
    if border == "slice":
        outside = ((rows < 0) | (rows > limits[0]))[:, :, None] | ((columns < 0) | (columns > limits[1]))[:, None, :]
        distance = distance.masked_fill(outside, float("inf"))
    side = 2 * radius + 1
    # argmin breaks ties by position on the CPU but promises nothing elsewhere; the first minimum is spelled out.
    flat = distance.flatten(1)
    order = torch.arange(side * side, device=flat.device)
    best = torch.where(flat == flat.amin(dim=1, keepdim=True), order, side * side).amin(dim=1)
    found = handles_yx + torch.stack([best // side, best % side], dim=1) - radius
    return torch.minimum(found.clamp_min(0), limits) if border == "clamp" else found
