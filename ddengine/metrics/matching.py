"""Where a picture's points are found in another picture, by the cosine of feature maps enlarged to the pictures' size.

The enlarged maps (1280 x H x W each, 1.3 GB at 512 x 512) are never built. Enlarging is linear, v(p) = Σ_k w_k(p) f_k
over at most four native cells, so a pixel's product with a source vector s and its own norm follow from native maps:

    s · v(p) = Σ_k w_k(p) (s · f_k)              ‖v(p)‖² = Σ_kl w_k(p) w_l(p) (f_k · f_l)

with f_k · f_l needed for a cell and its neighbours alone. Both sums factor over rows and columns: a few products of
small matrices instead of C x H x W multiplications, in float64 on the CPU, so that every machine finds the same pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddengine.drags import Drag, Point
from ddengine.errors import DDEngineError, InputError
from ddengine.kernels.sample_patches import sample_patches

_TIE = 1e-12  # cosines this close are one: pixels outside the outermost cells' centres hold the very same vector


def distances(source: Tensor, result: Tensor, drags: Sequence[Drag], size: tuple[int, int]) -> list[float]:
    """Pixels from where each handle's content is found in the result to its target (MD_i, specification section 13).

    source, result: native maps [1,C,h,w] of pictures of `size` (width, height); drags in their pixels. Targets are
    taken as they are, inside the picture or not.
    """
    found = match(source, result, [drag.handle for drag in drags], size)
    return [math.dist(each, drag.target) for each, drag in zip(found, drags, strict=True)]


@torch.no_grad()
def match(source: Tensor, result: Tensor, handles: Sequence[Point], size: tuple[int, int]) -> list[tuple[int, int]]:
    """The pixel (x, y) of the result most like each handle's pixel of the source: argmax of the cosine.

    Fractional handles are taken to the nearest pixel; of equal pixels the first counts, row by row. Raises InputError
    for handles outside the picture and maps that do not fit, DDEngineError for features that are not finite.
    """
    width, height = size
    vectors = _vectors(source, handles, size)
    feature = result[0].to("cpu", torch.float64)
    if feature.shape[0] != vectors.shape[1]:
        raise InputError(f"maps of {vectors.shape[1]} and {feature.shape[0]} channels do not fit; use one network")
    if not (feature.isfinite().all() and vectors.isfinite().all()):
        raise DDEngineError("the features hold values that are not finite; compute them in float32")
    rows, columns = _weights(height, feature.shape[1]), _weights(width, feature.shape[2])
    length = _norms(feature, rows, columns).clamp_min_(1e-8)
    found = []
    for vector in vectors:
        cosine = rows @ torch.tensordot(vector, feature, 1) @ columns.T
        cosine /= length * vector.norm().clamp_min(1e-8)
        place = int((cosine >= cosine.max() - _TIE).flatten().to(torch.uint8).argmax())
        found.append((place % width, place // width))
    return found


def _vectors(source: Tensor, handles: Sequence[Point], size: tuple[int, int]) -> Tensor:
    """The enlarged source at the handles' pixels, [n,C] float64."""
    width, height = size
    pixels = [(round(x), round(y)) for x, y in handles]
    for x, y in pixels:
        if not (0 <= x < width and 0 <= y < height):
            raise InputError(f"handle ({x}, {y}) lies outside the picture of {width} x {height} pixels; correct it")
    centres = torch.tensor([(y, x) for x, y in pixels], dtype=torch.float64)
    feature = source.to("cpu", torch.float64)
    return sample_patches(feature, centres, 0, (height, width), kernels="reference").flatten(1)


def _weights(size: int, native: int) -> Tensor:
    """[size, native]: each pixel's bilinear weights on the native cells, pixel centres kept, ends repeated."""
    place = ((torch.arange(size, dtype=torch.float64) + 0.5) * (native / size) - 0.5).clamp(0, native - 1)
    return (1 - (place[:, None] - torch.arange(native, dtype=torch.float64)).abs()).clamp_min(0)


def _norms(feature: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """‖v(p)‖ of every pixel, [H,W]: a cell with itself, its right, its lower and its two diagonal neighbours."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(0)

    left, right, up, down = feature[:, :, :-1], feature[:, :, 1:], feature[:, :-1], feature[:, 1:]
    rows_self, rows_next = rows.square(), 2 * rows[:, :-1] * rows[:, 1:]
    columns_self, columns_next = columns.square().T, 2 * (columns[:, :-1] * columns[:, 1:]).T
    diagonal = dot(up[:, :, :-1], down[:, :, 1:]) + dot(up[:, :, 1:], down[:, :, :-1])
    total = rows_self @ (dot(feature, feature) @ columns_self + dot(left, right) @ columns_next)
    # Twice for the two orders of a pair, and each diagonal once: the factor 2 of both axes would count them four times.
    total += rows_next @ (dot(up, down) @ columns_self + diagonal @ columns_next / 2)
    return total.clamp_min_(0).sqrt_()
