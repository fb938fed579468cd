"""The readout head against the published network's tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ddengine.directdrag.readout import readout_loss
from ddengine.models.readout import ReadoutHead

DIMS = [48] * 6 + [32] * 3 + [16] * 3


@pytest.fixture(scope="module")
def head(golden: Path) -> ReadoutHead:
    head = ReadoutHead(DIMS, 64, projection=128)
    head.load_state_dict(load_file(golden / "tiny-readout-appearance.safetensors"), strict=True)
    return head.requires_grad_(False)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


def test_golden_aggregation(golden: Path, head: ReadoutHead) -> None:
    stored = {key: torch.from_numpy(value) for key, value in np.load(golden / "units" / "aggregation.npz").items()}
    taps = stored["feats_bchw"].split(DIMS, dim=1)
    assert close(head(taps, stored["emb"], (16, 16)), stored["out"])
    assert close(head(taps, None, (16, 16)), stored["out_no_emb"])


def test_golden_loss_and_gradient(golden: Path, head: ReadoutHead) -> None:
    stored = {key: torch.as_tensor(value) for key, value in np.load(golden / "units" / "readout_loss.npz").items()}
    features = stored["feats_bhwc"].permute(0, 3, 1, 2)
    observed, reference = features[1:].clone().requires_grad_(), features[:1]
    latent_range = stored["latents_min_max"][1] - stored["latents_min_max"][0]
    maps = [head(x.split(DIMS, dim=1), stored["emb"], (12, 12)) for x in (observed, reference)]
    loss = readout_loss(*maps, latent_range, "cosine_range2")
    assert float(loss.detach()) == pytest.approx(float(stored["loss_guidance"]), rel=2e-5)
    (gradient,) = torch.autograd.grad(loss, observed)
    assert close(gradient.permute(0, 2, 3, 1), stored["grad_feats"])

    seen, truth = (stored[f"appearance_{name}"].permute(0, 3, 1, 2).clone() for name in ("obs", "gt"))
    alone = readout_loss(seen.requires_grad_(), truth, latent_range, "cosine_range2")
    assert float(alone.detach()) == pytest.approx(float(stored["loss_appearance"]), rel=2e-5)
    assert close(torch.autograd.grad(alone, seen)[0].permute(0, 2, 3, 1), stored["grad_obs"])


def test_taps_are_resized_to_the_grid(head: ReadoutHead) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3)] * 3 + [(4, 6)] * 3 + [(8, 12)] * 3 + [(16, 24)] * 3
    taps = [torch.randn(1, dim, *size, generator=generator) for dim, size in zip(DIMS, sizes, strict=True)]
    embedding = torch.randn(1, 64, generator=generator)
    resized = [F.interpolate(tap, (16, 24), mode="bilinear", align_corners=False) for tap in taps]
    assert torch.allclose(head(taps, embedding, (16, 24)), head(resized, embedding, (16, 24)), atol=1e-5)
    with pytest.raises(ValueError, match="argument"):
        head(taps[:-1], embedding, (16, 24))


def test_parameters_are_named_and_counted_like_the_published_ones() -> None:
    with torch.device("meta"):
        full = ReadoutHead([1280] * 6 + [640] * 3 + [320] * 3, 1280)
        plain = ReadoutHead([1280] * 6 + [640] * 3 + [320] * 3, None)
    assert sum(parameter.numel() for parameter in full.parameters()) == 8_005_260
    assert sum(parameter.numel() for parameter in plain.parameters()) == 6_529_548
    assert len(full.state_dict()) == 169
    assert full.state_dict()["bottleneck_layers.7.conv3.weight"].shape == (384, 96, 1, 1)
