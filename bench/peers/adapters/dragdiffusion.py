"""DragDiffusion (Yujun-Shi/DragDiffusion), with the settings of its benchmark script.

Written against its commit ebe659a and diffusers 0.24.0, which it asks for; 0.42 runs it too, but for its LoRA.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

FIRST = ("safetensors.torch", "accelerate", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
NAME = "DragDiffusion"
NEEDS = {"mask": "where the picture may change", "prompt": "what the picture shows", "lora": "80 steps a picture"}
PUBLISHED: dict[str, Any] = {
    "inversion_strength": 0.7, "lam": 0.1, "latent_lr": 0.01, "unet_feature_idx": 3, "n_pix_step": 80,
    "start_step": 0, "start_layer": 10,
}  # fmt: skip
LORA = {"lora_step": 80, "lora_lr": 0.0005, "lora_batch_size": 4, "lora_rank": 16}

_kept: dict[str, Any] = {}


def prepare(host: Any) -> None:
    host.stand_in("gradio", always=True)
    host.stand_in("pytorch_lightning", "torchvision.utils", "torchvision.transforms")
    script = host.load("drag_bench_evaluation/run_drag_diffusion.py", "run_drag_diffusion")
    for name, stage in {
        "from_pretrained": "load", "invert": "invert", "image2latent": "encode", "__call__": "denoise",
        "latent2image": "decode",
    }.items():  # fmt: skip
        host.time(script.DragPipeline, name, stage)
    host.time(script, "drag_diffusion_update", "drag")
    host.count_passes(importlib.import_module("diffusers").UNet2DConditionModel)
    host.count(importlib.import_module("torch").optim.Adam, "step", "updates")
    settings = dict(PUBLISHED)
    if host.job["updates"]:
        times, tracks, group = host.updates(0, 0, 0)
        settings["n_pix_step"] = times * tracks * group
    _kept.update(script=script, settings=host.publish(**settings))


def train_lora(host: Any) -> None:
    settings = {**LORA, **({"lora_step": host.job["lora_steps"]} if host.job["lora_steps"] else {})}
    shown = SimpleNamespace(tqdm=lambda steps, **_: steps)
    importlib.import_module("utils.lora_utils").train_lora(
        host.picture(), host.job["prompt"], "weights", "default", "lora", *settings.values(), shown
    )
    _kept["lora"] = "lora"


def edit(host: Any) -> Any:
    return _kept["script"].run_drag(
        host.picture(), host.mask(), host.job["prompt"], host.points(), model_path="weights", vae_path="default",
        lora_path=_kept.get("lora", ""), **_kept["settings"],
    )  # fmt: skip
