"""Keep the input's own pixels where the edit changed nothing, with a feathered seam."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Levels in -1..1 by which the edited decoding must differ from the unedited one: below the first a pixel is the
# input's own, above the second it is the edit's. 0.12 is 15 of 255 levels.
UNCHANGED, CHANGED = 0.12, 0.3
GROW = 3  # working pixels by which the changed region is widened before its seam is feathered
STRIP = 256  # rows of the picture blended at a time
FEATHER = 2.0  # working pixels, standard deviation of the seam


def change_weight(edited: Tensor, unedited: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Share of the edit [1, 1, H, W] in 0..1 at every working pixel, exactly 0 where nothing changed.

    edited, unedited: decodings [1, 3, H, W] in -1..1 of the edited and of the reference latent, so that what the
    autoencoder itself loses is not taken for a change. allowed: a user's mask [H, W] of 0 and 1; outside it the weight
    is 0 whatever changed there.
    """
    difference = _blur((edited - unedited).abs().amax(1, keepdim=True), 1.0)
    weight = ((difference - UNCHANGED) / (CHANGED - UNCHANGED)).clamp(0, 1)
    weight = F.max_pool2d(weight, 2 * GROW + 1, stride=1, padding=GROW)
    feathered = _blur(weight, FEATHER)
    # The blur's tail would tint pixels far away by fractions of a level; cut it so that they stay bit for bit.
    weight = ((feathered - 0.02) / 0.96).clamp(0, 1)
    if allowed is None:
        return weight
    # A blurred step is 1/2 on the edge: this is 0 there and outside, and the seam lies inside the mask.
    return weight * (2 * _blur(allowed[None, None].to(weight), FEATHER) - 1).clamp(0, 1) * allowed.to(weight)


def composite(
    image: NDArray[np.uint8], edited: Tensor, weight: Tensor, allowed: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """The input [H, W, 3] with the edit blended in: input, bit for bit, where weight is 0, edit where it is 1.

    edited [1, 3, h, w] in -1..1 and weight [1, 1, h, w] at the working size are brought to the input's, bicubically and
    bilinearly. allowed: a user's mask [H, W] in 0..1 that the weight is multiplied by.
    """
    out = image.copy()
    rows, columns = (_extent(weight[0, 0], axis, image.shape[axis]) for axis in (0, 1))
    share = Image.fromarray(weight[0, 0].float().cpu().numpy())
    planes = [Image.fromarray(plane) for plane in ((edited[0].float() + 1) * 127.5).cpu().numpy()]
    # In strips: a picture of 64 megapixels in floats, several times over, would not fit many machines.
    for top in range(rows.start, rows.stop, STRIP):
        strip = slice(top, min(top + STRIP, rows.stop))
        w = _enlarged(share, image.shape, strip, columns, Image.Resampling.BILINEAR)
        if allowed is not None:
            w = w * allowed[strip, columns]
        for channel, plane in enumerate(planes):
            before = image[strip, columns, channel]
            after = _enlarged(plane, image.shape, strip, columns, Image.Resampling.BICUBIC).clip(0, 255)
            mixed = np.rint(before + w * (after - before))
            out[strip, columns, channel] = np.where(w > 0, mixed, before).astype(np.uint8)
    return out


def _extent(weight: Tensor, axis: int, size: int) -> slice:
    """The rows (axis 0) or columns (1) of an enlargement to `size` that a working pixel with a weight reaches."""
    found = (weight > 0).any(1 - axis).nonzero()
    if not len(found):
        return slice(0, 0)
    scale = size / weight.shape[axis]
    reach = max(scale, 1) + 1  # bilinear weights span one pixel of the coarser grid
    first, last = int(found[0]) * scale - reach, (int(found[-1]) + 1) * scale + reach
    return slice(max(math.floor(first), 0), min(math.ceil(last), size))


def _enlarged(
    plane: Image.Image, shape: tuple[int, ...], rows: slice, columns: slice, filter: Image.Resampling
) -> NDArray[np.float32]:
    """Some rows and columns of a float plane resized to `shape`, the same values as all of it would have there."""
    down, across = plane.height / shape[0], plane.width / shape[1]
    right, bottom = min(columns.stop * across, plane.width), min(rows.stop * down, plane.height)
    box = (columns.start * across, rows.start * down, right, bottom)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(plane.resize(size, filter, box=box))


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of radius 3 sigma with repeated edges."""
    radius = round(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    taps = taps / taps.sum()
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), taps[None, None, None, :])
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), taps[None, None, :, None])
