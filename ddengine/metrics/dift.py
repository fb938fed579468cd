"""DIFT features: one up block's output for a noised picture, averaged over an ensemble (Tang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddengine.artifacts import StrPath
from ddengine.errors import ModelError
from ddengine.models.family import check_unet, check_vae
from ddengine.models.files import find_weights, load_weights, read_json
from ddengine.models.text import TextEncoder
from ddengine.models.unet import unet_forward
from ddengine.schedule import Schedule

TIME = 261
BLOCK = 1  # 1280 channels at a sixteenth of the picture's sides
ENSEMBLE = 8
SEED = 42
_WIDTH = 1024  # of Stable Diffusion 2's text embeddings
_WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Dift:
    """A Stable Diffusion model in float32, for its features alone. notes: how it differs from the published one."""

    unet: Any
    vae: Any
    schedule: Schedule
    text: TextEncoder
    notes: tuple[str, ...]

    @classmethod
    def load(cls, folder: StrPath, device: torch.device | str = "cpu") -> Dift:
        """Read a local folder in diffusers' layout; the published metric uses Stable Diffusion 2.1 (the 768 model).

        ModelError names what is missing or has another shape; weights are read from safetensors alone.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        folder, device = Path(folder).expanduser(), torch.device(device)
        unet, vae = read_json(folder / "unet" / "config.json"), read_json(folder / "vae" / "config.json")
        noise = read_json(folder / "scheduler" / "scheduler_config.json")
        width = unet.get("cross_attention_dim")
        # Any width of text fits the walk; blocks of another kind do not.
        check_unet(folder / "unet" / "config.json", {**unet, "cross_attention_dim": 1})
        check_vae(folder / "vae" / "config.json", vae)
        text = TextEncoder(folder)
        if text.width != width:
            raise ModelError(
                f"{folder / 'text_encoder'}: its embeddings have {text.width} channels, the UNet's cross_attention_dim "
                f"is {width}; point to a folder whose parts belong together"
            )
        published = width == _WIDTH and noise.get("prediction_type") == "v_prediction"
        note = f"the model in {folder} is not Stable Diffusion 2.1 (768): its distances compare with no others"
        return cls(
            unet=load_weights(
                UNet2DConditionModel, unet, find_weights(folder / "unet", _WEIGHTS), device, torch.float32
            ),
            vae=load_weights(AutoencoderKL, vae, find_weights(folder / "vae", _WEIGHTS), device, torch.float32),
            # The noise levels alone are used; what the model predicts is not read.
            schedule=Schedule.from_config({**noise, "prediction_type": "epsilon"}),
            text=text,
            notes=() if published else (note,),
        )

    def pair(self, original: Tensor, result: Tensor, prompt: str, *, rows: int = ENSEMBLE) -> tuple[Tensor, Tensor]:
        """Features [1,C,h,w] of an original and its result, pictures [1,3,H,W] in [-1, 1], under the set's prompt.

        The published script draws all noise of a run from one stream, so that its values depend on the order of the
        folders. Here each pair starts the stream anew, original first: a value depends on its pair alone.
        """
        context = self.text.encode(prompt)
        generator = torch.Generator().manual_seed(SEED)
        first = self.features(original, context, generator, rows=rows)
        return first, self.features(result, context, generator, rows=rows)

    @torch.no_grad()
    def features(self, image: Tensor, context: Tensor, generator: torch.Generator, *, rows: int = ENSEMBLE) -> Tensor:
        """The mean [1,C,h,w] of up block 1 at time 261 over 8 posterior samples of the picture, each with a noise.

        context: prompt embedding [1,n,D]; generator: on the CPU, so that devices agree. `rows` members run at once,
        which changes memory, not what is drawn. Raises nothing of its own.
        """
        parameter = next(self.unet.parameters())
        posterior = self.vae.encode(image.to(parameter)).latent_dist
        shape = (ENSEMBLE, *posterior.mean.shape[1:])
        drawn, noise = (torch.randn(shape, generator=generator).to(parameter) for _ in range(2))
        latents = float(self.vae.config.scaling_factor) * (posterior.mean + posterior.std * drawn)
        level = self.schedule.alpha(TIME)
        noisy = level**0.5 * latents + (1 - level) ** 0.5 * noise
        total: Tensor | None = None
        for some in noisy.split(rows):
            walked = unet_forward(self.unet, some, TIME, context.to(parameter), feature_block=BLOCK, noise=False)
            total = walked.feature.sum(0, keepdim=True) + (0 if total is None else total)
        assert total is not None
        return total / ENSEMBLE
