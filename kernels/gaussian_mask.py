"""The auto soft mask's operator: rasterise drag paths, blur them with a Gaussian, normalise to one."""

from __future__ import annotations

import torch
from torch import Tensor


def rasterise_paths(starts: Tensor, ends: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Binary map [H,W] of the straight pixel paths from starts to ends, both [n,2] as (row, column), float32 or 64.

    A path has max(|Δrow|, |Δcolumn|) + 1 samples, evenly spaced from end to end, each rounded to its pixel (halves
    to even) and dropped if it lies outside. All paths share one map (DirectDrag, soft mask).
    """
    height, width = size_hw
    starts, ends = starts.round(), ends.round()
    last = (ends - starts).abs().amax(dim=1, keepdim=True)
    count = int(last.max().item()) + 1
    # Every path gets as many samples as the longest one: the surplus repeats its end.
    share = (torch.arange(count, dtype=starts.dtype, device=starts.device) / last.clamp_min(1)).clamp_max(1)
    samples = (starts[:, None] + share[..., None] * (ends - starts)[:, None]).round().long().reshape(-1, 2)
    limits = torch.tensor([height, width], device=samples.device)
    samples = samples[((samples >= 0) & (samples < limits)).all(dim=1)]
    paths = starts.new_zeros(height, width)
    paths[samples[:, 0], samples[:, 1]] = 1
    return paths


def gaussian_matrix(size: int, sigma: float, *, truncated: bool, like: Tensor) -> Tensor:
    """One axis of a Gaussian blur as a matrix [size,size]; the blur of a map X is K_rows X K_columnsᵀ.

    truncated=False: the full Gaussian exp(−(i−j)²/2σ²) with nothing beyond the border. truncated=True: the kernel of
    2·⌊(⌊4σ⌋|1)/2⌋+1 taps (±2σ), weights summing to one, and the border mirrored about its last pixel (reflect-101).
    """
    index = torch.arange(size, device=like.device)
    if not truncated:
        return torch.exp(-((index[:, None] - index).to(like.dtype) ** 2) / (2 * sigma**2))
    radius = (int(4 * sigma) | 1) // 2
    taps = torch.arange(-radius, radius + 1)  # on the CPU: not every device has float64
    weights = torch.exp(-(taps.double() ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).to(like)
    period = max(2 * (size - 1), 1)
    source = (index[:, None] + taps.to(like.device)).remainder(period)
    source = torch.minimum(source, period - source)
    matrix = like.new_zeros(size, size)
    return matrix.scatter_add_(1, source, weights.expand(size, -1))


def gaussian_mask(
    starts: Tensor,
    ends: Tensor,
    size_hw: tuple[int, int],
    sigma: float,
    *,
    truncated: bool = False,
    epsilon: float = 0.0,
    transposed: bool = False,
) -> Tensor:
    """The soft mask M [H,W] in 0..1 of the paths from starts to ends [n,2] (row, column), in the points' dtype.

    M = B / (max B + epsilon), B the Gaussian blur of the binary path map (DirectDrag, soft mask). truncated: the
    kernel of `gaussian_matrix`. transposed: read the points as (column, row), which mirrors the map, and drops what
    then lies outside. A map without a single pixel inside gives zeros.
    """
    if transposed:
        starts, ends = starts.flip(1), ends.flip(1)
    paths = rasterise_paths(starts, ends, size_hw)
    rows = gaussian_matrix(size_hw[0], sigma, truncated=truncated, like=paths)
    columns = gaussian_matrix(size_hw[1], sigma, truncated=truncated, like=paths)
    blurred = rows @ paths @ columns.T
    peak = blurred.max() + epsilon
    return torch.where(peak > 0, blurred / peak, blurred)
