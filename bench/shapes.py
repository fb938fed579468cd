"""Networks of a published shape with random or no weights: speed and cost need no more."""

from __future__ import annotations

import torch

from ddengine.models.load import Model
from ddengine.models.readout import ReadoutHead
from ddengine.models.readout_io import tap_dims
from ddengine.schedule import Schedule

TOKENS = 77  # of a prompt, the empty one too


def sd15(device: str | torch.device = "meta", dtype: torch.dtype = torch.float16) -> Model:
    """The Stable Diffusion 1.5 architecture: UNet, autoencoder and the published readout head's shape.

    device "meta" allocates nothing: shapes alone, to be counted. Elsewhere the weights are random (seed them first) and
    its pictures are noise. The empty prompt's embedding is zeros [1,77,768].
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the rest are diffusers' defaults
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        )
        head = ReadoutHead(*tap_dims(unet), projection=384)
    for module in (unet, vae, head):
        torch.nn.Module.to(module, dtype).requires_grad_(False).eval()  # diffusers' own `to` warns
    return Model(
        name="sd15",
        unet=unet,
        vae=vae,
        schedule=Schedule.from_config({"steps_offset": 1}),
        empty_context=torch.zeros(1, TOKENS, 768, device=device, dtype=dtype),
        readout=head,
        text=None,
        size=512,
        digest="0" * 64,
        notes=("the weights are random",),
    )
