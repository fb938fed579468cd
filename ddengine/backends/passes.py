"""The named network passes that the method is written in; every backend runs these and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddengine.models.network import Observation
    from ddengine.models.unet import KeyValue
    from ddengine.schedule import Schedule

Size = tuple[int, int]  # (rows, columns)


class Passes(Protocol):
    """What a backend offers for one loaded model and one conditioning.

    Latents are [B, 4, h, w], already multiplied by the autoencoder's scaling factor, in any float dtype;
    noise comes back in the latent's dtype, images and encoded latents in float32 or wider, all else in the
    backend's compute `dtype`. A timestep is an int or an int64 tensor of one element. All passes but `supervise`
    are free of gradients; what they return is the caller's and never written again. `rounding`: how far the same
    latent's noise from `supervise` and from the other passes may lie apart, as a share of its largest value; 0 where
    both are the same arithmetic. `any_batch`: whether any number of latents goes in at once.
    """

    @property
    def has_readout(self) -> bool: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def rounding(self) -> float: ...

    @property
    def any_batch(self) -> bool: ...

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] to scaling factor * posterior mean, [B, 4, H // 8, W // 8]."""
        ...

    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        """Noise prediction alone, [B, 4, h, w]: inversion and plain denoising."""
        ...

    def reference(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        readout_hw: Size | None = None,
        readout_times: Sequence[int] | None = None,
    ) -> Observation:
        """Noise, drag feature, appearance maps and self-attention K/V of the unedited trajectory.

        readout_hw: grid of the readout head's map, None for none (`ModelError` where the model has no head).
        readout_times: the times the head is told, a map each; by default the pass's own.
        """
        ...

    def supervise(self, latent: Tensor, timestep: int | Tensor, *, readout_hw: Size | None = None) -> Observation:
        """Noise, drag feature and appearance map, differentiable in the latent (never in the weights)."""
        ...

    def denoise(self, latent: Tensor, timestep: int | Tensor, reference_kv: Sequence[KeyValue]) -> Tensor:
        """Noise prediction with mutual self-attention to `reference_kv`, [B, 4, h, w]."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Latent to an image [B, 3, 8h, 8w], nominally in [-1, 1] and not clamped."""
        ...
