"""Train a readout head: appearance that survives a part's motion is near, appearance that decays is far.

A triplet is a scene (anchor), the same scene with one part moved (preserved) and an SDEdit of the anchor (distorted):

    L = max(0, margin - (D(anchor, distorted) - D(anchor, preserved)))      D = mean over positions of 1 - cosine

The preserved scene is compared away from the moved part, where the two pictures really agree.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddengine.models.readout import ReadoutHead
from ddengine.models.readout_io import tap_dims
from ddengine.models.unet import unet_forward
from ddengine.scenes.scene import true_drag
from ddengine.schedule import Schedule
from ddengine.training import data, diffusion
from ddengine.training.loop import Plan, fit

MARGIN = 0.5
STRENGTH = 0.5  # of the SDEdit that makes the distorted member


@torch.no_grad()
def triplets(
    autoencoder: nn.Module, unet: nn.Module, count: int, size: int, seed: int, *, device: str = "cpu"
) -> dict[str, Tensor]:
    """`count` triplets: latents [count, 4, h, w] and `same` [count, 1, h, w], 1 where anchor and preserved agree."""
    schedule, context = Schedule.from_config({}), diffusion.empty_context().to(device)
    scale, members = autoencoder.config.scaling_factor, {"anchor": [], "preserved": [], "distorted": [], "same": []}
    for start in range(0, count, 16):
        rng = np.random.default_rng((seed, start))
        drags = [true_drag(rng) for _ in range(min(16, count - start))]
        a, b = (
            data.to_batch([s.render(size) for s in side])
            for side in ([d.scene for d in drags], [d.goal for d in drags])
        )
        changed = F.max_pool2d((a - b).abs().amax(1, keepdim=True), 8)
        z = {
            name: autoencoder.encode(x.to(device)).latent_dist.mean.float() * scale
            for name, x in (("anchor", a), ("preserved", b))
        }
        bad = diffusion.draw(
            unet,
            len(drags),
            tuple(z["anchor"].shape[1:]),
            schedule,
            context,
            steps=16,
            strength=STRENGTH,
            start=z["anchor"],
            seed=seed + start,
        )
        for name, value in {**z, "distorted": bad, "same": (changed < 0.1).float()}.items():
            members[name].append(value.cpu())
    return {name: torch.cat(parts) for name, parts in members.items()}


def distance(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over positions of 1 - cosine over channels, one number a sample [B]; `weight` [B, 1, h, w] selects positions."""
    apart = 1 - F.cosine_similarity(a, b, dim=1)[:, None]
    if weight is None:
        return apart.mean((1, 2, 3))
    return (apart * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)


def train(
    folder: Path,
    unet: nn.Module,
    members: dict[str, Tensor],
    plan: Plan,
    *,
    projection: int = 64,
    batch: int = 4,
    device: str = "cpu",
) -> ReadoutHead:
    """Train a head for `unet` (frozen) on triplets; all members of a triplet share time and noise, as in an edit."""
    torch.manual_seed(plan.seed)
    dims, time_dim = tap_dims(unet)
    head = ReadoutHead(dims, time_dim, projection=projection, groups=16)
    schedule, context = Schedule.from_config({}), diffusion.empty_context().to(device)
    count, grid = len(members["anchor"]), tuple(members["anchor"].shape[-2:])

    def loss(
        module: nn.Module, numbers: np.random.Generator, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.from_numpy(numbers.integers(0, count, batch))
        t = int(numbers.integers(1, 800))
        noise = torch.randn((batch, *members["anchor"].shape[1:]), generator=generator)
        clean = torch.cat([members[name][chosen] for name in ("anchor", "preserved", "distorted")])
        times = torch.full((3 * batch,), t)
        with torch.no_grad():
            z = diffusion.noised(clean, noise.repeat(3, 1, 1, 1), times, schedule).to(device)
            walked = unet_forward(unet, z, t, context, taps=True)
        maps = module([tap.float() for tap in walked.taps], walked.time_embedding, grid)
        anchor, preserved, distorted = maps.chunk(3)
        near = distance(anchor, preserved, members["same"][chosen].to(device))
        far = distance(anchor, distorted)
        hinge = (MARGIN - (far - near)).clamp_min(0).mean()
        return hinge, {"hinge": hinge.item(), "near": near.mean().item(), "far": far.mean().item()}

    trained = fit(head, loss, plan, folder, device=device)
    assert isinstance(trained, ReadoutHead)
    return trained
