"""Readout-guided feature alignment: keep the appearance that the readout head sees."""

from __future__ import annotations

import torch
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.config import DirectDragConfig
from ddengine.directdrag.precision import wide
from ddengine.errors import ModelError


def uses_readout(config: DirectDragConfig, passes: Passes) -> bool:
    """Whether the readout term runs: "auto" follows the model; ModelError if it was asked for and there is no head."""
    if config.readout_guidance is True and not passes.has_readout:
        raise ModelError(
            "readout_guidance is on but the model has no readout head; load one with readout=FILE.safetensors, or set "
            "readout_guidance to 'auto' or False"
        )
    return bool(config.readout_guidance) and passes.has_readout


def readout_grid(config: DirectDragConfig, latent: Tensor) -> tuple[int, int]:
    """The grid (rows, columns) on which appearance maps are compared: a fixed square, or the latent's own."""
    return (config.rg_grid, config.rg_grid) if config.rg_grid else (latent.shape[-2], latent.shape[-1])


def readout_loss(observed: Tensor, reference: Tensor, latent_range: Tensor | float, kind: str) -> Tensor:
    """The unweighted readout loss [B] of two appearance maps [B,P,h,w], with a gradient to `observed`.

    "l2": mean over positions and channels of the squared difference (DirectDrag's formula, as a mean so that its
    weight does not depend on the size). "cosine_range2": (max e − min e)² · mean over positions of 1 − cosine over
    channels, e the latent at the start of the drag step (the published code).
    """
    observed, reference = wide(observed), wide(reference)
    if kind == "l2":
        return (observed - reference).square().mean(dim=(1, 2, 3))
    return latent_range**2 * (1 - torch.cosine_similarity(observed, reference, dim=1)).mean(dim=(1, 2))


def skipped_updates(config: DirectDragConfig, latent_range: float, guided: bool) -> int:
    """How many latent updates each drag step starts by skipping.

    "emulate" is what the published code's fresh half-precision gradient scaler does: with scale s the readout mean,
    a half, receives the gradient s · weight · R², infinite until that is below 65520:
    n = min{n ≥ 0 : 2^(16−n) · weight · R² < 65520}. Without readout guidance nothing is skipped.
    """
    if config.amp_skip == "emulate":
        scaled, n = 2.0**16 * config.readout_weight * latent_range**2 if guided else 0.0, 0
        while scaled >= 65520:
            scaled, n = scaled / 2, n + 1
        return n
    return 0 if config.amp_skip == "none" else int(config.amp_skip)
