"""From a final latent to a picture at the working size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.errors import DDEngineError


def decode(passes: Passes, latent: Tensor, work_hw: tuple[int, int]) -> Tensor:
    """The picture [1,3,H,W] in −1..1 of a latent [1,4,h,w], resized bilinearly if 8h x 8w is not the working size.

    Raises DDEngineError if a value is not finite, before anything takes it for a picture without a change.
    """
    with torch.no_grad():
        image = passes.decode(latent)
        if not image.isfinite().all():
            raise DDEngineError("the edited picture holds values that are not finite; run again with dtype='float32'")
        image = image.clamp(-1, 1)
        if tuple(image.shape[-2:]) != tuple(work_hw):
            image = F.interpolate(image, size=work_hw, mode="bilinear", align_corners=False)
        return image
