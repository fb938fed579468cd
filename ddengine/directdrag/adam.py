"""Adam as a pure function: one update of one tensor."""

from __future__ import annotations

from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_update(
    value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, count: int, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The new value and moments after update number `count` (from 1); all tensors of one shape and dtype.

    m ← β₁ m + (1−β₁) g ; v ← β₂ v + (1−β₂) g² ; x ← x − rate · m̂/(√v̂ + ε), hats divide by 1 − βᶜᵒᵘⁿᵗ (Kingma and Ba)
    """
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient * gradient
    root = second.sqrt() / (1 - BETA2**count) ** 0.5 + EPSILON
    return value - rate / (1 - BETA1**count) * first / root, first, second
