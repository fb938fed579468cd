"""The embedded model's UNet: SD 1.5's block types with one layer a block, on 16 x 16 latents of drawn scenes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ddengine.schedule import Schedule, ddim_step
from ddengine.training import data
from ddengine.training.loop import Plan, fit

TOKENS, CONTEXT_WIDTH = 8, 64


def build() -> UNet2DConditionModel:
    """A new UNet; widths are thin where there are many tokens (attention over them is most of the training cost)."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(48, 96, 128, 128),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=CONTEXT_WIDTH,
        attention_head_dim=2,
    )


def empty_context(seed: int = 0) -> Tensor:
    """The embedding [1, TOKENS, CONTEXT_WIDTH] that stands for the empty prompt: fixed unit-normal numbers."""
    return torch.randn(1, TOKENS, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def encode_scenes(autoencoder: AutoencoderKL, count: int, size: int, seed: int, *, device: str = "cpu") -> Tensor:
    """Scaled latents [count, 4, size/8, size/8] of fresh scenes: posterior means, as an edit encodes its picture."""
    found = []
    for start in range(0, count, 32):
        x = data.scenes(np.random.default_rng((seed, start)), min(32, count - start), size).to(device)
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            found.append(autoencoder.encode(x).latent_dist.mean.float().cpu())
    return torch.cat(found) * autoencoder.config.scaling_factor


def noised(latent: Tensor, noise: Tensor, times: Tensor, schedule: Schedule) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise for a batch of times [B]."""
    level = schedule.alphas_cumprod.to(latent.device)[times][:, None, None, None]
    return level.sqrt() * latent + (1 - level).sqrt() * noise


def train(
    folder: Path,
    latents: Tensor,
    plan: Plan,
    *,
    device: str = "cpu",
    batch: int = 16,
    decode: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> UNet2DConditionModel:
    """Train on noise prediction; `decode` (latents to pictures) lets every checkpoint draw fresh samples."""
    torch.manual_seed(plan.seed)
    schedule, context = Schedule.from_config({}), empty_context().to(device)

    def loss(
        module: nn.Module, numbers: np.random.Generator, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        clean = latents[torch.from_numpy(numbers.integers(0, len(latents), batch))].to(device)
        # Four in five times below 800: edits live between 1 and 741, and the noisiest levels are quickly learnt.
        highest = np.where(numbers.random(batch) < 0.8, 800, 1000)
        times = torch.from_numpy((numbers.random(batch) * highest).astype(np.int64)).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        predicted = module(noised(clean, noise, times, schedule), times, context.expand(batch, -1, -1)).sample
        error = F.mse_loss(predicted.float(), noise)
        return error, {"mse": error.item()}

    def sample(module: nn.Module, step: int) -> None:
        if decode is not None:
            pictures = decode(draw(module, 12, tuple(latents.shape[1:]), schedule, context))
            data.save_grid([pictures[:6], pictures[6:]], folder / f"samples-{step:06d}.png")

    bfloat16 = device != "cpu"
    trained = fit(build(), loss, plan, folder, device=device, bfloat16=bfloat16, sample=sample, progress=progress)
    assert isinstance(trained, UNet2DConditionModel)
    return trained


@torch.no_grad()
def draw(
    module: nn.Module,
    count: int,
    shape: tuple[int, ...],
    schedule: Schedule,
    context: Tensor,
    *,
    steps: int = 25,
    strength: float = 1.0,
    start: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Latents [count, *shape] denoised by DDIM from noise, or from `start` noised to `strength` (SDEdit)."""
    device = context.device
    times, spacing = schedule.timesteps(steps, strength), schedule.spacing(steps)
    z = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    if start is not None:
        z = noised(start.to(device), z, torch.full((count,), times[0], device=device), schedule)
    for t in times:
        prediction = module(z, t, context.expand(count, -1, -1)).sample
        z = ddim_step(schedule, prediction, t, z, spacing)
    return z
