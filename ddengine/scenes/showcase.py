"""The example pictures: three scenes with chosen numbers, drawn by the code of the training scenes."""

from __future__ import annotations

from ddengine.scenes import subjects as s
from ddengine.scenes.scene import Scene

SIZE = 256


def cat() -> Scene:
    """A cat's face before a soft green wall."""
    face = s.Face(
        centre=(0.5, 0.6), radius=0.27, skin=(236, 176, 96), ear=(196, 118, 52), iris=(24, 70, 40), ears="pointed",
        smile=0.3, eye=0.21,
    )  # fmt: skip
    return Scene((164, 206, 190), (120, 170, 160), 5.0, 11, None, (0, 0, 0), (face,))


def harbour() -> Scene:
    """A sailing boat on dark water under a sun."""
    sun = s.Disc((0.24, 0.22), 0.1, (250, 196, 60))
    boat = s.Boat((0.66, 0.68), 0.3, (176, 44, 40), (250, 246, 236))
    return Scene((126, 182, 232), (214, 228, 238), 0.0, 5, 0.58, (28, 84, 124), (sun, boat))


def meadow() -> Scene:
    """A flower and a house in a meadow."""
    flower = s.Flower((0.26, 0.98), (0.3, 0.5), 0.13, (226, 70, 120), 7)
    house = s.House((0.72, 0.8), 0.34, (238, 214, 168), (158, 62, 48))
    return Scene((158, 206, 240), (226, 238, 244), 4.0, 7, 0.66, (110, 170, 84), (house, flower))


SCENES = {"cat": cat, "harbour": harbour, "meadow": meadow}
