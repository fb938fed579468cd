"""The passes in plain PyTorch: the behaviour every other backend is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddengine.backends.passes import Size
from ddengine.errors import ModelError
from ddengine.models.load import Model
from ddengine.models.network import Network, Observation
from ddengine.models.unet import KeyValue


class EagerPasses:
    """`Passes` over a loaded model's own modules; holds one conditioning, shares the weights."""

    rounding, any_batch = 0.0, True

    def __init__(self, model: Model, context: Tensor | None = None) -> None:
        """`context`: a prompt embedding [1, n, D] (`prompt_context`); None is the model's empty prompt."""
        self.model = model
        self.schedule = model.schedule
        self.has_readout = model.readout is not None
        parameter = next(model.unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._vae_dtype = next(model.vae.parameters()).dtype
        self._scale = float(model.vae.config.scaling_factor)
        context = self._check_context(model.empty_context if context is None else context)
        self.network = Network(model.unet, model.readout, context, len(model.schedule.alphas_cumprod))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] to scaling factor * posterior mean, [B, 4, H // 8, W // 8]."""
        posterior = self.model.vae.encode(image.to(self.device, self._vae_dtype)).latent_dist
        return self._scale * _at_least_float32(posterior.mean)

    @torch.no_grad()
    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        """Noise prediction alone, in the latent's dtype."""
        return self._call(latent, timestep).noise

    @torch.no_grad()
    def reference(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        readout_hw: Size | None = None,
        readout_times: Sequence[int] | None = None,
    ) -> Observation:
        """Noise, drag feature, appearance maps and self-attention K/V."""
        return self._call(latent, timestep, kv=True, readout_hw=readout_hw, readout_times=readout_times)

    @torch.enable_grad()
    def supervise(self, latent: Tensor, timestep: int | Tensor, *, readout_hw: Size | None = None) -> Observation:
        """Noise, drag feature and appearance map with gradients to the latent."""
        return self._call(latent, timestep, readout_hw=readout_hw)

    @torch.no_grad()
    def denoise(self, latent: Tensor, timestep: int | Tensor, reference_kv: Sequence[KeyValue]) -> Tensor:
        """Noise prediction in the latent's dtype, with mutual self-attention to `reference_kv`."""
        return self._call(latent, timestep, reference_kv=reference_kv).noise

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Latent to an image [B, 3, 8h, 8w] in [-1, 1], not clamped, float32 or wider."""
        scaled = latent.to(self.device) / self._scale
        return _at_least_float32(self.model.vae.decode(scaled.to(self._vae_dtype)).sample)

    def _call(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        kv: bool = False,
        reference_kv: Sequence[KeyValue] | None = None,
        readout_hw: Size | None = None,
        readout_times: Sequence[int] | None = None,
    ) -> Observation:
        if readout_hw is not None and not self.has_readout:
            raise ModelError(
                f"model {self.model.name!r} has no readout head; load one with readout=FILE.safetensors, or "
                f"set readout_guidance=False"
            )
        out = self.network(
            latent.to(self.device, self.dtype),
            timestep,
            kv=kv,
            reference_kv=reference_kv,
            readout_hw=readout_hw,
            readout_times=readout_times,
        )
        return out._replace(noise=out.noise.to(latent.dtype))

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


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
