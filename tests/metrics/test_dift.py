"""DIFT's features on a tiny model of the same architecture, against diffusers' own forward, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddengine.drags import Drag
from ddengine.errors import ModelError
from ddengine.metrics.dift import BLOCK, ENSEMBLE, SEED, TIME, Dift
from ddengine.metrics.matching import distances


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def dift(sd15: Path) -> Dift:
    # As Stable Diffusion 2.1 has it: what the model predicts plays no part here.
    edit_json(sd15 / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    return Dift.load(sd15)


def picture(width: int = 72, height: int = 64) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(4)) * 2 - 1


def published(dift: Dift, image: Tensor, generator: torch.Generator) -> Tensor:
    """The published form: eight times through the autoencoder, diffusers' scheduler and UNet, a hook."""
    posterior = dift.vae.encode(image.repeat(ENSEMBLE, 1, 1, 1)).latent_dist
    latents = posterior.sample(generator) * dift.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = scheduler.add_noise(latents, noise, torch.tensor(TIME))
    seen = []
    hook = dift.unet.up_blocks[BLOCK].register_forward_hook(lambda module, inputs, output: seen.append(output))
    dift.unet(noisy, TIME, encoder_hidden_states=dift.text.encode("a cat").repeat(ENSEMBLE, 1, 1))
    hook.remove()
    return seen[0].mean(0, keepdim=True)


@torch.no_grad()
def test_the_published_form(dift: Dift) -> None:
    generator = torch.Generator().manual_seed(SEED)
    image, other = picture(), picture().flip(3)
    expected = [published(dift, each, generator) for each in (image, other)]
    found = dift.pair(image, other, "a cat", rows=3)
    assert (TIME, BLOCK, ENSEMBLE, SEED) == (261, 1, 8, 42)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape == (1, 24, 4, 5)  # a sixteenth of 72 x 64, each side rounded up
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert not torch.equal(found[0], dift.pair(image, other, "a taco")[0])  # the prompt conditions


def test_a_value_depends_on_its_pair_alone(dift: Dift) -> None:
    image, other = picture(64, 64), picture(64, 64).roll(16, 3)
    first = dift.pair(image, other, "")
    dift.pair(other, other, "")
    again = dift.pair(image, other, "")
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], dift.pair(image, image, "")[1])  # original and result have noise of their own
    assert all(0 <= value < 91 for value in distances(*first, [Drag((20, 20), (36, 20))], (64, 64)))


def test_another_model_is_called_one(sd15: Path, dift: Dift) -> None:
    assert len(dift.notes) == 1 and "is not Stable Diffusion 2.1" in dift.notes[0]


def test_what_is_missing_or_does_not_fit_is_named(sd15: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        Dift.load(tmp_path)
    (sd15 / "unet" / "config.json").rename(sd15 / "kept.json")
    with pytest.raises(ModelError, match=r"unet/config\.json: not found"):
        Dift.load(sd15)
    (sd15 / "kept.json").rename(sd15 / "unet" / "config.json")
    edit_json(sd15 / "unet" / "config.json", cross_attention_dim=1024)  # the width is Stable Diffusion 2's, allowed
    with pytest.raises(ModelError, match="12 channels, the UNet's cross_attention_dim is 1024"):
        Dift.load(sd15)
    edit_json(sd15 / "unet" / "config.json", cross_attention_dim=12)
    (sd15 / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors: not found"):
        Dift.load(sd15)
