"""A picture made ready for edits: everything that no drag changes, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ddengine.artifacts import StrPath, atomic_write, check_tensors_path

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image
    from torch import Tensor

    from ddengine.directdrag.prepare import Prepared
    from ddengine.drags import Spaces


class Bytes(NamedTuple):
    """Memory by place: `device`, where the engine computes; `host`, beside it (on a CPU the picture alone); `total`."""

    device: int
    host: int
    total: int


@dataclass(frozen=True, eq=False)
class Source:
    """What `Engine.prepare` returns and `Engine.edit` takes in place of a picture, any number of times.

    image: the upright RGB input. spaces: all coordinate spaces. prepared: inverted latent and reference trajectory.
    model, device, dtype: digest of the weights it was made with, where and in what they computed; another engine
    refuses it. prompt: the conditioning it was made with. timings, passes: what the preparation cost, by stage.

    It never changes: no edit writes to a tensor of it, and nobody else should. `save` and `load` keep it in a file; a
    pickle of it holds the same bytes.
    """

    image: Image.Image
    spaces: Spaces
    prepared: Prepared
    model: str
    prompt: str
    device: torch.device
    dtype: torch.dtype

    @property
    def timings(self) -> dict[str, float]:
        return self.prepared.timings

    @property
    def passes(self) -> dict[str, dict[str, int]]:
        return self.prepared.passes

    @property
    def nbytes(self) -> Bytes:
        """Bytes of memory that the picture and all tensors hold, by place."""
        places = {"device": 0, "host": self.image.width * self.image.height * 3}
        # Tensors may share memory (the inverted latent begins the trajectory; pinned memory is one piece).
        shared = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._tensors()}
        for tensor in shared.values():
            places["device" if tensor.device == self.device else "host"] += tensor.untyped_storage().nbytes()
        return Bytes(**places, total=sum(places.values()))

    def save(self, path: StrPath, *, kv: bool = True) -> Path:
        """Write one .safetensors file, whole or not at all, from which `load` makes an equal source.

        kv: with the keys and values, most of it; without them each edit of the loaded source makes them again, to the
        same pixels. Raises InputError for another suffix, a path that cannot be written, or values that are not finite.
        """
        from ddengine.source_writer import write

        check_tensors_path(path)
        return atomic_write(path, lambda file: write(self, file, kv=kv))

    @classmethod
    def load(cls, path: StrPath, *, device: str | torch.device | None = None, budget: int | None = None) -> Source:
        """Read what `save` wrote; edits of it give the same pixels, bit for bit.

        device: where the engine computes that will edit it; by default where it was prepared. budget: as in
        `Engine.prepare`. Raises InputError for a file that is no source, of another format, damaged, or inconsistent in
        any field or tensor. Whether it belongs to an engine's model, the engine decides.
        """
        from ddengine.source_reader import read

        return read(path, device, budget)

    def _tensors(self) -> Iterator[Tensor]:
        prepared, reference = self.prepared, self.prepared.reference
        yield from (prepared.encoded, prepared.inverted)
        yield from (*reference.latents, *reference.features, *(reference.appearance or ()))
        yield from (tensor for row in reference.kv or () for pair in row for tensor in pair)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
        from ddengine.source_reader import loads
        from ddengine.source_writer import dumps

        return loads, (dumps(self),)
