"""Read, write and convert readout heads: safetensors under the published names, config in the metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.artifacts import atomic_write
from ddengine.errors import InputError, ModelError
from ddengine.models.files import check_names, read_tensors, refuse_pickle

if TYPE_CHECKING:
    from torch import Tensor

    from ddengine.models.readout import ReadoutHead

_LAYER = re.compile(r"bottleneck_layers\.(\d+)\.(0\.)?(.+)\Z")


@dataclass(frozen=True)
class ReadoutShape:
    """What a head is built from; `dims` are the channels of the UNet's up resnets, in order."""

    dims: tuple[int, ...]
    time_dim: int | None  # None: the head ignores the time embedding
    projection: int
    bottleneck: int
    groups: int


def tap_dims(unet: Any) -> tuple[tuple[int, ...], int]:
    """(channels of every up resnet's hidden state in order, width of the time embedding) of a UNet."""
    dims = tuple(resnet.conv2.out_channels for block in unet.up_blocks for resnet in block.resnets)
    return dims, unet.time_embedding.linear_2.out_features


def load_readout(path: str | Path, dims: Sequence[int], time_dim: int) -> ReadoutHead:
    """Read a head, frozen, float32, on the CPU; it must fit the UNet's `dims` and `time_dim` (`tap_dims`).

    Errors: `ModelError` for a pickle, a missing or unknown tensor, another shape, a head for another UNet.
    """
    path = Path(path).expanduser()
    refuse_pickle(path, f"convert it once: `ddengine convert-readout {path.name} {path.stem}.safetensors`")
    tensors, metadata = read_tensors(path)
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError as error:
        raise ModelError(
            f"{path}: its config metadata is not JSON ({error}); fetch or convert the file again"
        ) from error
    state, shape = _understand(path, tensors, config)
    check_fit(path, shape, dims, time_dim)
    return _build(path, state, shape)


def check_fit(path: str | Path, shape: ReadoutShape, dims: Sequence[int], time_dim: int) -> None:
    """`ModelError` naming both unless a head's widths are those of the UNet's taps and time embedding."""
    if shape.dims != tuple(dims):
        raise ModelError(
            f"{path}: this readout head reads up-resnet channels {list(shape.dims)}, the UNet's are "
            f"{list(dims)}; use a head trained for this model"
        )
    if shape.time_dim not in (None, time_dim):
        raise ModelError(
            f"{path}: this readout head takes a time embedding of {shape.time_dim}, the UNet's has "
            f"{time_dim}; use a head trained for this model"
        )


