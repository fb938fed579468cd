"""The named network passes that the method is written in; every backend runs these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddengine.models.unet import UNetOutput
    from ddengine.schedule import Schedule


class Passes(Protocol):
    """What a backend offers for one loaded model and one conditioning.

    Latents are [B, 4, h, w], already multiplied by the autoencoder's scaling factor, in any float dtype;
    noise comes back in the latent's dtype, images and encoded latents in float32 or wider, all else in the
    backend's compute `dtype`. A timestep is an int or a tensor of one element. All passes but `supervise` and
    `readout` are free of gradients.
    """

    has_readout: bool
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] to scaling factor * posterior mean, [B, 4, H // 8, W // 8]."""
        ...

    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        """Noise prediction alone, [B, 4, h, w]: inversion and plain denoising."""
        ...

    def reference(self, latent: Tensor, timestep: int | Tensor) -> UNetOutput:
        """Noise, drag feature, resnet taps and self-attention K/V of the unedited trajectory."""
        ...

    def supervise(self, latent: Tensor, timestep: int | Tensor) -> UNetOutput:
        """Noise, drag feature and resnet taps, differentiable in the latent (never in the weights)."""
        ...

    def denoise(
        self, latent: Tensor, timestep: int | Tensor, reference_kv: Sequence[tuple[Tensor, Tensor]] | None
    ) -> Tensor:
        """Noise prediction with mutual self-attention to `reference_kv` (None: plain), [B, 4, h, w]."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Latent to an image [B, 3, 8h, 8w], nominally in [-1, 1] and not clamped."""
        ...

    def readout(self, taps: Sequence[Tensor], time_embedding: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Appearance map [B, P, h, w] of the readout head at `size_hw`, differentiable in the taps.

        `ModelError` where the model has no head.
        """
        ...
