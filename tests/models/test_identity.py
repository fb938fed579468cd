"""A saved identity: whole through its file, the same to us and to diffusers, and for one model only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddengine.errors import InputError, ModelError
from ddengine.models.identity import LAYERS, LoRA, copy_sharing
from ddengine.models.load import Model, load_model

RANK = 3


@pytest.fixture
def model(sd15: Path) -> Model:
    return load_model(sd15, device="cpu", dtype="float32")


@pytest.fixture
def lora(model: Model) -> LoRA:
    """An identity that changes every layer it may change."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, layer in model.unet.named_modules():
        if name.endswith(LAYERS):
            out, fan_in = layer.weight.shape
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, fan_in, generator=generator) / fan_in**0.5
            weights[f"unet.{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    return LoRA(weights, RANK, model.digest, losses=(0.5, 0.25))


def noise(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    latent, context = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 12)))
    with torch.no_grad():
        return unet(latent, torch.tensor([5, 700]), context).sample


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_fused_equals_what_diffusers_makes_of_the_file(model: Model, lora: LoRA, tmp_path: Path, scale: float) -> None:
    plain, file = noise(model.unet), tmp_path / "identity.safetensors"
    fused = lora.scaled(scale).fused(model)
    lora.scaled(scale).save(file)
    parts = {"vae": model.vae, "scheduler": None, "text_encoder": None, "tokenizer": None}
    twin = UNet2DConditionModel.from_config(model.unet.config)
    twin.load_state_dict(model.unet.state_dict())
    pipeline = StableDiffusionPipeline(
        unet=twin, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pytest.importorskip("peft")
    pipeline.load_lora_weights(str(file))
    wanted = noise(pipeline.unet)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(noise(fused.unet), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(noise(model.unet), plain)  # the model itself is as it was


def test_a_file_holds_all_of_it_and_equal_ones_are_equal_bytes(model: Model, lora: LoRA, tmp_path: Path) -> None:
    half = lora.scaled(0.5)
    first, second = (half.save(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert first.read_bytes() == second.read_bytes()
    found = LoRA.load(first)
    assert (found.rank, found.base, found.scale, found.digest) == (RANK, model.digest, 0.5, half.digest)
    assert found.model_digest == half.fused(model).digest
    assert LoRA.load(tmp_path / "b.safetensors").losses == ()
    digests = {lora.digest, half.digest, model.digest, lora.model_digest, half.model_digest}
    assert len(digests) == 5
    name = next(iter(lora.weights))
    other = LoRA({**lora.weights, name: lora.weights[name] + 1e-3}, RANK, lora.base)
    assert other.digest != lora.digest
    # The same weights through the loader of any LoRA.
    loaded = load_model(model.name, device="cpu", dtype="float32", lora=first)
    for name, weight in half.fused(model).unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], weight), name


def test_another_model_is_refused(model: Model, lora: LoRA) -> None:
    stranger = LoRA(lora.weights, RANK, "0" * 64)
    with pytest.raises(ModelError, match=rf"belongs to model 000000000000, this is model {model.digest[:12]}.*; fit"):
        stranger.fused(model)
    with pytest.raises(ModelError, match="belongs to model"):
        lora.fused(lora.fused(model))  # its own fused model is another one too
    for scale in (float("nan"), float("inf"), "1", True):
        with pytest.raises(InputError, match="finite number"):
            lora.scaled(scale)  # type: ignore[arg-type]


def test_what_is_no_identity_is_refused(lora: LoRA, tmp_path: Path) -> None:
    file = tmp_path / "l.safetensors"
    with pytest.raises(ModelError, match="no such file"):
        LoRA.load(file)
    lora.save(file)
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    first = next(iter(lora.weights))
    bare: dict[str, str] = {}
    spoiled = json.dumps({**json.loads(metadata["lora_adapter_metadata"]), "unet.r": 0})
    for tensors, data, message in [
        (lora.weights, bare, r"does not say which model.*--lora"),
        (lora.weights, {"lora_adapter_metadata": "{"}, "does not say which model"),
        (lora.weights, {"lora_adapter_metadata": spoiled}, "does not say which model"),
        (
            {**lora.weights, first: torch.ones(RANK + 1, 4)},
            metadata,
            r"lora_A.weight is \[4, 4\], not .* rank 3 has; fit",
        ),
        ({**lora.weights, "unet.else": torch.ones(1)}, metadata, r"unet\.else is \[1\], not what"),
        ({}, metadata, "holds no tensors"),
    ]:
        save_file(dict(tensors), file, data)
        with pytest.raises(ModelError, match=message):
            LoRA.load(file)
    with pytest.raises(InputError, match=r"\.safetensors"):
        lora.save(tmp_path / "identity.bin")
    with pytest.raises(InputError, match="no folder"):
        lora.save(tmp_path / "nowhere" / "identity.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["l.safetensors"]


def test_the_fused_copy_owns_what_changes_and_shares_the_rest(model: Model, lora: LoRA) -> None:
    fused, ours = lora.fused(model), dict(model.unet.named_parameters())
    own = {name for name, parameter in fused.unet.named_parameters() if parameter is not ours[name]}
    assert own == {name.removeprefix("unet.").replace("lora_A.", "") for name in lora.weights if "lora_A" in name}
    assert fused.vae is model.vae and fused.digest == lora.model_digest
    assert fused.notes == (*model.notes, f"an identity of rank {RANK} is fused into {len(own)} layers")


def test_sizes_for_stable_diffusion() -> None:
    """What spec and docstrings say of SD 1.5: 128 layers, 3 188 736 weights of rank 16, 11 % of the UNet in a copy."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    layers = [name for name, _ in unet.named_modules() if name.endswith(LAYERS)]
    shapes = [unet.get_submodule(name).weight.shape for name in layers]
    assert (len(layers), sum(16 * sum(shape) for shape in shapes)) == (128, 3_188_736)
    theirs = {id(parameter) for parameter in unet.parameters()}
    own = sum(p.numel() for p in copy_sharing(unet, own=layers).parameters() if id(p) not in theirs)
    assert (own, sum(p.numel() for p in unet.parameters())) == (93_511_680, 859_520_964)
