"""A prepared picture written as one safetensors file: tensors, and one entry of JSON that says what they are."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from ddengine import __version__
from ddengine.errors import InputError
from ddengine.source_header import Header

if TYPE_CHECKING:
    from torch import Tensor

    from ddengine.source import Source

_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "uint8": "U8"}


def write(source: Source, file: BinaryIO, *, kv: bool = True) -> None:
    """Write a source, tensor by tensor; equal sources give equal bytes. InputError for one with values not finite.

    kv: with its keys and values, most of it; without them each edit of what is read makes them again.
    """
    import torch

    tensors = dict(_named(source, kv))
    kept = source.prepared.reference.kv if kv else None
    swapped = [name for name, tensor in tensors.items() if _is_channels_last(tensor)]
    header = Header(
        image_size=source.image.size,
        work_size=source.spaces.work_size,
        config=source.prepared.config,
        times=source.prepared.times,
        spacing=source.prepared.spacing,
        model=source.model,
        prompt=source.prompt,
        device=str(source.device),
        dtype=str(source.dtype).removeprefix("torch."),
        guided=source.prepared.reference.appearance is not None,
        followed=len(source.prepared.reference.latents) - 1,
        layers=0 if kept is None else len(kept[0]),
        channels_last=tuple(swapped),
        passes=source.passes,
        timings=source.timings,
        versions={"ddengine": __version__, "torch": torch.__version__},
    )
    stored = {name: tensor.movedim(1, -1) if name in swapped else tensor for name, tensor in tensors.items()}
    # The widest first, so that each tensor lies at a multiple of its item's size.
    order = sorted(stored, key=lambda name: -stored[name].element_size())
    index: dict[str, Any] = {"__metadata__": header.metadata()}
    end = 0
    for name in order:
        begin, end = end, end + stored[name].numel() * stored[name].element_size()
        code = _CODES[str(stored[name].dtype).removeprefix("torch.")]
        index[name] = {"dtype": code, "shape": list(stored[name].shape), "data_offsets": [begin, end]}
    head = json.dumps(index).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for name in order:
        here = stored[name].detach().to("cpu").contiguous()
        if here.dtype != torch.uint8 and not bool(here.isfinite().all()):
            raise InputError(
                f"the source's {name} holds values that are not finite, so it would make no picture; prepare it again "
                f"with dtype='float32'"
            )
        file.write(here.view(torch.uint8).numpy().tobytes())


def dumps(source: Source) -> bytes:
    """The bytes that `write` writes."""
    file = io.BytesIO()
    write(source, file)
    return file.getvalue()


def _named(source: Source, kv: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a source under its name in the file."""
    import numpy as np
    import torch

    reference = source.prepared.reference
    yield "picture", torch.from_numpy(np.array(source.image))
    if profile := source.image.info.get("icc_profile"):
        yield "icc_profile", torch.frombuffer(bytearray(profile), dtype=torch.uint8)
    yield "encoded", source.prepared.encoded
    # The first of the trajectory is the inverted latent.
    yield from ((f"latent.{step}", latent) for step, latent in enumerate(reference.latents))
    yield from ((f"feature.{step}", feature) for step, feature in enumerate(reference.features))
    yield from ((f"appearance.{step}", seen) for step, seen in enumerate(reference.appearance or ()))
    for step, row in enumerate((reference.kv or ()) if kv else ()):
        for layer, pair in enumerate(row):
            yield from ((f"{part}.{step}.{layer}", tensor) for part, tensor in zip(("key", "value"), pair, strict=True))


def _is_channels_last(tensor: Tensor) -> bool:
    import torch

    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
