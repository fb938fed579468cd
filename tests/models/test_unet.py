"""The explicit walk of the UNet against the published code's tensors and against diffusers' own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ddengine.models.unet import attention, cross_key_values, time_embedding, unet_forward


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**config, **changes}).requires_grad_(False).eval()


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def golden_unet(golden: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(golden / "tiny-sd" / "unet").requires_grad_(False).eval()


def close(found: Tensor | None, expected: Any, tolerance: float) -> bool:
    expected = torch.as_tensor(expected)
    return found is not None and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def test_golden_forward(golden: Path, golden_unet: UNet2DConditionModel) -> None:
    stored = np.load(golden / "units" / "unet_forward.npz")
    latent, context = torch.from_numpy(stored["latent"]), torch.from_numpy(stored["text_emb"])
    for block in range(4):
        out = unet_forward(golden_unet, latent, int(stored["timestep"]), context, feature_block=block, taps=True)
        assert close(out.feature, stored[f"intermediate{block + 1}"], 1e-5)
    assert close(out.noise, stored["eps"], 1e-5)
    embedding = time_embedding(golden_unet, int(stored["timestep"]), latent)
    assert close(embedding, stored["time_emb"], 1e-5)
    assert len(out.taps) == 12 and out.kv == ()
    for layer, tap in enumerate(out.taps):
        assert close(tap, stored[f"readout_hidden{layer}"], 1e-5)


def test_golden_gradients(golden: Path, golden_unet: UNet2DConditionModel) -> None:
    stored = np.load(golden / "units" / "unet_vjp.npz")
    context = torch.from_numpy(np.load(golden / "units" / "unet_forward.npz")["text_emb"])
    latent = torch.from_numpy(stored["latent"]).requires_grad_()
    out = unet_forward(golden_unet, latent, int(stored["timestep"]), context)
    for tensor, name in ((out.noise, "eps"), (out.feature, "feature3")):
        cotangent = torch.from_numpy(stored[f"cot_{name}"])
        (gradient,) = torch.autograd.grad((tensor * cotangent).sum(), latent, retain_graph=True)
        assert close(gradient, stored[f"grad_from_{name}"], 2e-5)


def test_golden_mutual_self_attention(golden: Path, golden_unet: UNet2DConditionModel) -> None:
    stored = np.load(golden / "units" / "masactrl_unet.npz")
    context = torch.from_numpy(np.load(golden / "units" / "unet_forward.npz")["text_emb"])
    (source, target), t = torch.from_numpy(stored["latents"]).split(1), int(stored["timestep"])
    reference = unet_forward(golden_unet, source, t, context, kv=True)
    assert len(reference.kv) == 6
    assert close(reference.noise, stored["eps_mutual"][:1], 1e-5)
    mutual = unet_forward(golden_unet, target, t, context, reference_kv=reference.kv)
    assert close(mutual.noise, stored["eps_mutual"][1:], 1e-5)
    assert close(unet_forward(golden_unet, torch.cat([source, target]), t, context).noise, stored["eps_plain"], 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 2, "attention_head_dim": 4},
        {"block_out_channels": (8, 8, 8, 12), "use_linear_projection": True},
        {"attention_head_dim": (1, 2, 2, 4)},
        {"transformer_layers_per_block": 2},
    ],
    ids=["one layer", "two layers", "linear projection", "heads by level", "two transformer layers"],
)
@pytest.mark.parametrize("size", [(16, 16), (9, 13)], ids=["even", "odd"])
def test_equals_diffusers_own_forward(changes: dict[str, Any], size: tuple[int, int]) -> None:
    unet = tiny_unet(**changes).double()
    latent, context = random(2, 4, *size), random(1, 5, 12)
    expected = unet(latent, 321, encoder_hidden_states=context.expand(2, -1, -1)).sample
    for timestep in (321, torch.tensor(321), torch.tensor([321])):
        assert torch.allclose(unet_forward(unet, latent, timestep, context).noise, expected, atol=1e-12)


def test_what_is_not_asked_for_is_not_made() -> None:
    unet, latent, context = tiny_unet(), random(1, 4, 8, 8).float(), random(1, 5, 12).float()
    whole = unet_forward(unet, latent, 5, context, taps=True, kv=True)
    assert len(whole.taps) == 8 and [key.shape[1] for key, _ in whole.kv] == [16, 16, 64, 64]
    bare = unet_forward(unet, latent, 5, context, noise=False)
    assert bare.noise is None and bare.taps == bare.kv == ()
    assert torch.equal(bare.feature, whole.feature)


def test_own_keys_and_values_change_nothing() -> None:
    unet, latent, context = tiny_unet().double(), random(1, 4, 8, 8), random(1, 5, 12)
    plain = unet_forward(unet, latent, 5, context, kv=True)
    mutual = unet_forward(unet, latent, 5, context, reference_kv=plain.kv)
    assert torch.equal(mutual.noise, plain.noise)
    other = unet_forward(unet, latent + 1, 5, context, reference_kv=plain.kv)
    assert not torch.allclose(other.noise, unet_forward(unet, latent + 1, 5, context).noise)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_conditioning_may_be_made_keys_and_values_beforehand(layers: int) -> None:
    unet, latent, context = tiny_unet(transformer_layers_per_block=layers), random(2, 4, 8, 8), random(1, 5, 12)
    pairs = cross_key_values(unet.double(), context)
    assert torch.equal(unet_forward(unet, latent, 5, pairs).noise, unet_forward(unet, latent, 5, context).noise)
    early = unet_forward(unet, latent, 5, pairs, noise=False, feature_block=1).feature
    assert torch.equal(early, unet_forward(unet, latent, 5, context, feature_block=1).feature)


@pytest.mark.parametrize("layer", ["layer0_cross0", "layer20_cross0", "layer21_cross1"])
def test_golden_attention(golden: Path, layer: str) -> None:
    """Plain, mutual (both rows read the first row's keys and values) and cross-attention, heads to channels."""
    stored = {key: torch.from_numpy(value) for key, value in np.load(golden / "units" / "mutual_attention.npz").items()}

    class Block:
        heads = 4
        to_q = to_out = staticmethod(lambda x: x)

    Block.to_out = [Block.to_q]
    names = ("q", "k_cross", "v_cross") if layer.endswith("1") else ("q", "k", "v")
    query, key, value = (stored[name].transpose(1, 2).flatten(2) for name in names)
    if layer == "layer20_cross0":
        key, value = key[:1], value[:1]
    assert (attention(Block, query, key, value) - stored[layer]).abs().max() < 3e-6


def test_the_walk_is_one_graph() -> None:
    """Compiled in full, without a graph break, and exportable: what later backends need."""
    unet, latent, context = tiny_unet(), random(1, 4, 8, 8).float(), random(1, 5, 12).float()
    time = torch.tensor([5])

    class Walk(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Any:
            out = unet_forward(self.unet, x, t, c, taps=True, kv=True)
            return out.noise, out.feature, out.taps, out.kv

    walk = Walk()
    expected = walk(latent, time, context)[0]
    compiled = torch.compile(walk, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(latent, time, context)[0], expected, atol=1e-6)
    pairs = cross_key_values(unet, context)
    constant = torch.compile(lambda x, t, given: unet_forward(unet, x, t, given).noise, fullgraph=True, backend="eager")
    assert torch.allclose(constant(latent, time, pairs), expected, atol=1e-6)
    kv = walk(latent + 1, time, context)[3]
    mutual = torch.compile(
        lambda x, pairs: unet_forward(unet, x, time, context, reference_kv=pairs).noise, fullgraph=True, backend="eager"
    )
    assert torch.allclose(mutual(latent, kv), unet_forward(unet, latent, 5, context, reference_kv=kv).noise, atol=1e-6)
    exported = torch.export.export(walk, (latent, time, context))
    assert torch.allclose(exported.module()(latent, time, context)[0], expected, atol=1e-6)
