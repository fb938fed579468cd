"""GoodDrag (zewei-Zhang/GoodDrag), with the settings of its benchmark script.

Written against its commit fc01bc1 and diffusers 0.20.0, which it asks for; 0.42 runs it too, but for its LoRA. The
script also denoises and writes a picture after every drag step; that is left out here, in its favour.
"""

from __future__ import annotations

import importlib
from typing import Any

FIRST = ("safetensors.torch", "accelerate", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
NAME = "GoodDrag"
NEEDS = {"mask": "where the picture may change", "lora": "70 steps a picture in its script"}
PUBLISHED: dict[str, Any] = {
    "inversion_strength": 0.75, "lam": 0.1, "latent_lr": 0.02, "r1": 4, "r2": 12, "d": 4, "drag_end_step": 7,
    "track_per_step": 10, "max_drag_per_track": 3, "max_track_no_change": 5, "drag_loss_threshold": 0,
    "once_drag": False, "compare_mode": False,
}  # fmt: skip
LORA = {"lora_step": 70, "lora_lr": 0.0005, "lora_batch_size": 4, "lora_rank": 16}
UPDATES = ("drag_end_step", "track_per_step", "max_drag_per_track")

_kept: dict[str, Any] = {}


def prepare(host: Any) -> None:
    host.stand_in("gradio", always=True)
    host.stand_in("pytorch_lightning", "torchvision.utils", "torchvision.transforms")
    pipeline = importlib.import_module("pipeline")
    interface = importlib.import_module("utils.ui_utils")
    for name, stage in {
        "__init__": "load", "invert": "invert", "image2latent": "encode", "get_original_features": "reference",
        "gooddrag_step": "drag", "good_drag": "denoise", "latent2image": "decode",
    }.items():  # fmt: skip
        host.time(pipeline.GoodDragger, name, stage)
    host.count_passes(importlib.import_module("diffusers").UNet2DConditionModel)
    host.count(importlib.import_module("torch").optim.Adam, "step", "updates")
    updates = dict(zip(UPDATES, host.updates(*(PUBLISHED[name] for name in UPDATES)), strict=True))
    _kept.update(interface=interface, settings=host.publish(**{**PUBLISHED, **updates}))


def train_lora(host: Any) -> None:
    settings = {**LORA, **({"lora_step": host.job["lora_steps"]} if host.job["lora_steps"] else {})}
    _kept["interface"].train_lora_interface(
        original_image=host.picture(), prompt=host.job["prompt"], model_path="weights", vae_path="default",
        lora_path="lora", use_gradio_progress=False, **settings,
    )  # fmt: skip
    _kept["lora"] = "lora"


def edit(host: Any) -> Any:
    edited, _ = _kept["interface"].run_gooddrag(
        source_image=host.picture(), image_with_clicks=None, mask=host.mask(), prompt=host.job["prompt"],
        points=host.points(), model_path="weights", vae_path="default", lora_path=_kept.get("lora", ""),
        return_intermediate_images=False, **_kept["settings"],
    )  # fmt: skip
    return edited
