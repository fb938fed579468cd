"""A prepared picture read from a safetensors file.

Nothing in a file is trusted: what it says of itself must be of one piece, and every tensor be what follows from that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ddengine.errors import InputError
from ddengine.source_header import Header, parse, unusable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddengine.artifacts import StrPath
    from ddengine.models.unet import KeyValue
    from ddengine.source import Source

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"


def read_header(path: StrPath) -> Header:
    """What a saved source says of itself, without torch and without its tensors; InputError if it is none."""
    from safetensors import SafetensorError, safe_open

    path = checked_file(path)
    try:
        with safe_open(str(path), framework="np") as file:
            return parse(file.metadata(), path)
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read(path: StrPath, device: str | torch.device | None = None, budget: int | None = None) -> Source:
    """The source in a file, as `Source.load` gives it."""
    from safetensors import SafetensorError, safe_open

    path = checked_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}  # lie in the file until they are copied
            return _source(tensors, file.metadata(), path, device, budget)
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def loads(data: bytes) -> Source:
    """The source that `source_writer.dumps` made these bytes of."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
        index = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _source(tensors, index.get("__metadata__"), "the pickled source")
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable("the pickled source", error) from error


def checked_file(path: StrPath) -> Path:
    """The path of a file that may be a saved source; InputError for what cannot be."""
    path = Path(path).expanduser()
    if path.suffix != SUFFIX:
        raise InputError(f"{path} is no prepared source; its name would end in {SUFFIX}")
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path, or prepare the picture")
    return path


def _unreadable(where: object, error: Exception) -> InputError:
    return unusable(where, f"is damaged or incomplete ({error})")


class _Tensors:
    """Tensors of a file, each given once, checked, on a device and no longer lying in the file."""

    def __init__(self, tensors: dict[str, Tensor], header: Header, device: torch.device, where: object) -> None:
        self._tensors, self._device, self._where = tensors, device, where
        self._swapped = set(header.channels_last)
        self._like: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, dtype: str, *shape: int | None) -> Tensor:
        """One tensor; where the shape says None, what the first of its kind (its name up to the first dot) has."""
        return self.moved(self.checked(name, dtype, *shape), name)

    def checked(self, name: str, dtype: str, *shape: int | None, kind: str | None = None) -> Tensor:
        """One tensor where it lies, checked but for its values."""
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise unusable(self._where, f"lacks the tensor {name}")
        if name in self._swapped and tensor.dim() == 4:
            self._swapped.remove(name)
            tensor = tensor.movedim(-1, 1)
        found, held = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        wanted = self._like.setdefault(kind or name.partition(".")[0], found)
        fits = len(found) == len(shape) and all(
            have == (like if want is None else want) and have > 0
            for have, like, want in zip(found, wanted, shape, strict=False)
        )
        if not fits or held != dtype:
            expected = [like if want is None else want for want, like in zip(shape, wanted, strict=False)]
            raise unusable(self._where, f"its {name} is {held} {list(found)}, expected {dtype} {expected}")
        return tensor

    def moved(self, tensor: Tensor, name: str) -> Tensor:
        """A tensor on the device, its values checked."""
        import torch

        here = tensor.to(self._device, copy=True)
        if here.dtype != torch.uint8 and not bool(here.isfinite().all()):
            raise unusable(self._where, f"its {name} holds values that are not finite")
        return here

    def kv(self, header: Header, tokens: tuple[int, ...]) -> Iterator[tuple[KeyValue, ...]]:
        """The keys and values of one step after the other, where they lie."""
        for step in range(len(header.times) if header.layers else 0):
            row = []
            for layer in range(header.layers):
                pair = [self.checked(f"{part}.{step}.{layer}", header.dtype, 1, None, None, kind=f"kv.{layer}")
                        for part in ("key", "value")]  # fmt: skip
                if pair[0].shape[1] not in tokens:
                    wanted = " or ".join(map(str, tokens))
                    raise unusable(
                        self._where, f"its key.{step}.{layer} has {pair[0].shape[1]} tokens, expected {wanted}"
                    )
                row.append((pair[0], pair[1]))
            yield tuple(row)

    def done(self) -> None:
        """All must have been asked for."""
        if odd := sorted({*self._tensors, *self._swapped}):
            raise unusable(self._where, f"holds tensors that no source has: {', '.join(odd[:4])}")


