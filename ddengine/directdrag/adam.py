"""Adam as a pure function of tensors: one update, its step sizes read from a table."""

from __future__ import annotations

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_table(rate: float, updates: int) -> Tensor:
    """Row c of [updates + 1,2]: rate/(1 − β₁ᶜ) and √(1 − β₂ᶜ), bias corrections of update c; float32, no row 0."""
    count = torch.arange(updates + 1, dtype=torch.float64).clamp_min(1)
    return torch.stack([rate / (1 - BETA1**count), (1 - BETA2**count).sqrt()], dim=1).float()


def adam_update(
    value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, corrections: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The new value [B,...] and moments after an update with `corrections` [2] or [B,2], a row of `adam_table`.

    m ← β₁ m + (1−β₁) g ; v ← β₂ v + (1−β₂) g² ; x ← x − rate · m̂/(√v̂ + ε), hats divide by 1 − βᶜᵒᵘⁿᵗ (Kingma and Ba)
    """
    size, root = (part.reshape(-1, *[1] * (value.dim() - 1)) for part in corrections.unbind(-1))
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    return value - size * first / (second.sqrt() / root + EPSILON), first, second
