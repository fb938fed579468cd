"""LoRA: fused weights act as the side branches do, in every key layout, and nothing is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from ddengine.errors import ModelError
from ddengine.models.load import load_model
from ddengine.models.lora import find_lora, fuse_lora

Factors = dict[str, tuple[Tensor, Tensor]]
RANK = 3


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=2,
    ).requires_grad_(False)


@pytest.fixture
def factors(unet: Any) -> Factors:
    """Random (down, up) for every projection of every attention."""
    return random_factors(unet, ("to_q", "to_k", "to_v", "to_out.0"))


def random_factors(unet: Any, names: tuple[str, ...]) -> Factors:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, module in unet.named_modules():
        if name.endswith(tuple(f".{end}" for end in names)):
            out, fan_in, *kernel = module.weight.shape
            down = torch.randn(RANK, fan_in, *kernel, generator=generator) / fan_in**0.5
            up = torch.randn(out, RANK, *[1 for _ in kernel], generator=generator)
            found[name] = (down, up)
    assert found
    return found


def noise(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 5, 6, generator=generator)
    with torch.no_grad():
        return unet(latent, 321, context).sample


def with_side_branches(unet: Any, factors: Factors, scale: float) -> Tensor:
    """The UNet's output with every LoRA as a branch beside its layer, the definition fusing is held to."""
    modules = dict(unet.named_modules())
    handles = []
    for name, (down, up) in factors.items():

        def branch(module: Any, args: Any, out: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            if down.dim() == 2:
                return out + scale * (args[0] @ down.T) @ up.T
            hidden = torch.nn.functional.conv2d(args[0], down, stride=module.stride, padding=module.padding)
            return out + scale * torch.nn.functional.conv2d(hidden, up)

        handles.append(modules[name].register_forward_hook(branch))
    try:
        return noise(unet)
    finally:
        for handle in handles:
            handle.remove()


def keyed(layout: Callable[[str], tuple[str, str]], factors: Factors) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[layout(name)[0]] = down
        tensors[layout(name)[1]] = up
    return tensors


def processor(name: str) -> str:
    path, _, leaf = name.replace("to_out.0", "to_out").rpartition(".")
    return f"{path}.processor.{leaf}_lora"


LAYOUTS: dict[str, Callable[[str], tuple[str, str]]] = {
    "peft": lambda n: (f"unet.{n}.lora_A.weight", f"unet.{n}.lora_B.weight"),
    "peft adapter": lambda n: (f"base_model.model.{n}.lora_A.weight", f"base_model.model.{n}.lora_B.weight"),
    "no prefix": lambda n: (f"{n}.lora_A.weight", f"{n}.lora_B.weight"),
    "diffusers": lambda n: (f"unet.{n}.lora.down.weight", f"unet.{n}.lora.up.weight"),
    "doubled": lambda n: (f"unet.unet.{n}.lora.down.weight", f"unet.unet.{n}.lora.up.weight"),
    "to_out alone": lambda n: (
        f"unet.{n.replace('to_out.0', 'to_out')}.lora.down.weight",
        f"unet.{n.replace('to_out.0', 'to_out')}.lora.up.weight",
    ),
    "processor": lambda n: (f"unet.{processor(n)}.down.weight", f"unet.{processor(n)}.up.weight"),
    "kohya": lambda n: (
        f"lora_unet_{n.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{n.replace('.', '_')}.lora_up.weight",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_equals_the_side_branches_in_every_layout(
    unet: Any, factors: Factors, tmp_path: Path, layout: str
) -> None:
    plain, wanted = noise(unet), with_side_branches(unet, factors, 1.0)
    save_file(keyed(LAYOUTS[layout], factors), tmp_path / "lora.safetensors")
    assert fuse_lora(unet, tmp_path / "lora.safetensors") == len(factors)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(noise(unet), wanted, rtol=1e-4, atol=1e-5)


def test_convolutions_alpha_and_scale(unet: Any, tmp_path: Path) -> None:
    layers = ("conv1", "proj_in", "downsamplers.0.conv", "ff.net.0.proj", "time_emb_proj")
    factors = random_factors(unet, layers)
    wanted = with_side_branches(unet, factors, 0.5 * 6.0 / RANK)
    tensors = keyed(LAYOUTS["kohya"], factors)
    tensors |= {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(6.0) for name in factors}
    save_file(tensors, tmp_path / "lora.safetensors")
    fuse_lora(unet, tmp_path / "lora.safetensors", scale=0.5)
    torch.testing.assert_close(noise(unet), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["metadata", "adapter_config"])
def test_alpha_of_the_whole_adapter(unet: Any, factors: Factors, tmp_path: Path, where: str) -> None:
    wanted = with_side_branches(unet, factors, 1.5 / RANK)
    if where == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1.5, "unet.r": RANK})}
        save_file(keyed(LAYOUTS["peft"], factors), tmp_path / "pytorch_lora_weights.safetensors", metadata)
    else:
        save_file(keyed(LAYOUTS["peft adapter"], factors), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1.5, "r": RANK}))
    fuse_lora(unet, find_lora(tmp_path))
    torch.testing.assert_close(noise(unet), wanted, rtol=1e-4, atol=1e-5)


