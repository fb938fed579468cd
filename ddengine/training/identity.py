"""Fit a LoRA to one picture, so that the UNet draws what is in it: the published code's optional first stage.

    loss = mean |U(z_t, t) - noise|^2,   z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise,   t uniform

Four variations of the picture are drawn and encoded once; every step samples z_0 anew from their posteriors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddengine.backends.eager import prompt_context
from ddengine.errors import BackendUnavailable, InputError
from ddengine.models.identity import LAYERS, LoRA, copy_sharing
from ddengine.models.load import Model
from ddengine.torch_state import drawing_weights
from ddengine.training.augment import augmented
from ddengine.training.diffusion import noised

if TYPE_CHECKING:
    from PIL import Image

BATCH = 4
LEARNING_RATE, BETAS, WEIGHT_DECAY = 5e-4, (0.9, 0.999), 1e-2
MOST_STEPS, MOST_RANK = 10_000, 256


def check_fit(steps: int, rank: int) -> None:
    """InputError for steps or a rank that cannot be fitted, BackendUnavailable without PEFT."""
    for name, value, most in (("steps", steps, MOST_STEPS), ("rank", rank, MOST_RANK)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise InputError(f"{name} is {value!r}; it must be a whole number from 1 to {most}")
    _peft()


def fit(
    model: Model,
    picture: Image.Image,
    *,
    prompt: str = "",
    steps: int = 70,
    rank: int = 16,
    seed: int = 0,
    compile: bool = False,
    report: Callable[[int, int], None] = lambda step, total: None,
) -> LoRA:
    """The LoRA of a picture after `steps` of AdamW, the same for the same seed; the model is left as it is.

    compile: run the UNet, forward and backward, through torch.compile. report(step, steps) after each step may raise to
    stop. Gradients must be possible (`Engine.fit_identity` sees to it). Raises as `check_fit` does; ModelError for a
    prompt without a text encoder.
    """
    check_fit(steps, rank)
    device, dtype, schedule = model.device, model.dtype, model.schedule
    context = prompt_context(model, prompt).to(device, dtype).expand(BATCH, -1, -1)
    mean, deviation = _posteriors(model, picture, np.random.default_rng(seed))
    with drawing_weights(seed):
        unet, trained = _with_adapter(model, rank)
    network = torch.compile(unet, dynamic=False) if compile else unet
    optimiser = torch.optim.AdamW(trained, LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    # A mean over thousands of latent numbers leaves gradients that float16 rounds to zero.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers wherever the model is

    losses = []
    for step in range(steps):
        spread, noise = torch.randn((2, *mean.shape), generator=generator).to(device)
        times = torch.randint(len(schedule.alphas_cumprod), (BATCH,), generator=generator).to(device)
        z = noised(mean + deviation * spread, noise, times, schedule).to(dtype)
        loss = F.mse_loss(network(z, times, context).sample.float(), noise)
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.detach())  # not read here: the device need not wait for the host
        report(step + 1, steps)

    from peft.utils import get_peft_model_state_dict

    factors = {f"unet.{name}": value for name, value in sorted(get_peft_model_state_dict(unet).items())}
    weights = {name: value.detach().float().cpu().contiguous() for name, value in factors.items()}
    return LoRA(weights, rank, model.digest, losses=tuple(torch.stack(losses).tolist()))


@torch.no_grad()
def _posteriors(model: Model, picture: Image.Image, numbers: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the scaled latents of BATCH variations, each [BATCH, 4, size / 8, size / 8] float32."""
    dtype = next(model.vae.parameters()).dtype
    pictures = [augmented(picture, model.size, numbers).to(model.device, dtype) for _ in range(BATCH)]
    found = [model.vae.encode(x).latent_dist for x in pictures]  # one by one: memory for one
    scale = model.vae.config.scaling_factor
    return (
        scale * torch.cat([each.mean.float() for each in found]),
        scale * torch.cat([each.std.float() for each in found]),
    )


def _with_adapter(model: Model, rank: int) -> tuple[Any, list[Tensor]]:
    """A UNet of the model's own weights with PEFT's adapter in it, and the adapter's weights in float32."""
    unet = copy_sharing(model.unet)
    unet.add_adapter(
        _peft().LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LAYERS))
    )
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return unet, trained


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise BackendUnavailable(
            f'fitting an identity needs PEFT, which cannot be imported ({error}); pip install "ddengine[identity]"'
        ) from error
    return peft
