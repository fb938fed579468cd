"""Point tracking: the position in each handle's window whose feature is nearest to a template."""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of kernels have no Python types)

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddengine.errors import InputError
from ddengine.kernels.dispatch import uses_triton
from ddengine.kernels.windows import BORDERS, Windows, check, widened


def track(
    feature: Tensor,
    template: Tensor,
    handles_yx: Tensor,
    radius: int,
    size_hw: tuple[int, int],
    *,
    border: str = "slice",
    valid: Tensor | None = None,
    kernels: str | None = None,
) -> Tensor:
    """The position [B,n,2] in each handle's window of ± radius cells whose feature is nearest to its template.

    feature: native map [B,C,h,w], any strides; template [B,n,C]; handles [B,n,2] on the grid size_hw; valid: bool [B,n],
    None for all true; for one picture also [n,C], [n,2] and [n]. Distance: L1 summed over channels; ties go to the first
    position in raster order (DirectDrag, point tracking). border: "slice" leaves positions outside the grid out,
    "clamp" moves them to the border, "zero" reads zeros there, so that a handle may leave the picture. A handle that is
    not valid, or whose window has no finite distance, comes back as it is. No gradient. Raises InputError for shapes
    that do not fit.
    """
    one = handles_yx.dim() == 2
    handles, template = (x[None] if one else x for x in (handles_yx, template))
    valid = valid[None] if one and valid is not None else valid
    check(feature, handles, size_hw, border, ("slice", *BORDERS))
    expected = (*handles.shape[:2], feature.shape[1])
    if tuple(template.shape) != expected or (valid is not None and valid.shape != expected[:2]):
        raise InputError(
            f"a template {list(template.shape)} and valid {None if valid is None else list(valid.shape)} do not fit; "
            f"give {list(expected)} and None or {list(expected[:2])}"
        )
    with torch.no_grad():
        fast = uses_triton(kernels, feature, template, handles)
        found = _eager(feature, template, handles, valid, radius, *size_hw, border)
    return found[0] if one else found


def _eager(
    feature: Tensor,
    template: Tensor,
    handles: Tensor,
    valid: Tensor | None,
    radius: int,
    height: int,
    width: int,
    border: str,
) -> Tensor:
    windows = Windows.of(feature, handles, radius, (height, width), "zero" if border == "zero" else "clamp")
    points, template, side = handles.flatten(0, 1), template.flatten(0, 1), 2 * radius + 1
    limits = torch.tensor([height - 1, width - 1], dtype=handles.dtype, device=handles.device)
    order = torch.arange(side * side, device=handles.device)
    places = torch.stack([order // side, order % side], dim=1)
    found = []
    for some, pieces in windows.pieces(feature):
        distance = template.new_zeros((), dtype=widened(feature.dtype))
        for channels in pieces:
            patches = windows.read(feature, some, channels)
            patches -= template[some, None, None, channels]
            distance = distance + patches.abs_().sum(dim=-1)
        distance, start = distance.flatten(1), points[some, None]
        positions = start + places - radius
        if border == "slice":
            distance = distance.masked_fill(((positions < 0) | (positions > limits)).any(dim=-1), math.inf)
        distance = torch.where(distance.isfinite(), distance, math.inf)
        least = distance.amin(dim=1, keepdim=True)
        # argmin breaks ties by position on the CPU but promises nothing elsewhere; the first minimum is spelled out.
        best = torch.where(distance == least, order, side * side).amin(dim=1, keepdim=True)
        moved = start[:, 0] + torch.cat([best // side, best % side], dim=1) - radius
        if border == "clamp":
            moved = torch.minimum(moved.clamp_min(0), limits)
        found.append(torch.where(least.isfinite(), moved, start[:, 0]))
    result = torch.cat(found).unflatten(0, handles.shape[:2])
    return result if valid is None else torch.where(valid[..., None], result, handles)