def test_agrees_with_diffusers_own_loading(unet: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict())
    torch.manual_seed(3)
    options = {"r": RANK, "lora_alpha": 7, "init_lora_weights": False}
    twin.add_adapter(peft.LoraConfig(**options, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv2"]))
    wanted = noise(twin)
    twin.save_lora_adapter(tmp_path)
    assert fuse_lora(unet, find_lora(tmp_path)) > 20
    torch.testing.assert_close(noise(unet), wanted, rtol=1e-4, atol=1e-5)


def spoiled(tensors: dict[str, Tensor], case: str) -> str:
    """Spoil a LoRA file's tensors; returns what the refusal must say."""
    first = next(name for name in tensors if "lora_A" in name)
    if case == "unknown layer":
        tensors["unet.down_blocks.9.attentions.0.to_q.lora_A.weight"] = torch.ones(3, 4)
        return r"no layer of this UNet for unet\.down_blocks\.9\.attentions\.0\.to_q\.lora_A\.weight"
    if case == "text encoder":
        tensors["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"] = torch.ones(3, 4)
        return r"text_encoder\.text_model.*LoRA on the text encoder is not supported"
    if case == "another method":
        tensors[first.replace("lora_A.weight", "hada_w1_a")] = torch.ones(3, 4)
        return r"no layer of this UNet for .*hada_w1_a"
    if case == "one factor":
        del tensors[first]
        return "has only its up factor"
    if case == "two layouts":
        tensors[first.replace("lora_A.weight", "lora.down.weight")] = tensors[first].clone()
        return "is a second down for the layer"
    if case == "other model":
        tensors[first] = torch.ones(RANK, 99)
        return r"down \[3, 99\] and up \[\d, 3\]; the LoRA was made for another model"
    if case == "other rank":
        tensors[first] = tensors[first][:2]
        return "the LoRA was made for another model"
    if case == "not finite":
        tensors[first] = tensors[first] * torch.inf
        return "are not finite"
    assert case == "empty"
    tensors.clear()
    return "holds no tensors"


@pytest.mark.parametrize(
    "case",
    [
        "unknown layer",
        "text encoder",
        "another method",
        "one factor",
        "two layouts",
        "other model",
        "other rank",
        "not finite",
        "empty",
    ],
)
def test_what_does_not_fit_is_named_and_leaves_the_weights_alone(
    unet: Any, factors: Factors, tmp_path: Path, case: str
) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    tensors = keyed(LAYOUTS["peft"], factors)
    message = spoiled(tensors, case)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=message):
        fuse_lora(unet, tmp_path / "lora.safetensors")
    torch.testing.assert_close(unet.state_dict(), before, rtol=0, atol=0)


def test_dora_is_refused(unet: Any, factors: Factors, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})}
    save_file(keyed(LAYOUTS["peft"], factors), tmp_path / "lora.safetensors", metadata)
    with pytest.raises(ModelError, match="use_dora is on"):
        fuse_lora(unet, tmp_path / "lora.safetensors")


def test_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors LoRA file"):
        find_lora(tmp_path)
    with pytest.raises(ModelError, match="no such file or folder"):
        find_lora(tmp_path / "nothing")
    (tmp_path / "pytorch_lora_weights.BIN").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"\.BIN: a pickle.*save_file"):
        find_lora(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"")
    assert find_lora(tmp_path) == tmp_path / "mine.safetensors"
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"2 LoRA files; name one: mine\.safetensors, other\.safetensors"):
        find_lora(tmp_path)


def test_a_model_loads_with_its_lora(sd15: Path, tmp_path: Path) -> None:
    plain = load_model(sd15, device="cpu", dtype="float32")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = plain.unet.get_submodule(name)
    down, up = torch.randn(2, 24), torch.randn(24, 2)
    file = tmp_path / "l.safetensors"
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, file)
    model = load_model(sd15, device="cpu", dtype="float32", lora=file)
    torch.testing.assert_close(model.unet.get_submodule(name).weight, layer.weight + up @ down)
    assert model.digest != plain.digest
    assert "LoRA l.safetensors is fused into 1 layers" in model.notes
