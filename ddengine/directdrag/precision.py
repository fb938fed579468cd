"""Half precision ends where the network does: what is made of its feature maps is computed in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """A half-precision map in float32, any other as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
