"""Train a readout head: appearance that survives a part's motion is near, appearance that decays is far.

A triplet is a scene (anchor), the same scene with one part moved (preserved) and an SDEdit of the anchor (distorted):

    L = max(0, margin - (D(anchor, distorted) - D(anchor, preserved)))      D = mean over positions of 1 - cosine

The preserved scene is compared away from the moved part, where the two pictures really agree.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddengine.backends.eager import EagerPasses
from ddengine.models.load import Model
from ddengine.models.readout import ReadoutHead
from ddengine.models.readout_io import save_readout, tap_dims
from ddengine.models.unet import time_embedding, unet_forward
from ddengine.scenes.scene import true_drag
from ddengine.training import data, diffusion
from ddengine.training.loop import Plan, fit

MARGIN = 0.5
STRENGTH = 0.5  # of the SDEdit that makes the distorted member
BATCH = 16


@torch.no_grad()
def triplets(model: Model, count: int, seed: int) -> dict[str, Tensor]:
    """`count` triplets: latents [count, 4, h, w] and `same` [count, 1, h, w], 1 where anchor and preserved agree."""
    members: dict[str, list[Tensor]] = {"anchor": [], "preserved": [], "distorted": [], "same": []}
    encode = EagerPasses(model).encode
    for start in range(0, count, BATCH):
        rng = np.random.default_rng((seed, start))
        drags = [true_drag(rng) for _ in range(min(BATCH, count - start))]
        before = data.to_batch([drag.scene.render(model.size) for drag in drags])
        after = data.to_batch([drag.goal.render(model.size) for drag in drags])
        changed = F.max_pool2d((before - after).abs().amax(1, keepdim=True), 8)
        anchor, preserved = (encode(x.to(model.device)) for x in (before, after))
        distorted = diffusion.draw(
            model.unet,
            len(drags),
            tuple(anchor.shape[1:]),
            model.schedule,
            model.empty_context,
            steps=16,
            strength=STRENGTH,
            start=anchor,
            seed=seed + start,
        )
        found = (anchor, preserved, distorted, (changed < 0.1).float())
        for name, value in zip(members, found, strict=True):
            members[name].append(value.float().cpu())
    return {name: torch.cat(parts) for name, parts in members.items()}


def head_plan(minutes: float, seed: int, steps: int = 3000) -> Plan:
    """The plan by which the embedded model's head is trained."""
    return Plan(steps, 5e-4, minutes=minutes, warmup=50, seed=seed, weight_decay=0.0)


def make(
    model: Model, file: Path, *, minutes: float, count: int, seed: int, progress: bool = False
) -> dict[str, float]:
    """Train a head for `model` (float32) on `count` triplets, write it to `file` and return its last losses."""
    members = triplets(model, count, seed + 7)
    with tempfile.TemporaryDirectory() as folder:
        head = train(Path(folder), model, members, head_plan(minutes, seed), progress=progress)
        last: dict[str, float] = json.loads((Path(folder) / "curve.json").read_text())["curve"][-1]
    save_readout(head, file, last)
    return last


def distance(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over positions of 1 - cosine over channels, one number a sample [B]; `weight` [B, 1, h, w] selects."""
    apart = 1 - F.cosine_similarity(a, b, dim=1)[:, None]
    if weight is None:
        return apart.mean((1, 2, 3))
    return (apart * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)


@torch.no_grad()
def walk(model: Model, latent: Tensor, t: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a head reads: the taps of one walk of the model's UNet over latents [B, 4, h, w], and its time embedding."""
    z = latent.to(model.device, model.dtype)
    taps = unet_forward(model.unet, z, t, model.empty_context, taps=True, noise=False).taps
    return taps, time_embedding(model.unet, t, z)


def train(
    folder: Path,
    model: Model,
    members: dict[str, Tensor],
    plan: Plan,
    *,
    projection: int = 64,
    batch: int = 4,
    progress: bool = False,
) -> ReadoutHead:
    """Train a head for a model's (frozen) UNet; all members of a triplet share time and noise, as in an edit."""
    torch.manual_seed(plan.seed)
    head = ReadoutHead(*tap_dims(model.unet), projection=projection, groups=16)
    count, grid = len(members["anchor"]), (members["anchor"].shape[-2], members["anchor"].shape[-1])

    def loss(
        module: nn.Module, numbers: np.random.Generator, noise: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.from_numpy(numbers.integers(0, count, batch))
        t = int(numbers.integers(1, 800))  # where edits live
        shared = torch.randn((batch, *members["anchor"].shape[1:]), generator=noise)
        clean = torch.cat([members[name][chosen] for name in ("anchor", "preserved", "distorted")])
        z = diffusion.noised(clean, shared.repeat(3, 1, 1, 1), torch.full((3 * batch,), t), model.schedule)
        taps, embedding = walk(model, z, t)
        maps = module([tap.float() for tap in taps], embedding.float(), grid)
        anchor, preserved, distorted = maps.chunk(3)
        near = distance(anchor, preserved, members["same"][chosen].to(model.device))
        far = distance(anchor, distorted)
        hinge = (MARGIN - (far - near)).clamp_min(0).mean()
        return hinge, {"hinge": hinge.item(), "near": near.mean().item(), "far": far.mean().item()}

    trained = fit(head, loss, plan, folder, device=str(model.device), progress=progress)
    assert isinstance(trained, ReadoutHead)
    return trained
