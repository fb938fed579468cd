"""Find and read weight files: safetensors only, strictly, with errors that name the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
CONVERT = (
    "pickles can run code when they are read, so ddengine does not read them; if you trust where it came "
    "from, convert it once with diffusers: `StableDiffusionPipeline.from_pretrained(FOLDER, "
    "use_safetensors=False).save_pretrained(NEW_FOLDER, safe_serialization=True)`"
)


def find_weights(folder: Path, stem: str, *, prefer_fp16: bool = False) -> Path:
    """`STEM.safetensors` or `STEM.fp16.safetensors` of a folder; a pickle or nothing is a `ModelError`."""
    names = [f"{stem}.safetensors", f"{stem}.fp16.safetensors"]
    if prefer_fp16:
        names.reverse()
    for name in names:
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(p.name for p in folder.glob("*") if is_pickle(p)) if folder.is_dir() else []
    if pickles:
        raise ModelError(f"{folder / pickles[0]}: these weights are a pickle, expected {names[0]}; {CONVERT}")
    if (folder / f"{stem}.safetensors.index.json").is_file():
        raise ModelError(f"{folder}: the weights are split into several files; save them as one {stem}.safetensors")
    raise ModelError(f"{folder / f'{stem}.safetensors'}: not found; point to a complete folder in diffusers' layout")


def is_pickle(path: Path) -> bool:
    """Whether a file's ending says pickle, in any case of letters."""
    return path.suffix.lower() in PICKLES


def refuse_pickle(path: Path, remedy: str = CONVERT) -> None:
    """`ModelError` for a file whose ending says pickle."""
    if is_pickle(path):
        raise ModelError(f"{path}: a pickle, expected a .safetensors file; {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; absent or malformed is a `ModelError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; point to a complete folder in diffusers' layout") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, expected a JSON object; fetch the file again")
    return value


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file (on the CPU, as stored) and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; check the path") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}); fetch or convert the file again") from error


def load_weights(
    module_class: Any, config: dict[str, Any], path: Path, device: torch.device, dtype: torch.dtype
) -> Any:
    """Build a diffusers module from its config and give it a file's weights: strict keys and shapes, frozen, eval.

    The module is laid out on torch's "meta" device first: nothing is allocated or randomly initialised twice.
    """
    import torch

    with torch.device("meta"):
        module = module_class.from_config(config)
    tensors, _ = read_tensors(path)
    tensors = {_current_name(name): value for name, value in tensors.items()}
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check_names(path, wanted, {name: tuple(value.shape) for name, value in tensors.items()})
    # `Tensor.to` returns the tensor itself when nothing changes, and torch's assign keeps it: copy once, so
    # that the module never shares memory with a file that somebody may replace.
    module.load_state_dict(
        {name: value.to(device=device, dtype=dtype, copy=True) for name, value in tensors.items()},
        assign=True,
    )
    return module.requires_grad_(False).eval()


def check_names(path: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """`ModelError` unless the file holds exactly the wanted tensors in the wanted shapes."""
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(found[name])}, expected {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        remedy = "take the weights and the config from one model"
        raise ModelError(f"{path}: the weights do not fit the model: {', '.join(problems[:4])}{more}; {remedy}")


def _current_name(name: str) -> str:
    # The published SD 1.5 autoencoders still carry the attention names of early diffusers.
    path, _, leaf = name.rpartition(".")
    head, _, part = path.rpartition(".")
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.get(part)
    return f"{head}.{renamed}.{leaf}" if renamed and ".attentions." in name else name
