"""`ddengine train-embedded`: autoencoder, UNet and readout head from drawn scenes alone, into one folder."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ddengine.artifacts import atomic_write
from ddengine.models.load import Model
from ddengine.models.readout_io import save_readout
from ddengine.models.text import embedding_bytes
from ddengine.schedule import Schedule
from ddengine.training import autoencoder, data, diffusion, readout
from ddengine.training.loop import Plan, rank, run_workers

SIZE = 128
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Minutes for each part and the numbers of pictures; the shares suit two CPU cores, a GPU ends by steps first."""

    autoencoder_minutes: float = 60
    unet_minutes: float = 110
    readout_minutes: float = 10
    latents: int = 16000
    triplets: int = 768


def train(
    folder: Path, *, device: str = "auto", seed: int = 0, budget: Budget | None = None, processes: int = 1
) -> Path:
    """Train everything in `folder` (resuming what is there) and return the model folder `folder/model`.

    `folder` also receives loss curves, sample grids and `record.json` (how the weights were made). Each process uses
    one core; a GPU takes one process.
    """
    budget = budget or Budget()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    run_workers(_train_worker, processes, folder, device, seed, budget)
    return folder / "model"


def _train_worker(folder: Path, device: str, seed: int, budget: Budget) -> None:
    ae_plan = Plan(60000, 1e-3, minutes=budget.autoencoder_minutes, warmup=400, seed=seed)
    ae = autoencoder.train(folder / "autoencoder", ae_plan, device=device, size=SIZE)
    latents = _latents(folder / "latents.pt", ae, budget.latents, seed, device)
    unet_plan = Plan(
        200000, 5e-4, minutes=budget.unet_minutes, warmup=300, seed=seed, ema=0.9985, checkpoint_every=1000
    )
    unet = diffusion.train(folder / "unet", latents, unet_plan, device=device, decode=lambda z: _decode(ae, z))
    context = diffusion.empty_context().to(device)
    model = Model("embedded", unet, ae, Schedule.from_config(SCHEDULER), context, None, None, SIZE, "", ())
    members = readout.triplets(model, budget.triplets, seed + 7)
    head_plan = Plan(3000, 5e-4, minutes=budget.readout_minutes, warmup=50, seed=seed, weight_decay=0.0)
    head = readout.train(folder / "readout", model, members, head_plan)
    if rank() == 0:
        export(folder / "model", ae, unet, head)
        atomic_write(folder / "record.json", json.dumps(_record(folder, ae, device), indent=1).encode())


def _latents(file: Path, ae: AutoencoderKL, count: int, seed: int, device: str) -> Tensor:
    """Latents of this worker's own scenes, kept beside the run so that a resumed one does not encode again."""
    file = file.with_stem(f"{file.stem}-{rank()}")
    if not file.exists():
        torch.save(diffusion.encode_scenes(ae, count, SIZE, seed + 1000 + rank(), device=device), file)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def _decode(ae: AutoencoderKL, latents: Tensor) -> Tensor:
    return ae.decode(latents / ae.config.scaling_factor).sample.cpu()


def export(folder: Path, ae: AutoencoderKL, unet: UNet2DConditionModel, head: Any) -> None:
    """Write the model as a diffusers folder in float16, with the head, the empty-prompt embedding and `model.json`."""
    ae.half().save_pretrained(folder / "vae")
    unet.half().save_pretrained(folder / "unet")
    save_readout(head.half(), folder / "readout.safetensors")
    atomic_write(folder / "empty_embedding.safetensors", embedding_bytes(diffusion.empty_context()))
    (folder / "scheduler").mkdir(exist_ok=True)
    atomic_write(folder / "scheduler" / "scheduler_config.json", json.dumps(SCHEDULER, indent=1).encode())
    atomic_write(folder / "model.json", json.dumps({"size": SIZE}).encode())
    for module in (ae, unet, head):
        module.float()


def _record(folder: Path, ae: AutoencoderKL, device: str) -> dict[str, Any]:
    """How the weights were made: hardware, reconstruction quality, and each part's plan, last losses and seconds."""
    held_out = data.scenes(np.random.default_rng(10**6), 64, SIZE).to(device)
    parts = {
        name: json.loads((folder / name / "curve.json").read_text()) for name in ("autoencoder", "unet", "readout")
    }
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "reconstruction_psnr_db": round(autoencoder.psnr(ae, held_out), 2),
        **{name: {"plan": part["plan"], **part["curve"][-1]} for name, part in parts.items()},
    }
