"""The published evaluation sets on disk, sample by sample: DragBench (as published and extracted) and Drag100.

DragBench:  root/<category>/<sample>/  original_image.png  and  meta_data.pkl: {prompt, points, mask}, as published,
                                       or  drag_instruction.json: {prompt, points}  with  mask.png, as extracted
Drag100:    root/<sample>/             original.png or .jpg,  points.json: {points},  mask.png

points: [[x, y], ...] in pixels of the picture, handle and target in turn (method specification, section 13).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddengine.artifacts import StrPath
from ddengine.drags import Drag, Point, parse_drags
from ddengine.errors import InputError
from ddengine.image import read_image, read_mask
from ddengine.metrics.pickled import read_pickle

LAYOUTS = ("dragbench", "drag100")
RESULT = "dragged_image.png"
PICTURES = {"dragbench": ("original_image.png",), "drag100": ("original.png", "original.jpg")}


@dataclass(frozen=True)
class Sample:
    """One picture of a set and what is asked of it.

    name: its folder below the root, with "/", unique in the set. category: DragBench's, "" in Drag100. image: the
    picture's path. drags: handles and targets, (x, y) in its pixels. prompt: "" where the set has none. size: (width,
    height). mask: the file with its mask, or None.
    """

    name: str
    category: str
    image: Path
    drags: tuple[Drag, ...]
    prompt: str
    size: tuple[int, int]
    mask: Path | None

    @property
    def handles(self) -> tuple[Point, ...]:
        """Where the content is, (x, y)."""
        return tuple(drag.handle for drag in self.drags)

    @property
    def targets(self) -> tuple[Point, ...]:
        """Where it is to go, (x, y)."""
        return tuple(drag.target for drag in self.drags)

    def result(self, root: StrPath) -> Path:
        """Where the published scripts put this sample's edited picture below a folder of results."""
        return Path(root, self.name, RESULT)

    def read_mask(self) -> NDArray[np.float32] | None:
        """The mask, float32 [H, W] in 0..1, 1 where the picture may change; None if there is none or it is empty.

        The labelling tool stores an empty mask as zeros, which mean "none was drawn", not "nothing may change".
        Raises InputError for a mask that does not fit the picture.
        """
        if self.mask is None:
            return None
        mask: Any = self.mask
        if self.mask.suffix == ".pkl":
            mask = _entry(read_pickle(self.mask), "mask", self.mask)
            if not isinstance(mask, np.ndarray):
                raise InputError(f"{self.mask}: 'mask' is a {type(mask).__name__}, expected an array; fetch it again")
        values = read_mask(mask, *self.size)
        return values if values.any() else None


def read_set(root: StrPath, layout: str = "auto") -> tuple[list[Sample], dict[str, str]]:
    """All samples below `root` in the order of their names, and, by name, why others cannot be read.

    layout: "dragbench", "drag100", or "auto" for whichever is there. Raises InputError if there is no sample at all.
    """
    root = Path(root).expanduser()
    layout, folders = _folders(root, layout)
    samples, refused = [], {}
    for folder in folders:
        try:
            samples.append(read_sample(folder, root, layout))
        except InputError as error:  # noqa: PERF203 - one bad sample must not cost the others
            refused[folder.relative_to(root).as_posix()] = str(error)
    return samples, refused


def read_sample(folder: Path, root: Path, layout: str) -> Sample:
    """The sample in a folder below `root`; InputError if its picture, points or prompt are not as published."""
    image = next((folder / name for name in PICTURES[layout] if (folder / name).is_file()), None)
    if image is None:
        raise InputError(f"{folder}: has no {' or '.join(PICTURES[layout])}; complete the set")
    width, height = read_image(image).size
    source, facts = (_dragbench if layout == "dragbench" else _drag100)(folder)
    prompt = facts.get("prompt", "")
    if not isinstance(prompt, str):
        raise InputError(f"{source}: 'prompt' is a {type(prompt).__name__}, expected text; correct it")
    drags = _drags(_entry(facts, "points", source), source, width, height)
    mask = source if source.suffix == ".pkl" and "mask" in facts else folder / "mask.png"
    name = folder.relative_to(root).as_posix()
    category = folder.parent.name if layout == "dragbench" else ""
    return Sample(name, category, image, drags, prompt, (width, height), mask if mask.is_file() else None)


def _folders(root: Path, layout: str) -> tuple[str, list[Path]]:
    if layout not in ("auto", *LAYOUTS):
        raise InputError(f"layout {layout!r} is unknown; use auto, {' or '.join(LAYOUTS)}")
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; name the one the set was unpacked to")
    for each in LAYOUTS if layout == "auto" else (layout,):
        depth = "*/*/" if each == "dragbench" else "*/"
        folders = {path.parent for name in PICTURES[each] for path in root.glob(depth + name)}
        if folders:
            return each, sorted(folders, key=lambda folder: folder.relative_to(root).as_posix())
    raise InputError(
        f"{root} holds no samples: neither <category>/<sample>/original_image.png (DragBench) nor "
        f"<sample>/original.png or .jpg (Drag100); name the folder that holds them"
    )


def _dragbench(folder: Path) -> tuple[Path, dict[str, Any]]:
    # The extracted form first: it says the same, and needs no care to read.
    if (folder / "drag_instruction.json").is_file():
        return _facts(folder / "drag_instruction.json", _read_json)
    return _facts(folder / "meta_data.pkl", read_pickle)


def _drag100(folder: Path) -> tuple[Path, dict[str, Any]]:
    return _facts(folder / "points.json", _read_json)


def _facts(path: Path, read: Callable[[Path], Any]) -> tuple[Path, dict[str, Any]]:
    facts = read(path)
    if not isinstance(facts, dict):
        raise InputError(f"{path}: holds a {type(facts).__name__}, expected a dictionary with 'points'; fetch it again")
    return path, facts


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; complete the set") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({str(error)[:200]}); fetch it again") from error


def _entry(facts: Any, name: str, path: Path) -> Any:
    if not isinstance(facts, dict) or name not in facts:
        raise InputError(f"{path}: has no {name!r}; fetch it again")
    return facts[name]


def _drags(points: Any, path: Path, width: int, height: int) -> tuple[Drag, ...]:
    if not isinstance(points, (list, tuple)) or len(points) % 2 or not points:
        what = f"{len(points)} points" if isinstance(points, (list, tuple)) else f"a {type(points).__name__}"
        raise InputError(f"{path}: 'points' is {what}, expected handle and target in turn; correct it")
    try:
        return parse_drags(list(zip(points[::2], points[1::2], strict=True)), width, height)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
