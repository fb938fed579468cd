"""What a latency run edits, with what: the model, the picture and its drags, and the engines of every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ddengine.artifacts import sha256_bytes
from ddengine.backends import NAMES, available_backends
from ddengine.bench.shapes import sd15
from ddengine.config import DirectDragConfig
from ddengine.demo import examples
from ddengine.drags import Drag
from ddengine.engine import Engine
from ddengine.errors import InputError
from ddengine.models.load import Model, load_model
from ddengine.models.place import resolve_device, resolve_dtype

BACKENDS = (*NAMES, "auto")
SPACING = 14.0  # pixels of the bundled picture of 256 x 256 between the places of up to 16 drags
BORDER = 8  # pixels that handles and targets keep from its edge
SEED = 0  # of random weights
# No edit ends early, so that all make as many updates.
ENDLESS: dict[str, Any] = {"reach": 0.0, "max_track_no_change": 100_000}


def make_model(
    model: str = "embedded",
    shape: str | None = None,
    *,
    size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **parts: Path | None,
) -> Model:
    """A model by name or folder, or the Stable Diffusion 1.5 shape ("sd15") with random weights.

    size: long side of the working picture; parts: readout, lora, vae of `load_model`. Raises InputError, ModelError.
    """
    if shape is None:
        return load_model(model, device=device, dtype=dtype, size=size, **parts)
    if shape != "sd15":
        raise InputError(f"shape {shape!r} is unknown; use sd15")
    if model != "embedded" or any(parts.values()):
        raise InputError(f"shape {shape} has random weights; leave model, readout, lora and vae out")
    on = resolve_device(device)
    computes = resolve_dtype(dtype, on)
    torch.manual_seed(SEED)
    made = sd15(on, computes)
    # Another device or version draws other weights, which are another model to whatever is built of them.
    drawn = sha256_bytes(f"sd15 {SEED} {on.type} {computes} {torch.__version__}".encode())
    return replace(made, digest=drawn, size=size or made.size)


def shortened(config: DirectDragConfig, updates: int | None) -> DirectDragConfig:
    """A configuration whose edits make about so many latent updates and never end early; None leaves it as it is."""
    if updates is None:
        return config
    group = config.max_drag_per_track
    drags = min(config.drag_end_step, math.ceil(updates / (config.track_per_step * group)))
    tracks = max(1, round(updates / (drags * group))) if drags else config.track_per_step
    return config.changed(**ENDLESS, drag_end_step=drags, track_per_step=tracks)


def picture() -> Image.Image:
    """The first bundled picture."""
    return examples()[0].picture


def drags(count: int) -> tuple[Drag, ...]:
    """The bundled picture's arrow, then the same arrow from places around it, on a spiral of even density.

    Up to 16 drags hold all those of a smaller count; more stand closer.
    """
    example = examples()[0]
    (first,), (width, height) = example.drags, example.picture.size
    dx, dy = (end - start for start, end in zip(first.handle, first.target, strict=True))
    spacing, turn = SPACING * min(1.0, math.sqrt(16 / count)), math.pi * (3 - math.sqrt(5))

    def inside(x: float, y: float) -> bool:
        return BORDER <= x < width - BORDER and BORDER <= y < height - BORDER

    found, place = [first], 0
    while len(found) < count:
        place += 1
        far, angle = spacing * math.sqrt(place), place * turn
        if far > width + height:
            raise InputError(
                f"{count} drags do not fit into the picture, {len(found)} do; ask for at most so many points"
            )
        x, y = (round(at) for at in (first.handle[0] + far * math.cos(angle), first.handle[1] + far * math.sin(angle)))
        if inside(x, y) and inside(x + dx, y + dy):
            found.append(Drag((x, y), (x + dx, y + dy)))
    return tuple(found)


@dataclass(frozen=True)
class Candidate:
    """One backend over the run's model, or why it does not run here."""

    name: str
    engine: Engine | None
    skipped: str = ""


def candidates(
    model: Model, names: Sequence[str] = (), *, build: bool = False, described: Sequence[str] = ()
) -> list[Candidate]:
    """Engines of the named backends over one model, of all if none is named; eager first, which the others are held to.

    A backend that cannot run here is there with the reason. described: see `Engine`.
    """
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise InputError(f"backend {unknown[0]!r} is unknown; use one of {', '.join(BACKENDS)}")
    reasons = {backend.name: backend.reason for backend in available_backends() if not backend.available}
    wanted = [name for name in BACKENDS if not names or name in names]
    return [
        Candidate(name, None, reasons[name])
        if name in reasons
        else Candidate(name, Engine(model, name, build=build, described=described))
        for name in wanted
    ]
