"""FastDrag (XuanjiaZ/FastDrag), with the settings of its benchmark script.

Written against its commit def3c4e and diffusers 0.24.0, whose UNet it carries a copy of. It takes a UNet distilled to
few steps from a folder of its own; here the given weights stand in its place, which costs the same. It warps the latent
once and optimises nothing, so that it has no updates.
"""

from __future__ import annotations

import importlib
from typing import Any

FIRST = ("safetensors.torch", "accelerate", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
NAME = "FastDrag"
NEEDS = {"mask": "what moves", "prompt": "what the picture shows", "weights": "a UNet distilled to few steps"}
PUBLISHED: dict[str, Any] = {
    "inversion_strength": 0.7, "n_inference_step": 10, "start_step": 0, "start_layer": 10,
    "task_cat": "continuous drag", "fill_mode": "interpolation", "use_kv_cp": "default", "use_lora_": "default",
}  # fmt: skip

_kept: dict[str, Any] = {}


def prepare(host: Any) -> None:
    host.stand_in("gradio", always=True)
    host.stand_in("pytorch_lightning", "torchvision.utils", "torchvision.transforms.functional")
    interface = importlib.import_module("utils.ui_utils")
    for name, stage in {
        "from_pretrained": "load", "invert": "invert", "image2latent": "encode", "__call__": "denoise",
        "latent2image": "decode",
    }.items():  # fmt: skip
        host.time(interface.DragPipeline, name, stage)
    host.time(interface.UNet2DConditionModel, "from_pretrained", "load")
    host.time(interface, "drag_stretch_multipoint_ratio_interp", "warp")
    host.count_passes(interface.UNet2DConditionModel)
    host.note("the given UNet in place of one distilled to few steps")
    _kept.update(interface=interface, settings=host.publish(**PUBLISHED))


def edit(host: Any) -> Any:
    return _kept["interface"].run_drag(
        host.picture(), None, host.mask(), host.job["prompt"], host.points(), model_path="weights",
        vae_path="default", lora_path="", lcm_model_path="weights", testif=1, **_kept["settings"],
    )  # fmt: skip
