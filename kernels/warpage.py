"""Latent warpage: where each latent cell goes, the scatter that moves it, and the filling of the holes left behind."""

from __future__ import annotations

import torch
from torch import Tensor


def warpage_field(
    handles: Tensor,
    displacements: Tensor,
    size_hw: tuple[int, int],
    *,
    area: Tensor | None = None,
    handle_cell: str = "moves",
) -> Tensor:
    """Displacement field v [h,w,2] in latent cells (row, column) that drags handles [n,2] by displacements [n,2].

        v(C) = Σ_i w_i λ_i D_i      w_i ∝ 1/(‖C − A_i‖ + 10⁻⁴), Σ w_i = 1      λ_i = ‖C − P_i‖/‖P_i − A_i‖

    A_i handle, D_i displacement, P_i the point where the ray from A_i through C leaves the circle around the area:
    λ is 1 at the handle and 0 on the circle (FastDrag's latent warpage function, used by DirectDrag). area: bool [h,w]
    or None for the whole latent; cells outside do not move. handle_cell: what a cell exactly at a handle does, where
    the ray has no direction: "moves" takes λ = 1, "lost" marks the cell with NaN, so that it moves nowhere.
    """
    height, width = size_hw
    axes = [torch.arange(size, dtype=handles.dtype, device=handles.device) for size in size_hw]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    if area is None:
        first, last = handles.new_zeros(2), handles.new_tensor([height - 1, width - 1])
    else:
        inside = cells[area]
        first, last = inside.amin(dim=0), inside.amax(dim=0)
    centre = (first + last) / 2
    # The published distance adds 1e-6 to each coordinate difference.
    radius = torch.linalg.vector_norm(centre - first + 1e-6)

    way = cells[:, :, None] - handles  # [h,w,n,2]
    distance = torch.linalg.vector_norm(way, dim=-1)
    unit = way / distance[..., None]
    from_centre = handles - centre
    along = (unit * from_centre).sum(-1)
    reach = -along + (radius**2 - (from_centre**2).sum(-1) + along**2).clamp_min(0).sqrt()
    stretch = (reach - distance).abs() / reach
    at_handle = distance == 0
    if handle_cell == "moves":
        stretch = torch.where(at_handle, 1.0, stretch)
    if area is not None:  # a handle outside the circle of its area has rays that never meet it
        stretch = torch.where((reach > 0) | at_handle, stretch, 0.0).clamp_max(1)
    weight = 1 / (distance + 1e-4)
    weight = weight / weight.sum(dim=-1, keepdim=True)
    field = ((weight * stretch)[..., None] * displacements).sum(dim=2)
    return field if area is None else torch.where(area[..., None], field, 0.0)


def warp_latent(
    latent: Tensor, field: Tensor, *, area: Tensor | None = None, fill: str = "parallel", holes: str = "unclaimed"
) -> Tensor:
    """Move whole latent cells [1,C,h,w] along a field [h,w,2], within an area (bool [h,w]) if given; fill the holes.

    Cell C goes to round(C + v(C)) (halves to even), clamped to the latent; where several arrive, the first in raster
    order stays. fill: "parallel" averages the nearest moved cells to the left, right, above and below, weighted by
    1/distance; "sequential" does so in raster order, filled cells counting too; "keep" leaves what was there; "none"
    leaves zeros. holes: "unclaimed" are cells that nothing moved to, "zero" cells whose channel 0 is exactly zero.
    """
    channels, (height, width) = latent.shape[1], latent.shape[-2:]
    count = height * width
    source = torch.arange(count, device=latent.device)
    cells = torch.stack([source // width, source % width], dim=1)
    goal = (cells + field.reshape(count, 2)).round()
    lost = goal.isnan().any(dim=1)
    row, column = (goal[:, axis].nan_to_num(0).clamp(0, size - 1).long() for axis, size in ((0, height), (1, width)))
    if area is not None:  # nothing leaves the area, and nothing outside it is overwritten
        lost = lost | ~area.reshape(-1) | ~area[row, column]
    # First come, first served is the least source index for each destination; index `count` means nobody.
    destination = torch.where(lost, count, row * width + column)
    owner = source.new_full((count + 1,), count).scatter_reduce(0, destination, source, "amin")[:count]
    if area is not None:
        owner = torch.where(area.reshape(-1), owner, source)
    values = latent[0].reshape(channels, count)
    moved = torch.cat([values, values.new_zeros(channels, 1)], dim=1)[:, owner].reshape(latent.shape)
    empty = (owner == count).reshape(height, width) if holes == "unclaimed" else moved[0, 0] == 0
    if fill == "none":
        return moved
    if fill == "keep":
        return torch.where(empty, latent, moved)
    return _fill_sequentially(moved, empty) if fill == "sequential" else _fill(moved, empty, latent)


def _fill(moved: Tensor, empty: Tensor, original: Tensor) -> Tensor:
    """Every hole from the nearest moved cells of its row and column; a hole that sees none keeps the original."""
    total = torch.zeros_like(moved)
    weights = moved.new_zeros(empty.shape)
    for dim in (1, 0):
        size = empty.shape[dim]
        shape = (-1, 1) if dim == 0 else (1, -1)
        index = torch.arange(size, device=moved.device).reshape(shape).expand(empty.shape)
        before = torch.where(empty, -1, index).cummax(dim=dim).values
        after = torch.where(empty, size, index).flip(dim).cummin(dim=dim).values.flip(dim)
        for neighbour, found in ((before, before >= 0), (after, after < size)):
            near = neighbour.clamp(0, size - 1)
            weight = torch.where(found & empty, 1 / (near - index).abs().clamp_min(1).to(moved.dtype), 0)
            total += weight * moved.gather(2 + dim, near.expand(moved.shape))
            weights += weight
    filled = torch.where(weights > 0, total / weights.clamp_min(1e-12), original)
    return torch.where(empty, filled, moved)


def _fill_sequentially(moved: Tensor, empty: Tensor) -> Tensor:
    """Holes in raster order, each from the nearest cells with a non-zero channel 0, filled holes included."""
    values = moved[0].detach().permute(1, 2, 0).cpu().clone()
    taken = (values[..., 0] != 0).tolist()
    height, width = values.shape[:2]
    for row, column in empty.nonzero().tolist():
        hits = []
        for step_row, step_column in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            k, r, c = 1, row + step_row, column + step_column
            while 0 <= r < height and 0 <= c < width and not taken[r][c]:
                k, r, c = k + 1, r + step_row, c + step_column
            if 0 <= r < height and 0 <= c < width:
                hits.append((values[r, c], 1 / k))
        if hits:
            # In this order and form the published fill is met bit for bit.
            values[row, column] = sum(value * weight for value, weight in hits) / sum(w for _, w in hits)
            taken[row][column] = bool(values[row, column, 0] != 0)
    return values.permute(2, 0, 1)[None].to(moved)
