"""What every system is ordered to do: a picture, its drags, a mask, weights, and how long."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddengine.demo import examples
from ddengine.drags import Drag, parse_drags
from ddengine.errors import InputError
from ddengine.image import read_image

# Half the maximum of the soft mask that this method finds from the drags alone: 1.18 sigma of 30 on a grid of 256.
REACH = 0.138  # of the picture's long side

Config = tuple[str, dict[str, str]]  # a preset of this engine and settings in place of its own, as text
DEFAULT: Config = ("default", {})


@dataclass(frozen=True)
class Order:
    """One edit. picture: RGB, sides multiples of 8; drags in its pixels; mask: uint8 [H, W], 255 where it may change.

    updates: (times with drags, trackings at each, updates between trackings) for all systems that have such; None is
    each system's own. lora_steps: None trains none, 0 as many as published.
    """

    picture: Image.Image
    drags: tuple[Drag, ...]
    mask: NDArray[np.uint8]
    mask_from: str
    model: Path
    readout: Path | None = None
    prompt: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    backend: str = "auto"
    threads: int = 1
    updates: tuple[int, int, int] | None = None
    lora_steps: int | None = None

    def write(self, folder: Path, *, checkout: Path | None = None, config: Config = DEFAULT) -> Path:
        """The order as a system's process reads it, in a folder of its own; the path of its job.json."""
        folder.mkdir(parents=True, exist_ok=True)
        self.picture.save(folder / "picture.png")
        Image.fromarray(self.mask).save(folder / "mask.png")
        link(self.model, folder / "weights")
        job: dict[str, Any] = {
            "checkout": checkout and str(checkout.resolve()),
            "readout": self.readout and str(self.readout.resolve()),
            "picture": str(folder / "picture.png"),
            "mask": str(folder / "mask.png"),
            "mask_from": self.mask_from,
            "prompt": self.prompt,
            "drags": [[*drag.handle, *drag.target] for drag in self.drags],
            "size": list(self.picture.size),
            "device": self.device,
            "dtype": self.dtype,
            "backend": self.backend,
            "threads": self.threads,
            "updates": self.updates,
            "lora_steps": self.lora_steps,
            "preset": config[0],
            "changes": config[1],
        }
        path = folder / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        return path


def link(folder: Path, name: Path) -> None:
    """A folder under another name, for peers that read a kind of model off its path; copied where links are refused."""
    try:
        os.symlink(folder.resolve(), name, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, name)


def make_order(
    model: Path,
    *,
    image: Path | None = None,
    drags: Sequence[Drag] = (),
    mask: Path | None = None,
    size: int | None = None,
    **rest: Any,
) -> Order:
    """An order for a picture file, or for the first bundled example, at a long side of `size` pixels.

    size: None is what the model was made for. Raises InputError for a folder without a UNet, a picture that cannot be
    read, drags without a picture or the other way round, a point outside.
    """
    config = model / "unet" / "config.json"
    if not config.is_file():
        raise InputError(
            f"{config}: not found; peers read a Stable Diffusion folder as diffusers saves it, with --model"
        )
    if (image is None) != (not drags):
        raise InputError("a picture and its drags come together: give both IMAGE and --drag, or neither")
    if image is None:
        example = examples()[0]
        picture, arrows = example.picture, example.drags
    else:
        picture = read_image(image)
        arrows = parse_drags(drags, *picture.size)
    side = size or 8 * int(json.loads(config.read_text(encoding="utf-8")).get("sample_size", 64))
    scale = side / max(picture.size)
    wanted = (max(8, 8 * round(picture.width * scale / 8)), max(8, 8 * round(picture.height * scale / 8)))
    factors = [new / old for new, old in zip(wanted, picture.size, strict=True)]
    moved = tuple(
        Drag(*((x * factors[0], y * factors[1]) for x, y in (drag.handle, drag.target))) for drag in arrows
    )  # fmt: skip
    resized = picture.convert("RGB").resize(wanted, Image.Resampling.LANCZOS)
    if mask is not None:
        area = np.where(np.asarray(read_image(mask).convert("L").resize(wanted, 0)) > 127, 255, 0).astype(np.uint8)
        return Order(resized, moved, area, "the mask was given", model, **rest)
    return Order(resized, moved, derived_mask(wanted, moved), "the mask was derived from the drags", model, **rest)


def derived_mask(size: tuple[int, int], drags: Sequence[Drag]) -> NDArray[np.uint8]:
    """uint8 [H, W], 255 within `REACH` of a drag's path: where this method's own soft mask is above one half."""
    width, height = size
    ys, xs = np.mgrid[0:height, 0:width]
    near = np.zeros((height, width), bool)
    for drag in drags:
        (x0, y0), (x1, y1) = drag.handle, drag.target
        along = np.array((x1 - x0, y1 - y0), float)
        share = ((xs - x0) * along[0] + (ys - y0) * along[1]) / max(float(along @ along), 1e-9)
        share = share.clip(0, 1)
        near |= np.hypot(xs - x0 - share * along[0], ys - y0 - share * along[1]) <= REACH * max(size)
    return np.where(near, 255, 0).astype(np.uint8)


def spread(updates: int, group: int = 3, tracks: int = 10) -> tuple[int, int, int]:
    """About so many updates an edit as (times, trackings, updates between them), in the published proportions."""
    group = min(group, updates)
    tracks = max(1, min(tracks, round(updates / group)))
    return max(1, round(updates / (tracks * group))), tracks, group
