"""The network with its constants folded: the same numbers as the UNet and the head that it was made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from ddengine.models.network import Network
from ddengine.models.readout import ReadoutHead
from ddengine.models.readout_io import tap_dims
from ddengine.models.unet import cross_key_values, time_embedding, unet_forward


@pytest.fixture(scope="module")
def parts() -> tuple[UNet2DConditionModel, ReadoutHead, torch.Tensor]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    head = ReadoutHead(*tap_dims(unet), projection=16, groups=4)
    for module in (unet, head):
        module.double().requires_grad_(False).eval()
    return unet, head, torch.randn(1, 5, 8, dtype=torch.float64)


@pytest.mark.parametrize("timestep", [0, 741, 999, torch.tensor(21), torch.tensor([999])])
def test_folding_changes_no_number(parts, timestep) -> None:
    unet, head, context = parts
    network, latent = Network(unet, head, context, 1000), torch.randn(2, 4, 8, 12, dtype=torch.float64)
    plain = unet_forward(unet, latent, timestep, context, taps=True, kv=True)
    out = network(latent, timestep, kv=True, readout_hw=(8, 12), readout_times=[timestep, 1])
    pairs = [*zip(plain.kv, out.kv, strict=True)]
    assert torch.allclose(out.noise, plain.noise, atol=1e-12) and torch.allclose(out.feature, plain.feature, atol=1e-12)
    assert pairs and all(
        torch.allclose(a, b, atol=1e-12) for one, other in pairs for a, b in zip(one, other, strict=True)
    )
    for told, found in zip((timestep, 1), out.appearance, strict=True):
        wanted = head(plain.taps, time_embedding(unet, told, latent), (8, 12))
        assert torch.allclose(found, wanted, atol=1e-12)


def test_another_prompt_may_come_as_keys_and_values(parts) -> None:
    unet, head, context = parts
    latent, other = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 3, 8, dtype=torch.float64)
    found = Network(unet, head, context, 10)(latent, 7, cross_kv=cross_key_values(unet, other)).noise
    assert torch.allclose(found, unet_forward(unet, latent, 7, other).noise, atol=1e-12)
    assert not torch.allclose(found, unet_forward(unet, latent, 7, context).noise)


def test_nothing_is_computed_that_the_constants_hold(parts) -> None:
    """No layer that reads the prompt or the time runs, and the shared weights are not copied."""
    unet, head, context = parts
    network, ran = Network(unet, head, context, 1000), []
    folded = ("attn2.to_k", "attn2.to_v", "time_emb_proj", "time_embedding", "time_proj", "emb_layers")
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for part in (unet, head)
        for name, module in part.named_modules()
        if isinstance(module, nn.Module) and name.endswith(folded)
    ]
    network(torch.randn(1, 4, 8, 8, dtype=torch.float64), 5, kv=True, readout_hw=(8, 8))
    for hook in hooks:
        hook.remove()
    assert hooks and not ran
    assert network.unet is unet and not network.state_dict().keys() - {f"unet.{k}" for k in unet.state_dict()} - {
        f"head.{k}" for k in head.state_dict()
    }


def test_the_head_convolves_on_the_smaller_map(parts) -> None:
    """Resizing and 1x1 convolutions commute: a tap below the grid's size is convolved first, one above it resized."""
    _, head, _ = parts
    taps = [torch.randn(1, dim, 4, 4, dtype=torch.float64) for dim in head.dims]
    embedding, sides = torch.randn(1, head.time_dim, dtype=torch.float64), []
    hook = head.bottleneck_layers[0].conv1.register_forward_hook(
        lambda _, inputs, __: sides.append(inputs[0].shape[-1])
    )
    for side in (16, 2):
        resized = [F.interpolate(tap, (side, side), mode="bilinear", align_corners=False) for tap in taps]
        found, wanted = (head(given, embedding, (side, side)) for given in (taps, resized))
        assert torch.allclose(found, wanted, atol=1e-12)
    hook.remove()
    assert sides == [4, 16, 2, 2]
