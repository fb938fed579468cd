"""The demo: the bundled example pictures edited with their drags, as pictures to look at."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from ddengine.artifacts import check_writable, make_folder, save_picture
from ddengine.drags import Drag, parse_drags
from ddengine.draw import display_factor, enlarged, side_by_side, with_arrows
from ddengine.image import read_image

Editor = Callable[[Image.Image, tuple[Drag, ...]], Image.Image]


@dataclass(frozen=True)
class Example:
    """One bundled picture and its drags, in pixels of the picture."""

    name: str
    picture: Image.Image
    drags: tuple[Drag, ...]


@dataclass(frozen=True)
class Shown:
    """The three pictures written for one example, and the seconds its edit took."""

    name: str
    before: Path
    after: Path
    side_by_side: Path
    seconds: float


def examples() -> tuple[Example, ...]:
    """The bundled examples, as `demo.json` beside the pictures lists them."""
    folder = files("ddengine.examples")
    found = []
    for entry in json.loads((folder / "demo.json").read_text(encoding="utf-8")):
        picture = read_image(Image.open(io.BytesIO((folder / entry["image"]).read_bytes())))
        found.append(Example(entry["name"], picture, parse_drags(entry["drags"], *picture.size)))
    return tuple(found)


def show(example: Example, editor: Editor, folder: Path) -> Shown:
    """Edit one example and write NAME-before.png (with its arrows), NAME-after.png and NAME-side-by-side.png.

    Pictures under 512 pixels are written enlarged by a whole factor. Raises InputError before the edit if the folder
    cannot be written to.
    """
    make_folder(folder)
    before, after, both = (
        check_writable(folder / f"{example.name}-{part}.png") for part in ("before", "after", "side-by-side")
    )
    start = time.perf_counter()
    edited = editor(example.picture, example.drags)
    seconds = time.perf_counter() - start
    factor = display_factor(example.picture.size)
    pictures = (with_arrows(example.picture, example.drags, factor), enlarged(edited, factor))
    save_picture(pictures[0], before)
    save_picture(pictures[1], after)
    save_picture(side_by_side(pictures), both)
    return Shown(example.name, before, after, both, seconds)


def run(folder: Path, *, progress: Any = None, **options: Any) -> tuple[Shown, ...]:
    """Show every bundled example in `folder`; `options` go to `Engine.load` (the embedded model by default)."""
    from ddengine.engine import Engine

    make_folder(folder)  # refuse before the weights are read
    engine = Engine.load(**options)

    def editor(picture: Image.Image, drags: tuple[Drag, ...]) -> Image.Image:
        return engine.edit(picture, drags, progress=progress).image

    return tuple(show(example, editor, folder) for example in examples())
