"""What is evaluated: the published sets and the drawn scenes, as samples with figures of their own."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddengine.artifacts import sha256_bytes
from ddengine.drags import Drag
from ddengine.errors import InputError

SUITES = ("dragbench", "drag100", "scenes")


@dataclass(frozen=True)
class Figure:
    """One figure of an edit. name: as in tables; better: "higher" or "lower"; about: what it is, one sentence."""

    name: str
    better: str
    digits: int
    about: str
    unit: str = ""


IF = Figure("IF", "higher", 3, "Image fidelity, 1 - LPIPS (AlexNet, 224 x 224) of the edit against the input.")
CLIP = Figure("CLIP", "higher", 3, "Cosine of CLIP ViT-B/32 embeddings of the edit and the input.")
MD = Figure("MD", "lower", 2, "Mean distance from where DIFT finds a handle's content to its target.", "px")
DAI = tuple(
    Figure(
        f"DAI_{radius}", "lower", 4, f"Dragging accuracy: colours at the target against the handle's, radius {radius}."
    )
    for radius in (1, 5, 10, 20)
)
GAIN = Figure(
    "goal_gain", "higher", 2, "1 - MSE(edit, goal) / MSE(input, goal) where they differ: 1 is the goal itself."
)
DISTANCE = Figure(
    "distance", "lower", 2, "From where the part's pixels are found to the target, over the drag's length."
)
PSNR = Figure("psnr_outside", "higher", 1, "PSNR against the input where nothing should change.", "dB")


@dataclass(frozen=True)
class Item:
    """One sample. name: unique in the suite, with "/"; truth: what its judge needs besides pictures.

    size: (width, height). digest: sha256 of everything that decides its edits and their judgement, but for the
    configuration and the networks.
    """

    name: str
    category: str
    prompt: str
    drags: tuple[Drag, ...]
    size: tuple[int, int]
    digest: str
    truth: Any

    def picture(self) -> bytes:
        """The picture's file; InputError if it cannot be read."""
        if isinstance(self.truth, int):
            return scene_picture(self.truth)[0]
        try:
            return Path(self.truth.image).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {self.truth.image}: {error.strerror}; complete the set") from error


@dataclass(frozen=True)
class Suite:
    """A set to evaluate on. figures: in the table's order; worst: the figures that samples are ranked by, the first
    one known counting. refused: samples that cannot be read, and why. source: where it comes from, in words.
    """

    name: str
    title: str
    source: str
    items: tuple[Item, ...]
    refused: Mapping[str, str]
    figures: tuple[Figure, ...]
    worst: tuple[str, ...]

    @property
    def drawn(self) -> bool:
        return self.name == "scenes"

    @property
    def digest(self) -> str:
        """sha256 over all samples, in the order of their names."""
        return sha256_bytes("\n".join(f"{item.name}={item.digest}" for item in self.items).encode("utf-8", "replace"))


def read_suite(name: str, data: Path | None = None, *, count: int = 60, limit: int | None = None) -> Suite:
    """A suite's samples in the order of their names, the first `limit` of them. Raises InputError.

    data: the folder of dragbench or drag100; count: the number of drawn scenes.
    """
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; use {', '.join(SUITES[:-1])} or {SUITES[-1]}")
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit}; it must be at least 1")
    if name == "scenes":
        if data is not None:
            raise InputError(f"scenes are drawn, not read: leave out --data {data}, or name another suite")
        return _scenes(count, limit)
    if data is None:
        raise InputError(
            f"{name} is read from a folder; name the one it was unpacked to with --data, or take --suite scenes, which "
            f"needs none"
        )
    return _published(name, data, limit)


def scene_picture(number: int) -> tuple[bytes, Any]:
    """A held-out scene's picture as PNG, and its true drag."""
    from ddengine.bench.scenes import SIZE, held_out_drag

    drag = held_out_drag(number)
    return png(drag.scene.render(SIZE)), drag


def png(picture: Any) -> bytes:
    """A picture as a PNG file, with its colour profile, as `artifacts.save_picture` writes it."""
    file = io.BytesIO()
    profile = picture.info.get("icc_profile")
    picture.save(file, "PNG", **({"icc_profile": profile} if profile else {}))
    return file.getvalue()


def _scenes(count: int, limit: int | None) -> Suite:
    from ddengine.bench.scenes import SIZE, arrow

    items = []
    for number in range(count if limit is None else min(count, limit)):
        picture, drag = scene_picture(number)
        digest = sha256_bytes(picture + repr(drag).encode())
        items.append(Item(f"{number:03d}-{drag.part}", drag.part, "", (arrow(drag),), (SIZE, SIZE), digest, number))
    source = "drawn pictures with known parts, none of them seen in training"
    return Suite("scenes", "Drawn scenes", source, tuple(items), {}, (GAIN, DISTANCE, PSNR), ("goal_gain",))


def _published(name: str, data: Path, limit: int | None) -> Suite:
    from ddengine.metrics.datasets import read_set

    samples, refused = read_set(data, name)
    names = sorted([*(sample.name for sample in samples), *refused])[:limit]
    kept = set(names)
    items = []
    for sample in samples:
        if sample.name in kept:
            asked = {"drags": _plain(sample.drags), "prompt": sample.prompt}
            content = sample.image.read_bytes() + json.dumps(asked, sort_keys=True).encode()
            digest = sha256_bytes(content)
            items.append(Item(sample.name, sample.category, sample.prompt, sample.drags, sample.size, digest, sample))
    refused = {sample: why for sample, why in refused.items() if sample in kept}
    title = {"dragbench": "DragBench", "drag100": "Drag100"}[name]
    figures = (IF, CLIP, MD, *DAI) if name == "drag100" else (IF, CLIP, MD)
    worst = ("DAI_10", "MD", "IF") if name == "drag100" else ("MD", "IF", "CLIP")
    return Suite(name, title, Path(data).name, tuple(items), refused, figures, worst)


def _plain(drags: Sequence[Drag]) -> list[list[list[float]]]:
    return [[list(drag.handle), list(drag.target)] for drag in drags]
