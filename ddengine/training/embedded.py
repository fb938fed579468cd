"""`ddengine train-embedded`: autoencoder, UNet and readout head from drawn scenes alone, into one folder."""

from __future__ import annotations

import json
import platform
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from ddengine.artifacts import atomic_write, check_writable, make_folder
from ddengine.models.load import Model
from ddengine.models.place import resolve_device
from ddengine.models.readout_io import save_readout
from ddengine.models.text import embedding_bytes
from ddengine.schedule import Schedule
from ddengine.training import autoencoder, data, diffusion, readout
from ddengine.training.loop import Plan, rank, read_state, run_workers

SIZE = 128
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Minutes and steps of each part (what ends first) and numbers of pictures; the minutes suit two CPU cores."""

    autoencoder_minutes: float = 60
    unet_minutes: float = 110
    readout_minutes: float = 10
    autoencoder_steps: int = 60000
    unet_steps: int = 200000
    readout_steps: int = 3000
    latents: int = 16000
    triplets: int = 768

    def plans(self, seed: int) -> dict[str, Plan]:
        """How each part is trained, by the name of its folder."""
        return {
            "autoencoder": Plan(self.autoencoder_steps, 1e-3, minutes=self.autoencoder_minutes, warmup=400, seed=seed),
            "unet": Plan(
                self.unet_steps,
                5e-4,
                minutes=self.unet_minutes,
                warmup=300,
                seed=seed,
                ema=0.9985,
                checkpoint_every=1000,
            ),
            "readout": readout.head_plan(self.readout_minutes, seed, self.readout_steps),
        }


def train(
    folder: Path,
    *,
    device: str = "auto",
    seed: int = 0,
    budget: Budget | None = None,
    processes: int = 1,
    progress: bool = False,
) -> Path:
    """Train everything in `folder` (resuming what is there) and return the model folder `folder/model`.

    `folder` also receives loss curves, sample grids and `record.json` (how the weights were made). Each process uses
    one core; a GPU takes one process. Raises InputError for an unknown device, a folder that cannot be written to, or
    one with a run of another seed or plan.
    """
    budget = budget or Budget()
    device = str(resolve_device(device))
    check_writable(make_folder(folder) / "record.json")
    for name, plan in budget.plans(seed).items():
        read_state(folder / name, plan)  # refuse here: an error in a worker reaches the caller as a traceback
    run_workers(_train_worker, processes, folder, device, seed, budget, progress)
    return folder / "model"


def _train_worker(folder: Path, device: str, seed: int, budget: Budget, progress: bool) -> None:
    plans = budget.plans(seed)
    ae = autoencoder.train(folder / "autoencoder", plans["autoencoder"], device=device, size=SIZE, progress=progress)
    latents = _latents(folder / "latents.pt", ae, budget.latents, seed, device)
    unet = diffusion.train(
        folder / "unet", latents, plans["unet"], device=device, decode=lambda z: _decode(ae, z), progress=progress
    )
    context = diffusion.empty_context().to(device)
    model = Model("embedded", unet, ae, Schedule.from_config(SCHEDULER), context, None, None, SIZE, "", ())
    members = readout.triplets(model, budget.triplets, seed + 7)
    head = readout.train(folder / "readout", model, members, plans["readout"], progress=progress)
    if rank() == 0:
        export(folder / "model", ae, unet, head)
        atomic_write(folder / "record.json", json.dumps(_record(folder, ae, device, seed, budget), indent=1).encode())


def _latents(file: Path, ae: AutoencoderKL, count: int, seed: int, device: str) -> Tensor:
    """Latents of this worker's own scenes, kept beside the run so that a resumed one does not encode again."""
    file = file.with_stem(f"{file.stem}-{rank()}")
    if not file.exists():
        latents = diffusion.encode_scenes(ae, count, SIZE, seed + 1000 + rank(), device=device)
        atomic_write(file, lambda open_file: torch.save(latents, open_file))
    return torch.load(file, map_location="cpu", weights_only=True)


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


def _record(folder: Path, ae: AutoencoderKL, device: str, seed: int, budget: Budget) -> dict[str, Any]:
    """How the weights were made: command, hardware, quality, and each part's plan, last losses and seconds."""
    held_out = data.scenes(np.random.default_rng(10**6), 64, SIZE).to(device)
    parts = {
        name: json.loads((folder / name / "curve.json").read_text()) for name in ("autoencoder", "unet", "readout")
    }
    processes = dist.get_world_size() if dist.is_initialized() else 1
    minutes = (budget.autoencoder_minutes, budget.unet_minutes, budget.readout_minutes)
    command = ["ddengine", "train-embedded", "-o", str(folder), "--device", device, "--seed", str(seed)]
    command += ["--minutes", *(f"{m:g}" for m in minutes), "--processes", str(processes)]
    return {
        "command": shlex.join(command),
        "seconds": sum(part["curve"][-1]["seconds"] for part in parts.values()),
        "hardware": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "processes": processes,
        "budget": asdict(budget),
        "reconstruction_psnr_db": round(autoencoder.psnr(ae, held_out), 2),
        **{name: {"plan": part["plan"], **part["curve"][-1]} for name, part in parts.items()},
    }
