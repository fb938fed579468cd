"""The example pictures: three scenes with chosen numbers, drawn by the code of the training scenes, and a drag each.

`python -m ddengine.scenes.showcase examples` writes them as `examples/` has them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from ddengine.artifacts import atomic_write, save_picture
from ddengine.scenes import subjects as s
from ddengine.scenes.scene import Scene

SIZE = 256


@dataclass(frozen=True)
class Example:
    """A scene and the part of it to drag: index of its subject, the part's name, the displacement (picture units)."""

    scene: Scene
    subject: int
    part: str
    by: tuple[float, float]

    def drag(self) -> list[list[float]]:
        """Handle and target, (x, y) in pixels of the picture, rounded to whole ones as a user would click."""
        at = next(part.at for part in self.scene.subjects[self.subject].parts() if part.name == self.part)
        ends = (at, (at[0] + self.by[0], at[1] + self.by[1]))
        return [[round(c * SIZE - 0.5) for c in end] for end in ends]


def cat() -> Example:
    """A cat's face; its right ear is pulled up."""
    face = s.Face(
        centre=(0.5, 0.6), radius=0.26, skin=(236, 176, 96), ear=(196, 118, 52), iris=(24, 70, 40), ears="pointed",
        smile=0.3, eye=0.21,
    )  # fmt: skip
    wall = Scene((164, 206, 190), (120, 170, 160), 4.0, 11, None, (0, 0, 0), (face,))
    return Example(wall, 0, "ear_right", (0.06, -0.08))


def harbour() -> Example:
    """A sailing boat under a sun; the sun moves on."""
    sun = s.Disc((0.28, 0.26), 0.1, (250, 196, 60))
    boat = s.Boat((0.68, 0.72), 0.3, (176, 44, 40), (250, 246, 236))
    sea = Scene((126, 182, 232), (214, 228, 238), 0.0, 5, 0.58, (28, 84, 124), (sun, boat))
    return Example(sea, 0, "disc", (0.16, -0.02))


def hill() -> Example:
    """A hill in a meadow under a sun; its peak is pulled up."""
    rise, sun = s.Hill((0.5, 0.5), 0.72, 0.4, (90, 140, 100)), s.Disc((0.22, 0.2), 0.1, (250, 196, 60))
    field = Scene((158, 206, 240), (226, 238, 244), 3.0, 7, 0.66, (110, 170, 84), (rise, sun))
    return Example(field, 0, "peak", (0.02, -0.12))


EXAMPLES = {"cat": cat, "harbour": harbour, "hill": hill}


def write(folder: Path) -> None:
    """Write NAME.png for every example and demo.json, which lists them with their drags."""
    entries = []
    for name, make in EXAMPLES.items():
        example = make()
        save_picture(example.scene.render(SIZE), folder / f"{name}.png")
        entries.append({"name": name, "image": f"{name}.png", "drags": [example.drag()]})
    atomic_write(folder / "demo.json", (json.dumps(entries, indent=1) + "\n").encode())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
