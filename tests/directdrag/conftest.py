"""What the method's tests share: the golden model as passes, its source picture, and a tiny model made on the spot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ddengine.backends.eager import EagerPasses
from ddengine.config import DirectDragConfig
from ddengine.directdrag.prepare import Prepared, prepare
from ddengine.models.load import Model, load_model
from ddengine.models.network import Observation
from ddengine.models.readout import ReadoutHead
from ddengine.schedule import Schedule


class RecordingPasses(EagerPasses):
    """Eager passes that keep the latents they were given."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.predicted: list[Tensor] = []
        self.supervised: list[Tensor] = []
        self.denoised: list[Tensor] = []

    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        self.predicted.append(latent.clone())
        return super().predict(latent, timestep)

    def supervise(self, latent: Tensor, timestep: int | Tensor, **options: Any) -> Observation:
        self.supervised.append(latent.detach().clone())
        return super().supervise(latent, timestep, **options)

    def denoise(self, latent: Tensor, timestep: int | Tensor, reference_kv: Any) -> Tensor:
        self.denoised.append(latent.clone())
        return super().denoise(latent, timestep, reference_kv)


@pytest.fixture(scope="session")
def golden_config() -> Callable[..., DirectDragConfig]:
    """The golden edits' settings (float32, a short schedule, a 32 x 32 readout grid), with changes."""
    short = {"amp_skip": "none", "rg_grid": 32, "drag_end_step": 2, "track_per_step": 2}
    return lambda **changes: DirectDragConfig.preset("authors", **{**short, **changes})


@pytest.fixture(scope="session")
def golden_model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    head = ReadoutHead([48] * 6 + [32] * 3 + [16] * 3, 64, projection=128)
    head.load_state_dict(load_file(golden / "tiny-readout-appearance.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = load_model(golden / "tiny-sd", device="cpu", dtype="float32")
    return dataclasses.replace(model, readout=head.requires_grad_(False).eval())


@pytest.fixture(scope="session")
def golden_image(golden: Path) -> Tensor:
    pixels = np.array(Image.open(golden / "edits" / "source_256x256_seed7.png"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="session")
def golden_prepared(
    golden_model: Model, golden_image: Tensor, golden_config: Callable[..., DirectDragConfig]
) -> Prepared:
    """The golden source picture, prepared from its pixels with all stages on."""
    return prepare(EagerPasses(golden_model), golden_image, golden_config())


@pytest.fixture
def golden_passes(golden_model: Model) -> RecordingPasses:
    return RecordingPasses(golden_model)


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Model]:
    return _tiny_model


def _tiny_model(*, readout: bool = True, layers: int = 1) -> Model:
    """Stable Diffusion 1.5's topology at a handful of channels with random weights: runs in milliseconds."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=layers,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
    )
    dims = [16] * (layers + 1) * 2 + [8] * (layers + 1) * 2
    head = ReadoutHead(dims, 32, projection=16, groups=4) if readout else None
    for module in (unet, vae, head):
        if module is not None:
            module.requires_grad_(False).eval()
    return Model(
        name="tiny",
        unet=unet,
        vae=vae,
        schedule=Schedule.from_config(),
        empty_context=torch.randn(1, 3, 8),
        readout=head,
        text=None,
        size=128,
        digest="tiny",
        notes=(),
    )


@pytest.fixture(scope="session")
def tiny_passes() -> EagerPasses:
    return EagerPasses(_tiny_model())
