"""Keep the input's own pixels where the edit changed nothing, with a feathered seam."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Levels in -1..1 by which the edited decoding must differ from the unedited one: below the first a pixel is the
# input's own, above the second it is the edit's. 0.06 is 8 of 255 levels.
UNCHANGED, CHANGED = 0.06, 0.16
GROW = 4  # working pixels by which the changed region is widened before its seam is feathered
FEATHER = 3.0  # working pixels, standard deviation of the seam


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


def composite(image: NDArray[np.uint8], edited: Tensor, weight: Tensor) -> NDArray[np.uint8]:
    """The input [H, W, 3] with the edit blended in: input where weight is 0, edit where it is 1.

    edited [1, 3, h, w] in -1..1 and weight [1, 1, h, w] at the working size are enlarged bilinearly to the input's.
    """
    size = image.shape[:2]
    w = F.interpolate(weight.float(), size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()[..., None]
    e = F.interpolate(edited.float(), size, mode="bicubic", align_corners=False).clamp(-1, 1)
    levels = ((e[0].permute(1, 2, 0) + 1) * 127.5).cpu().numpy()
    mixed = image + w * (levels - image)
    return np.where(w > 0, np.clip(np.rint(mixed), 0, 255), image).astype(np.uint8)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of radius 3 sigma with repeated edges."""
    radius = round(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    taps = taps / taps.sum()
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), taps[None, None, None, :])
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), taps[None, None, :, None])
