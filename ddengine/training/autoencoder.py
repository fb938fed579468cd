"""The embedded model's autoencoder: 8x reduction to four channels, thin where the picture is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ddengine.training import data
from ddengine.training.linear_start import start_linear
from ddengine.training.loop import Plan, fit

CROP = 64  # training crops: four times the steps of whole 128 px scenes for the same pixels


def build() -> AutoencoderKL:
    """A new autoencoder of the SD 1.5 block types (four levels, one resnet each, no attention in the middle)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
        mid_block_add_attention=False,
    )


def reconstruction_loss(decoded: Tensor, picture: Tensor) -> Tensor:
    """L1 and squared error of values, and L1 of their differences (edges carry the drawing)."""
    error = decoded.float() - picture
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def loss(
    module: Any, numbers: np.random.Generator, noise: torch.Generator, *, pictures: int, size: int, device: str
) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction of a sampled latent plus a slight pull towards the unit normal (weight 1e-4 on its mean)."""
    x = data.random_crops(data.scenes(numbers, pictures, size), CROP, numbers).to(device)
    posterior = module.encode(x).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=noise).to(device)
    decoded = module.decode(z).sample
    fidelity = reconstruction_loss(decoded, x)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = F.mse_loss(decoded.float(), x).item() / 4
    return fidelity + 1e-4 * kl, {"l1": fidelity.item(), "kl": kl.item(), "psnr": -10 * float(np.log10(mse))}


def train(
    folder: Path, plan: Plan, *, device: str = "cpu", size: int = 128, pictures: int = 8, progress: bool = False
) -> AutoencoderKL:
    """Train in `folder`; a 4-row grid of held-out scenes and their reconstructions is drawn at every checkpoint."""
    torch.manual_seed(plan.seed)
    held_out = data.scenes(np.random.default_rng(10**6), 12, size)

    def sample(module: Any, step: int) -> None:
        with torch.no_grad():
            x = held_out.to(device)
            y = module.decode(module.encode(x).latent_dist.mean).sample.cpu()
        data.save_grid([held_out[:6], y[:6], held_out[6:], y[6:]], folder / f"reconstruction-{step:06d}.png")

    def batch_loss(
        module: nn.Module, numbers: np.random.Generator, noise: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        return loss(module, numbers, noise, pictures=pictures, size=size, device=device)

    module = start_linear(build())
    trained = fit(module, batch_loss, plan, folder, device=device, bfloat16=True, sample=sample, progress=progress)
    assert isinstance(trained, AutoencoderKL)
    trained.register_to_config(scaling_factor=_scaling_factor(trained, size, device))
    return trained


def _scaling_factor(module: AutoencoderKL, size: int, device: str) -> float:
    """1 / standard deviation of the posterior means of 256 held-out scenes."""
    x = data.scenes(np.random.default_rng(10**6 + 1), 256, size).to(device)
    with torch.no_grad():
        means = torch.cat([module.encode(part).latent_dist.mean for part in x.split(16)])
    return round(1 / float(means.std()), 5)


def psnr(module: AutoencoderKL, pictures: Tensor) -> float:
    """Mean reconstruction PSNR in dB over pictures [B, 3, H, W] in -1..1 (peak to peak 2)."""
    with torch.no_grad():
        y = torch.cat([module.decode(module.encode(p).latent_dist.mean).sample.clamp(-1, 1) for p in pictures.split(8)])
    error = (y - pictures).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())
