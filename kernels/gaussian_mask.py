"""The auto soft mask's operator: draw the drags' paths, blur them with a Gaussian, normalise to one.

    X = the pixels of all paths, 0 or 1      B = G_rows X G_columnsᵀ      M = B / (max B + ε)

A path has max(|Δrow|, |Δcolumn|) + 1 samples, evenly spaced from start to end, each rounded to its pixel (halves to
even) and dropped if it lies outside (DirectDrag, soft mask). Along the longer of its two axes it therefore meets every
whole coordinate once, at k = 0, 1, ...; the other coordinate there is round(s + k/last · (e − s)). That form has the
same shape for every path, which a captured graph needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddengine.errors import InputError
from ddengine.kernels.compilation import Configuration
from ddengine.kernels.dispatch import interpreted, jit, launch, tl, triton, uses_triton


@torch.no_grad()
def gaussian_mask(
    starts: Tensor,
    ends: Tensor,
    size_hw: tuple[int, int],
    sigma: float,
    *,
    valid: Tensor | None = None,
    truncated: bool = False,
    epsilon: float = 0.0,
    transposed: bool = False,
    kernels: str | None = None,
) -> Tensor:
    """The soft mask M [H,W] in 0..1 of the paths from starts to ends [n,2] (row, column), in the points' dtype.

    M = B / (max B + epsilon), B the Gaussian blur (sigma, in cells) of the binary path map (DirectDrag, soft mask).
    valid: bool [n], the paths that count, or None for all. truncated: the kernel of `gaussian_matrix`. transposed:
    read the points as (column, row), which mirrors the map, and drops what then lies outside. A map without a single
    pixel inside gives zeros. kernels: as in `uses_triton`. No gradient. Raises InputError.
    """
    _check(starts, ends, valid, size_hw, sigma, epsilon)
    run = _operator if uses_triton(kernels, starts, ends) else _reference
    height, width = size_hw
    return run(starts, ends, valid, height, width, float(sigma), truncated, float(epsilon), transposed)


def _check(
    starts: Tensor, ends: Tensor, valid: Tensor | None, size_hw: tuple[int, int], sigma: float, epsilon: float
) -> None:
    if starts.ndim != 2 or starts.shape[1] != 2 or starts.shape != ends.shape:
        raise InputError(f"starts {tuple(starts.shape)} and ends {tuple(ends.shape)} must both be [n,2] (row, column)")
    if starts.dtype not in (torch.float32, torch.float64) or starts.dtype != ends.dtype:
        raise InputError(f"starts are {starts.dtype}, ends {ends.dtype}; both must be float32 or both float64")
    if valid is not None and (valid.shape != starts.shape[:1] or valid.dtype != torch.bool):
        raise InputError(f"valid is {valid.dtype} {tuple(valid.shape)}; it must be bool [{len(starts)}]")
    if min(size_hw) < 1:
        raise InputError(f"the map's size is {size_hw[0]} x {size_hw[1]}; both sides must be at least 1")
    if not 0 < sigma < math.inf or not 0 <= epsilon < math.inf:
        raise InputError(f"sigma is {sigma}, epsilon {epsilon}; sigma must be above 0, epsilon at least 0")


# The reference: plain PyTorch, on any device.


def rasterise_paths(starts: Tensor, ends: Tensor, size_hw: tuple[int, int], valid: Tensor | None = None) -> Tensor:
    """Binary map [H,W] of the straight pixel paths from starts to ends, both [n,2] as (row, column), float32 or 64."""
    height, width = size_hw
    starts, ends = starts.round(), ends.round()
    way = ends - starts
    last = way.abs().amax(dim=1, keepdim=True)
    steep = way[:, :1].abs() == last  # rows are the longer axis
    start, end = (torch.where(steep, points, points.flip(1))[:, :, None] for points in (starts, ends))
    along = torch.arange(max(size_hw), dtype=starts.dtype, device=starts.device)
    k = torch.where(end[:, 0] >= start[:, 0], along - start[:, 0], start[:, 0] - along)
    across = (start[:, 1] + k / last.clamp_min(1) * (end[:, 1] - start[:, 1])).round()
    row, column = torch.where(steep, along, across), torch.where(steep, across, along)
    hit = (k >= 0) & (k <= last) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    if valid is not None:
        hit &= valid[:, None]
    # Whatever is no hit goes to one place more, which is cut off.
    pixel = torch.where(
        hit, torch.where(hit, row, 0).long() * width + torch.where(hit, column, 0).long(), height * width
    )
    return starts.new_zeros(height * width + 1).scatter_(0, pixel.flatten(), 1.0)[:-1].reshape(height, width)


def cut_kernel(sigma: float) -> tuple[int, float]:
    """Radius and greatest weight of the truncated Gaussian: 2·⌊(⌊4σ⌋|1)/2⌋+1 taps (±2σ), weights summing to one."""
    radius = (int(4 * sigma) | 1) // 2
    return radius, 1 / sum(math.exp(-(tap**2) / (2 * sigma**2)) for tap in range(-radius, radius + 1))


def mirror_period(size: int) -> int:
    """After how many cells an axis repeats that is mirrored about its end cells (reflect-101)."""
    return max(2 * (size - 1), 1)


def gaussian_matrix(size: int, sigma: float, *, truncated: bool, like: Tensor) -> Tensor:
    """One axis of a Gaussian blur as a matrix [size,size]; the blur of a map X is G_rows X G_columnsᵀ.

    truncated=False: the full Gaussian exp(−(i−j)²/2σ²) with nothing beyond the border. truncated=True: `cut_kernel`,
    and the border mirrored about its last cell: G[i,j] sums the kernel over all mirror images of j.
    """
    index = torch.arange(size, device=like.device)
    if not truncated:
        weights = torch.exp(-((index - index[:, None]).to(like.dtype) ** 2) / (2 * sigma**2))
        # Their products would be numbers below the smallest normal one, on which CPUs are many times slower.
        return torch.where(weights > torch.finfo(like.dtype).tiny ** 0.5, weights, 0)
    radius, top = cut_kernel(sigma)
    place = torch.arange(-radius, size + radius, device=like.device)
    source = place.remainder(mirror_period(size))
    source = torch.minimum(source, mirror_period(size) - source)
    distance = (place - index[:, None]).abs()
    weights = top * torch.exp(-(distance.clamp_max(radius).to(like.dtype) ** 2) / (2 * sigma**2))
    # A product with zeros and ones folds the border back: a scatter would add in no fixed order.
    return torch.where(distance <= radius, weights, 0) @ (source[:, None] == index).to(like.dtype)


def _reference(
    starts: Tensor,
    ends: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    sigma: float,
    truncated: bool,
    epsilon: float,
    transposed: bool,
) -> Tensor:
    if transposed:
        starts, ends = starts.flip(1), ends.flip(1)
    paths = rasterise_paths(starts, ends, (height, width), valid)
    rows = gaussian_matrix(height, sigma, truncated=truncated, like=paths)
    columns = gaussian_matrix(width, sigma, truncated=truncated, like=paths)
    blurred = rows @ paths @ columns.T
    peak = blurred.max() + epsilon
    return torch.where(peak > 0, blurred / peak, blurred)


# The Triton version: one launch draws, two blur, one normalises.


@jit
def nearest(x):  # type: ignore[no-untyped-def]
    """Round to whole numbers, halves to even: beyond 2²³ a float32 has no fraction (exact for |x| up to 2²²)."""
    return (x + 12582912.0) - 12582912.0


@jit
def _draw(  # type: ignore[no-untyped-def]
    starts, ends, valid, paths, pairs, height, width, row_at, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """Ones at the pixels of a group of paths, program_id(0), in a stretch of their longer axes, program_id(1)."""
    pair = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS))[:, None]
    known = pair < pairs
    row_of, column_of = pair.to(tl.int64) * 2 + row_at, pair.to(tl.int64) * 2 + 1 - row_at
    start_row = nearest(tl.load(starts + row_of, mask=known, other=0.0))
    start_column = nearest(tl.load(starts + column_of, mask=known, other=0.0))
    end_row = nearest(tl.load(ends + row_of, mask=known, other=0.0))
    end_column = nearest(tl.load(ends + column_of, mask=known, other=0.0))
    last = tl.maximum(tl.abs(end_row - start_row), tl.abs(end_column - start_column))
    steep = tl.abs(end_row - start_row) == last
    start = tl.where(steep, start_row, start_column)
    side = tl.where(steep, start_column, start_row)
    rising = tl.where(steep, end_row, end_column) >= start
    way = tl.where(steep, end_column, end_row) - side
    along = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)[None, :]
    k = tl.where(rising, along - start, start - along)
    across = nearest(side + tl.div_rn(k, tl.maximum(last, 1.0)) * way)
    row, column = tl.where(steep, along, across), tl.where(steep, across, along)
    hit = (k >= 0) & (k <= last) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    hit = hit & (tl.load(valid + pair.to(tl.int64), mask=known, other=0) != 0)
    pixel = tl.where(hit, row, 0.0).to(tl.int64) * width + tl.where(hit, column, 0.0).to(tl.int64)
    tl.store(paths + pixel, 1.0, mask=hit)


@jit
def _weights(distance, spread):  # type: ignore[no-untyped-def]
    distance = distance.to(tl.float32)
    return tl.exp(tl.div_rn(-distance * distance, spread))


@jit
def _blur(  # type: ignore[no-untyped-def]
    source,
    goal,
    peak,
    size,
    others,
    spread,
    radius,
    top,
    period,
    turns,
    TRUNCATED: tl.constexpr,
    PEAK: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """goal [others,size] = (G source)ᵀ for source [size,others], so that two passes blur both axes; PEAK keeps the max.

    G is made where it is used: its exponentials cost less than reading it. float32 throughout, in a fixed order.
    """
    first = tl.program_id(0) * BLOCK
    cell = first + tl.arange(0, BLOCK)
    other = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, size, DEPTH):
        read = begin + tl.arange(0, DEPTH)
        offset = read[None, :] - cell[:, None]
        if TRUNCATED:
            total = tl.zeros((BLOCK, DEPTH), tl.float32)
            between = ((read > 0) & (read < size - 1))[None, :]
            for turn in range(-turns, turns + 1):
                # Most images of most tiles lie beyond the kernel, which two numbers tell.
                shift = turn * period
                if (shift + begin - first < radius + BLOCK) & (shift + begin - first > -radius - DEPTH):
                    image = offset + shift
                    total += tl.where(tl.abs(image) <= radius, top * _weights(image, spread), 0.0)
                if (shift - begin - first < radius + BLOCK + DEPTH) & (shift - begin - first >= -radius):
                    image = shift - read[None, :] - cell[:, None]
                    total += tl.where(between & (tl.abs(image) <= radius), top * _weights(image, spread), 0.0)
        else:
            total = _weights(offset, spread)
        at = read.to(tl.int64)[:, None] * others + other.to(tl.int64)[None, :]
        values = tl.load(source + at, mask=(read < size)[:, None] & (other < others)[None, :], other=0.0)
        sums = tl.dot(total, values, sums, input_precision="ieee")
    inside = (cell < size)[:, None] & (other < others)[None, :]
    tl.store(goal + other.to(tl.int64)[None, :] * size + cell.to(tl.int64)[:, None], sums, mask=inside)
    if PEAK:  # positive floats compare as their bits do, and the greatest integer does not depend on the order
        highest = tl.max(tl.max(tl.where(inside, sums, 0.0), 1), 0)
        tl.atomic_max(peak, highest.to(tl.int32, bitcast=True), sem="relaxed")


@jit
def _normalise(mask, peak, epsilon, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    divisor = tl.load(peak).to(tl.float32, bitcast=True) + epsilon
    values = tl.load(mask + at, mask=at < count, other=0.0)
    divided = tl.div_rn(values, tl.where(divisor > 0, divisor, 1.0))
    tl.store(mask + at, divided, mask=at < count)


DRAW = Configuration(
    "draw",
    _draw,
    {"starts": "*fp32", "ends": "*fp32", "valid": "*i1", "paths": "*fp32", "pairs": "i32", "height": "i32"}
    | {"width": "i32", "row_at": "i32"},
    {"PAIRS": 8, "BLOCK": 64},
    fusion=False,  # the sample's product and sum are rounded one by one, or halves fall to other pixels
)
BLUR = {
    (truncated, peak): Configuration(
        f"blur{'-truncated' if truncated else ''}{'-peak' if peak else ''}",
        _blur,
        {"source": "*fp32", "goal": "*fp32", "peak": "*i32", "size": "i32", "others": "i32", "spread": "fp32"}
        | {"radius": "i32", "top": "fp32", "period": "i32", "turns": "i32"},
        {"TRUNCATED": truncated, "PEAK": peak, "BLOCK": 32, "DEPTH": 16},
    )
    for truncated in (False, True)
    for peak in (False, True)
}
NORMALISE = Configuration(
    "normalise", _normalise, {"mask": "*fp32", "peak": "*i32", "epsilon": "fp32", "count": "i32"}, {"BLOCK": 1024}
)
CONFIGURATIONS = (DRAW, *BLUR.values(), NORMALISE)


def _launch(
    starts: Tensor,
    ends: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    sigma: float,
    truncated: bool,
    epsilon: float,
    transposed: bool,
) -> Tensor:
    starts, ends, pairs = starts.contiguous(), ends.contiguous(), len(starts)
    valid = starts.new_ones(pairs, dtype=torch.bool) if valid is None else valid.contiguous()
    paths = starts.new_zeros(height, width)
    half, peak = torch.empty_like(paths), paths.new_zeros(1, dtype=torch.int32)
    if pairs:
        grid = (
            triton.cdiv(pairs, DRAW.constants["PAIRS"]),
            triton.cdiv(max(height, width), DRAW.constants["BLOCK"]),
        )
        launch(DRAW, grid, starts, ends, valid, paths, pairs, height, width, int(transposed))
    radius, top = cut_kernel(sigma) if truncated else (0, 1.0)
    for source, goal, size, others in ((paths, half, height, width), (half, paths, width, height)):
        blur = BLUR[truncated, goal is paths]
        block = blur.constants["BLOCK"]
        grid = (triton.cdiv(size, block), triton.cdiv(others, block))
        period = mirror_period(size)
        turns = (radius + 2 * size) // period  # how many periods away a mirror image may be and still count
        launch(blur, grid, source, goal, peak, size, others, 2 * sigma**2, radius, top, period, turns)
    count = height * width
    launch(NORMALISE, (triton.cdiv(count, NORMALISE.constants["BLOCK"]),), paths, peak, epsilon, count)
    return paths


# The operator that graphs and compilers see as one; without a formula for gradients, backward through it raises.

_operator = torch.library.custom_op(
    "ddengine::gaussian_mask",
    lambda *arguments: (_launch if interpreted() else _reference)(*arguments),
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor starts, Tensor ends, Tensor? valid, SymInt height, SymInt width, float sigma, bool truncated, "
    "float epsilon, bool transposed) -> Tensor",
)
_operator.register_kernel("cuda")(_launch)
_operator.register_fake(lambda starts, ends, valid, height, width, *others: starts.new_empty(height, width))
