"""What a model must look like to be edited: the Stable Diffusion 1.5 family, checked on the configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddengine.errors import ModelError

EXPECTED = (
    "ddengine edits models of the Stable Diffusion 1.5 family (four UNet levels, 4 latent channels, epsilon prediction)"
)

_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "resnet_time_scale_shift": "default",
    "attention_type": "default",
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "cross_attention_norm": None,
    "act_fn": "silu",
    "center_input_sample": False,
}
_MAX_CROSS_ATTENTION = 768  # SD 1.5; SD 2 has 1024, SDXL 2048


def check_unet(path: Path, config: dict[str, Any]) -> None:
    """`ModelError` unless a UNet config (diffusers' `UNet2DConditionModel`) is of the SD 1.5 family."""
    problems = [
        f"{name} is {config[name]!r}, expected {value!r}"
        for name, value in _UNET.items()
        if name in config and config[name] != value and not (value is None and config[name] is False)
    ]
    width = config.get("cross_attention_dim")
    if not isinstance(width, int) or width > _MAX_CROSS_ATTENTION:
        known = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}.get(width) if isinstance(width, int) else None
        problems.insert(
            0,
            f"cross_attention_dim is {width!r}{f' ({known})' if known else ''}, expected at most "
            f"{_MAX_CROSS_ATTENTION}",
        )
    _report(path, config, "UNet2DConditionModel", problems)


def check_vae(path: Path, config: dict[str, Any]) -> None:
    """`ModelError` unless an autoencoder config is an RGB `AutoencoderKL`, 4 latent channels, reduction 8."""
    problems = []
    for name, default, value in (("latent_channels", 4, 4), ("in_channels", 3, 3), ("out_channels", 3, 3)):
        if config.get(name, default) != value:
            problems.append(f"{name} is {config.get(name)!r}, expected {value}")
    levels = len(config.get("block_out_channels", (64,)))
    if levels != 4:
        problems.append(f"it has {levels} levels (reduction {2 ** (levels - 1)}x), expected 4 (8x)")
    if config.get("shift_factor") or config.get("latents_mean"):
        problems.append("it shifts its latents, expected a scaling_factor alone")
    _report(path, config, "AutoencoderKL", problems)


def check_scheduler(path: Path, config: dict[str, Any]) -> None:
    """`ModelError` unless a scheduler config means 1000 training steps of epsilon prediction."""
    problems = []
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        problems.append(f"prediction_type is {prediction!r}, expected 'epsilon'")
    if config.get("num_train_timesteps", 1000) != 1000:
        problems.append(f"num_train_timesteps is {config['num_train_timesteps']!r}, expected 1000")
    if config.get("rescale_betas_zero_snr"):
        problems.append("rescale_betas_zero_snr is on, expected off")
    _report(path, config, None, problems)


def _report(path: Path, config: dict[str, Any], class_name: str | None, problems: list[str]) -> None:
    if class_name and config.get("_class_name", class_name) != class_name:
        problems.insert(0, f"it is a {config['_class_name']}, expected {class_name}")
    if problems:
        raise ModelError(f"{path}: {'; '.join(problems)}. {EXPECTED}")
