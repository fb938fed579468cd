"""A picture's identity: low-rank changes to one model's attention, saved, loaded, refused and fused."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.artifacts import StrPath, atomic_write, check_tensors_path, sha256_bytes
from ddengine.errors import InputError, ModelError
from ddengine.models.cache import combined_digest
from ddengine.models.files import read_tensors
from ddengine.models.lora import add_deltas, find_lora, lora_deltas

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ddengine.models.load import Model

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention, self and cross
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the adapter's settings, and reads only "unet.*" of them
_BASE = "ddengine.base"
_KEY = re.compile(r"unet\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, eq=False)
class LoRA:
    """What `Engine.fit_identity` returns and `Engine.prepare` and `Engine.edit` take as `identity`.

    weights: float32 on the CPU under diffusers' keys, `unet.LAYER.lora_A.weight` [rank, in] and `.lora_B.weight` [out,
    rank]; not to be changed. base: digest of the model it was fitted to; any other is refused. scale: how much of it an
    edit takes, W + scale * B A. losses: mean square error of the noise prediction at each step of the fit; not saved.
    Raises InputError for a scale that is not finite.
    """

    weights: Mapping[str, Tensor]
    rank: int
    base: str
    scale: float = 1.0
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise InputError(f"the identity's scale is {self.scale!r}; it must be a finite number, 1 for all of it")

    def scaled(self, scale: float) -> LoRA:
        """The same identity taken by another share: 1 is all of it, 0 nothing."""
        return replace(self, scale=scale)

    @cached_property
    def digest(self) -> str:
        """sha256 over the weights, the scale and the base: equal digests give equal edits."""
        tensors = [(name, sha256_bytes(_plain(tensor))) for name, tensor in self.weights.items()]
        return combined_digest([*tensors, ("scale", repr(float(self.scale))), ("base", self.base)])

    @property
    def model_digest(self) -> str:
        """Digest of the model that `fused` gives; what is prepared, compiled or cached with it is filed under this."""
        return combined_digest([("model", self.base), ("identity", self.digest)])

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def save(self, path: StrPath) -> Path:
        """Write one .safetensors file that diffusers' `load_lora_weights` and `Engine.load(lora=...)` read too.

        Equal identities give equal bytes. Raises InputError for another suffix or a path that cannot be written.
        """
        import safetensors.torch

        check_tensors_path(path)
        return atomic_write(path, safetensors.torch.save(dict(self.weights), self._metadata()))

    @classmethod
    def load(cls, path: StrPath) -> LoRA:
        """Read what `save` wrote, a file or the only one of its folder; ModelError for anything else."""
        file = find_lora(Path(path))
        tensors, metadata = read_tensors(file)
        try:
            settings = json.loads(metadata.get(_METADATA, "{}"))
            base, rank = str(settings[_BASE]), int(settings["unet.r"])
            scale = float(settings["unet.lora_alpha"]) / rank
            if rank < 1 or not math.isfinite(scale):
                raise ValueError(f"rank {rank}, scale {scale}")
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ModelError(
                f"{file}: does not say which model it belongs to, so it is no identity that ddengine saved; fuse it "
                f"when the model is loaded: Engine.load(lora=...) or --lora"
            ) from error
        wrong = [name for name, tensor in tensors.items() if not _fits(name, tensor, rank)]
        if wrong or not tensors:
            found = f"{wrong[0]} is {list(tensors[wrong[0]].shape)}" if wrong else "it holds no tensors"
            raise ModelError(f"{file}: {found}, not what an identity of rank {rank} has; fit or fetch it again")
        return cls({name: tensor.float() for name, tensor in sorted(tensors.items())}, rank, base, scale)

    def check(self, model: Model) -> None:
        """ModelError unless this is an identity of the model's own weights."""
        if self.base != model.digest:
            raise ModelError(
                f"the identity belongs to model {self.base[:12]}, this is model {model.digest[:12]} ({model.name}); "
                f"fit one with this model, or fuse a saved one regardless: Engine.load(lora=FILE)"
            )

    def fused(self, model: Model) -> Model:
        """The model with this identity in its weights; the model itself stays as it is.

        The copy owns only the weights that change (attention's; for SD 1.5 11 % of the UNet) and shares the rest.
        Raises ModelError for another model.
        """
        self.check(model)
        deltas = lora_deltas(model.unet, dict(self.weights), self._metadata(), Path("the identity"))
        unet = copy_sharing(model.unet, own=deltas)
        add_deltas(unet, deltas)
        note = f"an identity of rank {self.rank} is fused into {len(deltas)} layers"
        return replace(model, unet=unet, digest=self.model_digest, notes=(*model.notes, note))

    def _metadata(self) -> dict[str, str]:
        # One entry only: safetensors writes several in no fixed order.
        settings = {
            "unet.r": self.rank,
            "unet.lora_alpha": self.scale * self.rank,
            "unet.target_modules": list(LAYERS),
            _BASE: self.base,
        }
        return {_METADATA: json.dumps(settings, sort_keys=True)}


def copy_sharing(module: nn.Module, own: Collection[str] = ()) -> Any:
    """A copy of a module that shares all tensors with the original, but for the weights of the layers named in `own`.

    Layers of the copy can be wrapped or exchanged, and its own weights changed, without the original's notice.
    """
    owned = {id(module.get_submodule(name).weight) for name in own}
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in owned}
    return copy.deepcopy(module, shared)  # what the memo holds already is not copied


def _fits(name: str, tensor: Tensor, rank: int) -> bool:
    key = _KEY.fullmatch(name)
    return key is not None and tensor.dim() == 2 and tensor.shape[0 if key[2] == "A" else 1] == rank


def _plain(tensor: Tensor) -> bytes:
    return repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes()