def save_readout(head: ReadoutHead, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
    """Write a head's tensors in the dtype they have, with its shape and `config` as metadata; atomically."""
    shape = ReadoutShape(head.dims, head.time_dim, head.projection, head.bottleneck, head.groups)
    _write(path, head.state_dict(), shape, config or {})


def convert_readout(in_pt: str | Path, out_safetensors: str | Path) -> ReadoutShape:
    """Turn the readout authors' torch checkpoint into our safetensors file, running no code of the pickle.

    Accepts the published key names with and without the sequential `.0.` level, which is dropped along with
    the time embedding it makes the network ignore. Errors: `ModelError` for anything but tensors and plain
    containers in the pickle, missing or unknown keys, or a head with an output network (a spatial one);
    `InputError` for an output that cannot be written.
    """
    import torch

    path = Path(in_pt).expanduser()
    if Path(out_safetensors).suffix != ".safetensors":
        raise InputError(f"output {str(out_safetensors)!r}: a wrong suffix; name a file that ends in .safetensors")
    if not path.is_file():
        raise ModelError(f"{path}: not found; check the path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler, the zip reader and the file system each raise their own
        raise ModelError(
            f"{path}: not a torch checkpoint of tensors and plain containers, so it was not read "
            f"({_first_line(error)}); take the published file, or save it again with `torch.save` from "
            f"tensors and a plain dict"
        ) from error
    tensors = checkpoint.get("aggregation_network") if isinstance(checkpoint, dict) else None
    config = checkpoint.get("config", {}) if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or not isinstance(config, dict):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ModelError(
            f"{path}: expected the dicts 'aggregation_network' and 'config', found {found}; take the published file"
        )
    wrong = [str(name) for name, value in tensors.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if wrong:
        raise ModelError(f"{path}: {wrong[:4]} in 'aggregation_network' are not tensors; take the published file")
    state, shape = _understand(path, tensors, config)
    _build(path, state, shape)
    _write(out_safetensors, state, shape, config)
    return shape


def _understand(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], ReadoutShape]:
    """State dict under the plain published names, and the shape it implies; the config may only agree."""
    if any(name.startswith("output_head.") for name in tensors):
        raise ModelError(
            f"{path}: a spatial readout head (it has output_head.*), expected an appearance head; use one of those"
        )
    options = config.get("aggregation_kwargs")
    options = options if isinstance(options, dict) else {}
    sequential = bool(options.get("bottleneck_sequential"))
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = _LAYER.match(name)
        sequential = sequential or bool(match and match[2])
        plain = f"bottleneck_layers.{match[1]}.{match[3]}" if match else name
        if plain in state:
            raise ModelError(
                f"{path}: holds {plain} twice, with and without the sequential level; take the published file"
            )
        state[plain] = value
    if sequential:
        state = {name: value for name, value in state.items() if ".emb_layers." not in name}

    def size(name: str, axis: int) -> int:
        if name not in state or state[name].dim() <= axis:
            raise ModelError(
                f"{path}: {name} is missing or has too few dimensions, so this is no readout head; give another file"
            )
        return state[name].shape[axis]

    count = 1 + max((int(match[1]) for name in state if (match := _LAYER.match(name))), default=0)
    timed = any(".emb_layers." in name for name in state)
    shape = ReadoutShape(
        dims=tuple(size(f"bottleneck_layers.{layer}.conv1.weight", 1) for layer in range(count)),
        time_dim=size("bottleneck_layers.0.emb_layers.weight", 1) if timed else None,
        projection=size("bottleneck_layers.0.shortcut.weight", 0),
        bottleneck=size("bottleneck_layers.0.conv1.weight", 0),
        groups=_groups(path, config, options),
    )
    if size("mixing_weights", 0) != count:
        raise ModelError(
            f"{path}: mixing_weights has {size('mixing_weights', 0)} entries for {count} layers: a head over "
            f"several timesteps is not supported; use one over a single timestep"
        )
    said = {"dims": list(shape.dims), "projection_dim": shape.projection}
    for name, found in said.items():
        if name in config and config[name] != found:
            raise ModelError(
                f"{path}: its config says {name} = {config[name]}, its tensors say {found}; fetch the file again"
            )
    return state, shape


def _groups(path: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    groups = config.get("groups", options.get("num_norm_groups", 32))  # not seen in the tensors' shapes
    if not isinstance(groups, int) or groups < 1:
        raise ModelError(
            f"{path}: its config says groups = {groups!r}, expected a positive integer; fetch the file again"
        )
    return groups


def _build(path: Path, state: dict[str, Tensor], shape: ReadoutShape) -> ReadoutHead:
    import torch

    from ddengine.models.readout import ReadoutHead

    try:
        head = ReadoutHead(
            shape.dims,
            shape.time_dim,
            projection=shape.projection,
            bottleneck=shape.bottleneck,
            groups=shape.groups,
        )
    except ValueError as error:  # widths that the norm groups do not divide
        raise ModelError(f"{path}: no readout head can have {shape} ({error}); fetch the file again") from error
    wanted = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    check_names(path, wanted, {name: tuple(value.shape) for name, value in state.items()})
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ModelError(f"{path}: {broken[0]} holds values that are not finite; fetch the file again")
    head.load_state_dict({name: value.to(torch.float32) for name, value in state.items()})
    return head.requires_grad_(False).eval()


def _write(path: str | Path, state: Mapping[str, Tensor], shape: ReadoutShape, config: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    ours = {
        "dims": list(shape.dims),
        "time_dim": shape.time_dim,
        "projection_dim": shape.projection,
        "bottleneck": shape.bottleneck,
        "groups": shape.groups,
    }
    kept = {name: value for name, value in config.items() if name != "aggregation_kwargs"}
    metadata = {"format": "pt", "config": json.dumps({**kept, **ours}, default=str, sort_keys=True)}
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    atomic_write(Path(path), save(contiguous, metadata))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
