"""Fuse a LoRA into the UNet's weights, W += scale * up @ down, whichever of the common layouts its keys have.

Fused once per model, the skinny side branches (128 pairs for SD 1.5) cost nothing in a pass. Every tensor of
the file must land on a weight of the UNet: what is not understood is named in a `ModelError`, never skipped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddengine.errors import ModelError
from ddengine.models.files import is_pickle, read_json, read_tensors, refuse_pickle

if TYPE_CHECKING:
    from torch import Tensor, nn

_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.alpha": "alpha",
    "alpha": "alpha",
}
_PREFIX = re.compile(r"(base_model\.model\.|unet\.)*")  # some writers double it: unet.unet.
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down\.weight|up\.weight|alpha)\Z")
_REMEDY = (
    "use a LoRA of this UNet alone: factors of its linear and convolution layers, in peft's, diffusers' or kohya's keys"
)


@dataclass
class _Factors:
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: Tensor | None = None


def find_lora(path: str | Path) -> Path:
    """The LoRA file a path stands for: the file itself or the one in its folder; safetensors only."""
    path = Path(path).expanduser()
    if path.is_dir():
        names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
        known = [path / name for name in names if (path / name).is_file()]
        files = known or sorted(path.glob("*.safetensors"))
        if len(files) > 1:
            raise ModelError(f"{path}: holds {len(files)} LoRA files; name one: {', '.join(f.name for f in files[:4])}")
        if files:
            return files[0]
        pickles = sorted(p for p in path.iterdir() if is_pickle(p))
        if not pickles:
            raise ModelError(f"{path}: no .safetensors LoRA file in this folder; give the file itself")
        path = pickles[0]
    loaded = f"torch.load('{path.name}', weights_only=True)"
    convert = f"`safetensors.torch.save_file({loaded}, '{path.stem}.safetensors')`"
    refuse_pickle(path, f"if you trust where it came from, convert it once: {convert}")
    if not path.is_file():
        raise ModelError(f"LoRA {str(path)!r}: no such file or folder; check the path")
    return path


def fuse_lora(unet: nn.Module, file: Path, scale: float = 1.0) -> int:
    """Add a LoRA file to the UNet's weights in place, computed in float32; returns how many layers changed.

    Per layer: W += scale * (alpha / rank) * up @ down, alpha from the file's tensors or its metadata, else
    the rank. All pairs are checked before the first weight is touched.
    """
    tensors, metadata = read_tensors(file)
    deltas = lora_deltas(unet, tensors, metadata, file)
    add_deltas(unet, deltas, scale)
    return len(deltas)


def lora_deltas(unet: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, str], file: Path) -> dict[str, Tensor]:
    """What a LoRA's tensors add to the weight of each layer, float32; `file` is where they came from, for messages."""
    modules = dict(unet.named_modules())
    pairs = _pairs(file, tensors, modules)
    alphas = _alphas(file, metadata)
    return {name: _delta(file, name, modules[name], factors, alphas) for name, factors in pairs.items()}


def add_deltas(unet: nn.Module, deltas: dict[str, Tensor], scale: float = 1.0) -> None:
    """Add `scale` times `lora_deltas` to the UNet's weights in place."""
    import torch

    modules = dict(unet.named_modules())
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = modules[name].weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(weight.to(torch.float32) + scale * delta.to(weight.device))


def _pairs(file: Path, tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, _Factors]:
    """Group a file's tensors by the layer they change."""
    kohya = {name.replace(".", "_"): name for name in modules}
    pairs: dict[str, _Factors] = {}
    unmatched = []
    for key, tensor in tensors.items():
        name, part = _split(key, kohya)
        if name.endswith(".to_out"):  # a list of the linear layer and a dropout
            name += ".0"
        weight = getattr(modules.get(name), "weight", None)
        if part is None or weight is None or weight.dim() not in (2, 4):
            unmatched.append(key)
            continue
        factors = pairs.setdefault(name, _Factors())
        if getattr(factors, part) is not None:
            raise ModelError(f"{file}: {key} is a second {part} for the layer {name}; keep one")
        setattr(factors, part, tensor)
    if unmatched:
        more = f" and {len(unmatched) - 4} more" if len(unmatched) > 4 else ""
        of_text = any(key.startswith(("text_encoder", "lora_te")) for key in unmatched)
        text = "; LoRA on the text encoder is not supported" if of_text else ""
        raise ModelError(f"{file}: no layer of this UNet for {', '.join(unmatched[:4])}{more}{text}; {_REMEDY}")
    if not pairs:
        raise ModelError(f"{file}: holds no tensors; {_REMEDY}")
    return pairs


