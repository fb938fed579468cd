"""A picture made ready for edits: everything that no drag changes, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ddengine.directdrag.prepare import Prepared
    from ddengine.drags import Spaces


@dataclass(frozen=True)
class Source:
    """What `Engine.prepare` returns and `Engine.edit` takes in place of a picture, any number of times.

    image: the upright RGB input. spaces: all coordinate spaces. prepared: inverted latent and reference trajectory.
    model, device, dtype: digest of the weights it was made with, where and in what they computed; another engine
    refuses it. prompt: the conditioning it was made with. timings, passes: what the preparation cost, by stage.
    """

    image: Image.Image
    spaces: Spaces
    prepared: Prepared
    model: str
    prompt: str
    device: torch.device
    dtype: torch.dtype

    @property
    def timings(self) -> dict[str, float]:
        return self.prepared.timings

    @property
    def passes(self) -> dict[str, dict[str, int]]:
        return self.prepared.passes