def _source(
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str] | None,
    where: object,
    device: str | torch.device | None = None,
    budget: int | None = None,
) -> Source:
    """A source of a file's tensors and metadata."""
    import torch

    with torch.inference_mode(False), torch.no_grad():  # what is made in that mode can take part in no gradient
        return _build(tensors, parse(metadata, where), where, device, budget)


def _build(
    tensors: dict[str, Tensor], header: Header, where: object, device: str | torch.device | None, budget: int | None
) -> Source:
    import torch
    from PIL import Image

    from ddengine.directdrag.memory import check_budget
    from ddengine.directdrag.prepare import Prepared
    from ddengine.directdrag.reference import Reference
    from ddengine.source import Source

    check_budget(budget)
    spaces, config, on = header.spaces, header.config, _device(header, where, device)
    file = _Tensors(tensors, header, on, where)
    height, width = spaces.latent_hw
    pixels = file.checked("picture", "uint8", header.image_size[1], header.image_size[0], 3).cpu().numpy()
    image = Image.fromarray(pixels.copy())
    if "icc_profile" in tensors:
        profile = file.checked("icc_profile", "uint8", None).cpu().numpy().tobytes()
        if profile[16:20] != b"RGB ":
            raise unusable(where, "its icc_profile is no profile of RGB values")
        image.info["icc_profile"] = profile
    latent = (header.latent_dtype, 1, 4, height, width)
    encoded = file.take("encoded", *latent)
    latents = tuple(file.take(f"latent.{step}", *latent) for step in range(header.followed + 1))
    drags = range(config.drag_end_step)
    features = tuple(file.take(f"feature.{step}", header.dtype, 1, None, height, width) for step in drags)
    grid = (config.rg_grid, config.rg_grid) if config.rg_grid else (height, width)
    appearance = tuple(
        file.take(f"appearance.{step}", header.dtype, 1, None, *grid) for step in (drags if header.guided else ())
    )
    rows = list(file.kv(header, (height * width, -(-height // 2) * -(-width // 2))))
    file.done()
    if header.versions.get("torch") != torch.__version__:
        log.info("%s was made with torch %s, this is %s", where, header.versions.get("torch"), torch.__version__)
    reference = Reference(
        latents, features, appearance if header.guided else None, _placed(rows, file, encoded.device, budget)
    )
    prepared = Prepared(
        work_hw=spaces.work_hw,
        feature_hw=spaces.feature_hw,
        encoded=encoded,
        inverted=latents[0],
        times=header.times,
        spacing=header.spacing,
        reference=reference,
        config=config,
        passes=header.passes,
        timings=header.timings,
    )
    dtype: torch.dtype = getattr(torch, header.dtype)
    return Source(image, spaces, prepared, header.model, header.prompt, encoded.device, dtype)


def _placed(
    rows: list[tuple[KeyValue, ...]], file: _Tensors, device: torch.device, budget: int | None
) -> tuple[tuple[KeyValue, ...], ...] | None:
    """Keys and values where there is room for them."""
    from ddengine.directdrag.memory import Shelf

    if not rows:
        return None
    shelf = Shelf(rows[0], len(rows), device, budget)
    if shelf.place == "recompute":
        return None
    for step, row in enumerate(rows):
        name = f"keys and values of step {step}"
        shelf.put([(file.moved(key, name), file.moved(value, name)) for key, value in row])
    if shelf.place == "host":
        import torch

        torch.cuda.synchronize(device)
    return tuple(shelf.rows)


def _device(header: Header, where: object, device: str | torch.device | None) -> torch.device:
    from ddengine.models.place import resolve_device

    if device is not None:
        return resolve_device(device)
    try:
        return resolve_device(header.device)
    except InputError as error:
        raise InputError(
            f"{where} was prepared on {header.device!r}, which is not here; load it with device='cpu'"
        ) from error
