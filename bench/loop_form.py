"""The warp and the soft mask as the published method computes them: one latent cell, one point, one sample at a time.

Written from the method's description for one purpose: to say how much faster the vectorised form is. Like the
published code it works on small float32 tensors cell by cell and keeps the claimed cells in a list. The results are
those of the preset `authors`, the warp bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def warp(latent: Tensor, handles: Tensor, displacements: Tensor) -> Tensor:
    """The warped and filled latent [1,C,h,w] for handles and displacements [n,2] in latent cells (row, column)."""
    height, width = latent.shape[-2:]
    last = torch.tensor([height - 1.0, width - 1.0])
    centre = last / 2
    radius = torch.linalg.vector_norm(centre + 1e-6)
    moved = torch.zeros_like(latent)
    claimed: list[tuple[int, int]] = []
    for row in range(height):
        for column in range(width):
            cell = torch.tensor([float(row), float(column)])
            goal = cell + _displacement(cell, handles, displacements, centre, radius)
            if goal.isnan().any():
                continue  # the cell of a handle, where the ray has no direction
            goal = torch.minimum(goal.round().clamp_min(0), last)
            destination = (int(goal[0]), int(goal[1]))
            if destination not in claimed:
                claimed.append(destination)
                moved[0, :, destination[0], destination[1]] = latent[0, :, row, column]
    return _filled(moved)


def _displacement(cell: Tensor, handles: Tensor, displacements: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Σ w_i λ_i D_i at one cell; NaN at a handle."""
    distances, stretches = [], []
    for handle in handles:
        way = cell - handle
        distance = torch.linalg.vector_norm(way)
        unit = way / distance
        from_centre = handle - centre
        along = (unit * from_centre).sum()
        reach = -along + (radius**2 - (from_centre**2).sum() + along**2).clamp_min(0).sqrt()
        distances.append(distance)
        stretches.append((reach - distance).abs() / reach)
    weights = 1 / (torch.stack(distances) + 1e-4)
    weights = weights / weights.sum()
    return ((weights * torch.stack(stretches))[:, None] * displacements).sum(dim=0)


def _filled(moved: Tensor) -> Tensor:
    """Cells whose channel 0 is zero, in raster order and in place, from the nearest others left, right, up and down."""
    height, width = moved.shape[-2:]
    filled = moved.clone()
    for row in range(height):
        for column in range(width):
            if moved[0, 0, row, column] != 0:
                continue
            hits = []
            for step_row, step_column in ((0, -1), (0, 1), (-1, 0), (1, 0)):
                k, r, c = 1, row + step_row, column + step_column
                while 0 <= r < height and 0 <= c < width and filled[0, 0, r, c] == 0:
                    k, r, c = k + 1, r + step_row, c + step_column
                if 0 <= r < height and 0 <= c < width:
                    hits.append((filled[0, :, r, c], 1 / k))
            if hits:
                filled[0, :, row, column] = sum(value * weight for value, weight in hits) / sum(w for _, w in hits)
    return filled


def mask(starts: Tensor, ends: Tensor, size_hw: tuple[int, int], sigma: float) -> Tensor:
    """The soft mask [H,W] of the paths from starts to ends [n,2], whose rows and columns it swaps as published."""
    height, width = size_hw
    paths = torch.zeros(size_hw)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        x0, y0, x1, y1 = (round(value) for value in (*start, *end))
        count = max(abs(x1 - x0), abs(y1 - y0)) + 1
        for k in range(count):
            share = k / (count - 1) if count > 1 else 0.0
            x, y = round(x0 + share * (x1 - x0)), round(y0 + share * (y1 - y0))
            if 0 <= y < height and 0 <= x < width:
                paths[y, x] = 1
    blurred = _blurred(_blurred(paths, sigma).T, sigma).T
    return blurred / (blurred.max() + 1e-6)


def _blurred(values: Tensor, sigma: float) -> Tensor:
    """Down the columns by 4σ taps made odd, that is ± 2σ, of sum one; the border is mirrored about its last row."""
    radius = (int(4 * sigma) | 1) // 2
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(taps**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    height = values.shape[0]
    period = max(2 * (height - 1), 1)
    rows = [row % period for row in range(-radius, height + radius)]
    mirrored = values[[min(row, period - row) for row in rows]]
    blurred = torch.zeros_like(values)
    for first, weight in enumerate(weights.tolist()):
        blurred += weight * mirrored[first : first + height]
    return blurred