def _split(key: str, kohya: dict[str, str]) -> tuple[str, str | None]:
    """(layer path in the UNet, "down" | "up" | "alpha" | None) of a key."""
    if key.startswith("lora_unet_"):
        name, _, leaf = key[len("lora_unet_") :].partition(".")
        return kohya.get(name, name), _PARTS.get(leaf)
    prefix = _PREFIX.match(key)
    key = key[prefix.end() if prefix else 0 :]
    if match := _PROCESSOR.match(key):
        return f"{match[1]}.{match[2]}", _PARTS[f"lora.{match[3]}"]
    for leaf in sorted(_PARTS, key=len, reverse=True):
        if key.endswith("." + leaf):
            return key[: -len(leaf) - 1], _PARTS[leaf]
    return key, None


def _alphas(file: Path, metadata: dict[str, str]) -> dict[str, float]:
    """Alpha by layer pattern ("" for all) from diffusers' file metadata or peft's adapter_config.json."""
    config = {}
    if "lora_adapter_metadata" in metadata:
        try:
            config = json.loads(metadata["lora_adapter_metadata"])
        except ValueError as error:
            raise ModelError(
                f"{file}: its lora_adapter_metadata is not JSON ({error}); fetch the file again"
            ) from error
    elif file.name == "adapter_model.safetensors" and (file.parent / "adapter_config.json").is_file():
        config = read_json(file.parent / "adapter_config.json")
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    for unsupported in ("use_dora", "use_rslora"):
        if config.get(unsupported):
            raise ModelError(f"{file}: {unsupported} is on; only plain LoRA can be fused; {_REMEDY}")
    alphas = {str(name): float(value) for name, value in (config.get("alpha_pattern") or {}).items()}
    if config.get("lora_alpha") is not None:
        alphas[""] = float(config["lora_alpha"])
    return alphas


def _delta(file: Path, name: str, module: nn.Module, factors: _Factors, alphas: dict[str, float]) -> Tensor:
    """What one layer's weight gains before the user's scale, float32 in the weight's shape."""
    import torch

    if factors.down is None or factors.up is None:
        half = "up" if factors.down is None else "down"
        raise ModelError(f"{file}: {name} has only its {half} factor; fetch the whole file again")
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    down, up = factors.down.to(torch.float32), factors.up.to(torch.float32)
    rank = up.shape[1] if up.dim() in (2, 4) and down.dim() in (2, 4) else 0
    # a convolution's up factor is 1 x 1; its down factor has the kernel
    if (
        rank == 0
        or up.numel() != weight.shape[0] * rank
        or up.shape[0] != weight.shape[0]
        or down.shape[0] != rank
        or down.numel() != rank * weight[0].numel()
    ):
        raise ModelError(
            f"{file}: {name} has weight {list(weight.shape)}, its LoRA factors are down {list(down.shape)} "
            f"and up {list(up.shape)}; the LoRA was made for another model"
        )
    if factors.alpha is not None:
        alpha = float(factors.alpha)
    else:
        own = [
            value for pattern, value in alphas.items() if pattern and (name == pattern or name.endswith("." + pattern))
        ]
        alpha = own[0] if own else alphas.get("", float(rank))
    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (alpha / rank)
    if not torch.isfinite(delta).all():
        raise ModelError(f"{file}: the LoRA factors of {name} are not finite; use another LoRA or another save of it")
    return delta
