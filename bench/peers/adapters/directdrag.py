"""The DirectDrag authors' published code (frakw/DirectDrag), with the settings of its DragBench script.

Written against its commit 1564de3 and diffusers 0.24.0, which it asks for; 0.42 runs it too, but for its LoRA. Its
readout head is hard-coded for time embeddings of 1280; another model's width is set in its place.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

FIRST = ("safetensors.torch", "accelerate", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
NAME = "DirectDrag (published code)"
NEEDS = {"readout": "appearance head", "lora": "70 steps a picture in its scripts"}
PUBLISHED: dict[str, Any] = {
    "inversion_strength": 0.75, "lam": 0.1, "latent_lr": 0.02, "r1": 4, "r2": 12, "d": 4, "drag_end_step": 7,
    "track_per_step": 10, "max_drag_per_track": 3, "max_track_no_change": 5, "drag_loss_threshold": 0,
    "once_drag": False, "compare_mode": False,
}  # fmt: skip
LORA = {"lora_step": 70, "lora_lr": 0.0005, "lora_batch_size": 4, "lora_rank": 16}
UPDATES = ("drag_end_step", "track_per_step", "max_drag_per_track")
HEAD = Path("rg_weights/readout_sdv15_drag_appearance.pt")  # where its configuration looks

_kept: dict[str, Any] = {}


def prepare(host: Any) -> None:
    host.stand_in("gradio", always=True)
    host.stand_in("bitsandbytes.optim", "IPython.display", "sklearn.decomposition", "pytorch_lightning")
    host.stand_in("fvcore.nn.weight_init", "torchvision.utils", "torchvision.transforms.functional")
    host.try_import("utils.unet_drag.unet_2d_condition")  # FastDrag's, which its settings switch off
    pipeline = importlib.import_module("pipeline")
    helpers = importlib.import_module("utils.readout_guidance.rg_helpers")
    code = host.load("directdrag.py", "directdrag")
    time_width = _write_head(host)
    block = importlib.import_module("utils.dhf.aggregation_network").BottleneckBlock
    if time_width not in (None, 1280):
        block.__init__.__defaults__ = (*block.__init__.__defaults__[:-1], time_width)
        host.note(f"time embeddings of the readout head are {time_width} wide instead of 1280")
    shutil.copyfile(host.checkout / "rg_config.yaml", "rg_config.yaml")

    dragger = pipeline.DirectDragger
    for name, stage in {
        "__init__": "load", "invert": "invert", "image2latent": "encode", "get_original_features": "reference",
        "directdrag_step": "drag", "direct_drag": "denoise", "latent2image": "decode",
    }.items():  # fmt: skip
        host.time(dragger, name, stage)
    host.time(helpers, "get_edits", "load")
    host.time(pipeline, "drag_stretch_multipoint_ratio_interp", "warp")
    host.count_passes(importlib.import_module("diffusers").UNet2DConditionModel)
    host.count(importlib.import_module("torch").optim.Adam, "step", "updates")
    updates = dict(zip(UPDATES, host.updates(*(PUBLISHED[name] for name in UPDATES)), strict=True))
    _kept.update(code=code, settings=host.publish(**{**PUBLISHED, **updates}))


def train_lora(host: Any) -> None:
    _kept["lora"] = train(host, **LORA)


def train(host: Any, **settings: Any) -> str:
    """Train what this family of peers trains, with the peer's own function; the folder it wrote."""
    host.stand_in("torchvision.transforms")
    trainer = importlib.import_module("utils.lora_utils")
    if host.job["lora_steps"]:
        settings["lora_step"] = host.job["lora_steps"]
    Path("lora").mkdir(exist_ok=True)
    trainer.train_lora(
        host.picture(), host.job["prompt"], "weights", "default", "lora", *settings.values(),
        progress=None, use_gradio_progress=False,
    )  # fmt: skip
    return "lora"


def edit(host: Any) -> Any:
    picture = host.picture()
    edited, _ = _kept["code"].run_directdrag(
        source_image=picture, image_with_clicks=None, points=host.points(), model_path="weights", vae_path="default",
        lora_path=_kept.get("lora", ""), **_kept["settings"],
    )  # fmt: skip
    return edited


def _write_head(host: Any) -> int | None:
    """The head in the layout that the published loader reads, and the width of the time embedding it takes."""
    import torch
    from safetensors import safe_open

    if not host.job["readout"]:
        raise RuntimeError("its published code does not run without a readout head: give one with --readout")
    with safe_open(host.job["readout"], framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    layers = len({name.split(".")[1] for name in tensors if name.startswith("bottleneck_layers.")})
    first = [tensors[f"bottleneck_layers.{layer}.shortcut.weight"] for layer in range(layers)]
    config = {
        "projection_dim": first[0].shape[0], "dims": [weight.shape[1] for weight in first], "save_timestep": [0],
        "num_timesteps": 1000, "aggregation_kwargs": {"bottleneck_sequential": False}, **config,
    }  # fmt: skip
    HEAD.parent.mkdir(exist_ok=True)
    torch.save({"config": config, "aggregation_network": tensors}, HEAD)
    time = tensors.get("bottleneck_layers.0.emb_layers.weight")
    return None if time is None else int(time.shape[1])
