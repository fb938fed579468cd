"""The passes in plain PyTorch: the behaviour every other backend is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddengine.errors import ModelError
from ddengine.models.load import Model
from ddengine.models.unet import UNetOutput, cross_key_values, unet_forward


class EagerPasses:
    """`Passes` over a loaded model's own modules; holds one conditioning, shares the weights."""

    def __init__(self, model: Model, context: Tensor | None = None) -> None:
        """`context`: a prompt embedding [1, n, D] (`prompt_context`); None is the model's empty prompt."""
        self.model = model
        self.schedule = model.schedule
        self.has_readout = model.readout is not None
        parameter = next(model.unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._vae_dtype = next(model.vae.parameters()).dtype
        self._scale = float(model.vae.config.scaling_factor)
        # One conditioning for the life of the passes: the keys and values it gives are made once.
        context = self._check_context(model.empty_context if context is None else context)
        with torch.no_grad():
            self._context_kv = cross_key_values(model.unet, context)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] to scaling factor * posterior mean, [B, 4, H // 8, W // 8]."""
        posterior = self.model.vae.encode(image.to(self.device, self._vae_dtype)).latent_dist
        return self._scale * _at_least_float32(posterior.mean)

    @torch.no_grad()
    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        """Noise prediction alone, in the latent's dtype."""
        return _noise(self._walk(latent, timestep))

    @torch.no_grad()
    def reference(self, latent: Tensor, timestep: int | Tensor) -> UNetOutput:
        """Noise, drag feature, resnet taps and self-attention K/V."""
        return self._walk(latent, timestep, taps=True, kv=True)

    @torch.enable_grad()
    def supervise(self, latent: Tensor, timestep: int | Tensor) -> UNetOutput:
        """Noise, drag feature and resnet taps with gradients to the latent."""
        return self._walk(latent, timestep, taps=True)

    @torch.no_grad()
    def denoise(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        reference_kv: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Noise prediction in the latent's dtype, with mutual self-attention to `reference_kv` if given."""
        return _noise(self._walk(latent, timestep, reference_kv=reference_kv))

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latent to an image [B, 3, 8h, 8w] in [-1, 1], not clamped, float32 or wider."""
        scaled = latent.to(self.device) / self._scale
        return _at_least_float32(self.model.vae.decode(scaled.to(self._vae_dtype)).sample)

    def readout(self, taps: Sequence[Tensor], time_embedding: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Appearance map [B, P, h, w] of the readout head; gradients flow to the taps."""
        if self.model.readout is None:
            raise ModelError(
                f"model {self.model.name!r} has no readout head; load one with readout=FILE.safetensors, or "
                f"set readout_guidance=False"
            )
        return self.model.readout(taps, time_embedding, size_hw)

    def _walk(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        taps: bool = False,
        kv: bool = False,
        reference_kv: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> UNetOutput:
        computed = latent.to(self.device, self.dtype)
        out = unet_forward(
            self.model.unet, computed, timestep, self._context_kv, taps=taps, kv=kv, reference_kv=reference_kv
        )
        return out._replace(noise=None if out.noise is None else out.noise.to(latent.dtype))

    def _check_context(self, context: Tensor) -> Tensor:
        width = self.model.empty_context.shape[-1]
        if context.dim() != 3 or context.shape[0] != 1 or context.shape[-1] != width:
            raise ModelError(f"the conditioning is {list(context.shape)}, this model takes [1, n, {width}]")
        return context.to(self.device, self.dtype)


def prompt_context(model: Model, prompt: str) -> Tensor:
    """The conditioning of a prompt [1, n, D]; any but the empty one needs a text encoder (`ModelError`)."""
    if not prompt:
        return model.empty_context
    if model.text is None:
        raise ModelError(
            f"model {model.name!r} has no text encoder, so the prompt {prompt!r} cannot be used; leave the "
            f"prompt empty, or use a model folder with text_encoder/ and tokenizer/"
        )
    return model.text.encode(prompt).to(model.empty_context)


def _noise(out: UNetOutput) -> Tensor:
    assert out.noise is not None
    return out.noise


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
