"""A whole picture as a record: a backdrop, subjects from back to front, and the drags that have a true answer."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ddengine.scenes import subjects as s
from ddengine.scenes.canvas import Canvas, Colour, Point, backdrop


@dataclass(frozen=True)
class Scene:
    """Everything needed to draw one picture at any size."""

    top: Colour
    bottom: Colour
    texture: float
    seed: int
    horizon: float | None
    ground: Colour
    subjects: tuple[s.Subject, ...]

    def render(self, size: int) -> Image.Image:
        """The picture, RGB, `size` x `size` pixels."""
        canvas = Canvas(size, backdrop(size, self.top, self.bottom, self.texture, self.seed))
        if self.horizon is not None:
            canvas.polygon([(0, self.horizon), (1, self.horizon), (1, 1), (0, 1)], self.ground)
        for subject in self.subjects:
            subject.draw(canvas)
        return canvas.finish()

    def moved(self, index: int, part: str, dx: float, dy: float) -> Scene:
        """The same scene with one part of subject `index` displaced by (dx, dy) picture units."""
        changed = list(self.subjects)
        changed[index] = changed[index].moved(part, dx, dy)
        return replace(self, subjects=tuple(changed))


@dataclass(frozen=True)
class TrueDrag:
    """A drag whose answer is known: `goal` is `scene` with a part moved from `handle` to `target` (picture units).

    subject: index of the part's owner in the scene; part: the part's name; radius: half its extent.
    """

    scene: Scene
    goal: Scene
    subject: int
    part: str
    handle: Point
    target: Point
    radius: float


def _colour(
    rng: np.random.Generator, light: tuple[float, float] = (0.35, 1.0), vivid: tuple[float, float] = (0.15, 0.95)
) -> Colour:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*vivid), rng.uniform(*light))
    return tuple(round(255 * c) for c in rgb)  # type: ignore[return-value]


def _apart(rng: np.random.Generator, others: tuple[Colour, ...], **ranges: tuple[float, float]) -> Colour:
    """A random colour that the eye can tell from each of `others`."""
    best, distance = _colour(rng, **ranges), -1.0
    for _ in range(8):
        colour = _colour(rng, **ranges)
        nearest = min(math.dist(colour, other) for other in others)
        if nearest > distance:
            best, distance = colour, nearest
        if distance > 110:
            break
    return best


def _place(rng: np.random.Generator, margin: float, low: float = 0.0, high: float = 1.0) -> Point:
    y0, y1 = max(low, margin), min(high, 1 - margin)
    return (rng.uniform(margin, 1 - margin), rng.uniform(min(y0, y1), max(y0, y1)))


def _small(rng: np.random.Generator, amount: float) -> Point:
    return (rng.uniform(-amount, amount), rng.uniform(-amount, amount))


def _face(rng: np.random.Generator, back: tuple[Colour, ...], radius: float) -> s.Face:
    skin = _apart(rng, back, light=(0.6, 1.0), vivid=(0.15, 0.6))
    ears = str(rng.choice(["round", "pointed", "long"]))
    margin = radius * 1.12
    x = rng.uniform(margin, 1 - margin) if margin < 0.5 else 0.5
    y = rng.uniform(min(0.98 - margin, radius * 1.7), 0.98 - radius)
    ear_colour = _apart(rng, (*back, skin)) if rng.random() < 0.6 else s.shade(skin, 0.8)
    return s.Face(
        (x, y),
        radius,
        skin,
        ear_colour,
        _colour(rng, (0.08, 0.45)),
        ears,
        ear_left=_small(rng, 0.16 * radius),
        ear_right=_small(rng, 0.16 * radius),
        gaze=_small(rng, 0.085 * radius),
        mouth=_small(rng, 0.13 * radius),
        nose=_small(rng, 0.07 * radius),
        smile=rng.uniform(-0.25, 0.45),
        eye=rng.uniform(0.18, 0.25),
    )


def _subject(rng: np.random.Generator, back: tuple[Colour, ...], horizon: float | None) -> s.Subject:
    kind = rng.choice(
        ["disc", "solid", "cloud", "boat", "house", "hill", "tree", "flower", "animal", "face"],
        p=[0.16, 0.1, 0.08, 0.1, 0.1, 0.06, 0.1, 0.1, 0.1, 0.1],
    )
    h = 0.55 if horizon is None else horizon
    if kind == "disc":
        r = rng.uniform(0.06, 0.16)
        return s.Disc(_place(rng, r), r, _apart(rng, back, light=(0.6, 1.0)), int(rng.choice([0, 0, 8, 11])))
    if kind == "solid":
        r = rng.uniform(0.07, 0.18)
        inner = 0.5 if rng.random() < 0.3 else 1.0
        return s.Solid(_place(rng, r), r, _apart(rng, back), int(rng.integers(3, 7)), rng.uniform(0, 6.3), inner)
    if kind == "cloud":
        w = rng.uniform(0.2, 0.45)
        return s.Cloud(_place(rng, w / 2, 0.0, max(h, 0.35)), w, _apart(rng, back, light=(0.8, 1.0), vivid=(0.0, 0.2)))
    if kind == "boat":
        w = rng.uniform(0.2, 0.42)
        return s.Boat(_place(rng, w * 0.6, h + 0.02, 0.92), w, _apart(rng, back), _apart(rng, back, light=(0.75, 1.0)))
    if kind == "house":
        w = rng.uniform(0.24, 0.46)
        wall = _apart(rng, back, light=(0.55, 1.0))
        return s.House(
            (rng.uniform(0.6 * w, 1 - 0.6 * w), rng.uniform(max(h, 1.2 * w), 0.98)),
            w,
            wall,
            _apart(rng, (*back, wall)),
            door=(rng.uniform(-0.15, 0.15) * w, 0.0),
            window=_small(rng, 0.1 * w),
            apex=_small(rng, 0.2 * w),
        )
    if kind == "hill":
        return s.Hill(
            _place(rng, 0.15, h - 0.3, h),
            rng.uniform(h, min(1.0, h + 0.1)),
            rng.uniform(0.2, 0.5),
            _apart(rng, back, light=(0.25, 0.85)),
        )
    if kind == "tree":
        r = rng.uniform(0.08, 0.18)
        x, y = _place(rng, r, 0.1, 0.7)
        return s.Tree(
            (x + rng.uniform(-0.08, 0.08), min(1.02, y + rng.uniform(1.6, 2.6) * r)),
            (x, y),
            r,
            _apart(rng, back, light=(0.3, 0.85)),
            bool(rng.random() < 0.4),
        )
    if kind == "flower":
        r = rng.uniform(0.07, 0.15)
        x, y = _place(rng, r, 0.1, 0.65)
        return s.Flower(
            (x + rng.uniform(-0.15, 0.15), min(1.02, y + rng.uniform(0.25, 0.5))),
            (x, y),
            r,
            _apart(rng, back),
            int(rng.integers(5, 9)),
        )
    if kind == "animal":
        size = rng.uniform(0.24, 0.46)
        x = rng.uniform(0.75 * size, max(1 - 0.75 * size, 0.76 * size))
        return s.Animal(
            (x, rng.uniform(max(0.6 * size, h - 0.3 * size), 1 - 0.52 * size)),
            size,
            _apart(rng, back, light=(0.25, 0.95)),
            int(rng.choice([-1, 1])),
            head=_small(rng, 0.1 * size),
            tail=_small(rng, 0.12 * size),
        )
    return _face(rng, back, rng.uniform(0.14, 0.24))


def _separate(a: s.Subject, b: s.Subject) -> bool:
    """Whether two subjects overlap little; ground may lie behind anything."""
    if isinstance(a, s.Hill) or isinstance(b, s.Hill):
        return type(a) is not type(b)
    p, q = a.parts()[-1], b.parts()[-1]
    return math.dist(p.at, q.at) > 0.9 * (p.radius + q.radius) + 0.03


def random_scene(rng: np.random.Generator) -> Scene:
    """A new scene: a large face in about a third of all cases, else one to four subjects before a sky."""
    top = _colour(rng, vivid=(0.05, 0.7))
    bottom = s.shade(top, rng.uniform(0.75, 1.5)) if rng.random() < 0.6 else _colour(rng, vivid=(0.05, 0.6))
    texture = float(rng.choice([0.0, rng.uniform(2, 10)]))
    closeup = rng.random() < 0.35
    horizon = None if closeup or rng.random() < 0.2 else rng.uniform(0.45, 0.8)
    ground = _apart(rng, (top, bottom), light=(0.25, 0.85))
    back = (top, bottom) if horizon is None else (top, bottom, ground)
    seed = int(rng.integers(2**31))
    if closeup:
        things: tuple[s.Subject, ...] = (_face(rng, back, rng.uniform(0.24, 0.36)),)
    else:
        found: list[s.Subject] = []
        for _ in range(int(rng.integers(2, 8))):
            subject = _subject(rng, back, horizon)
            if len(found) < 4 and all(_separate(subject, other) for other in found):
                found.append(subject)
        things = tuple(sorted(found, key=lambda x: not isinstance(x, s.Hill)))
    return Scene(top, bottom, texture, seed, horizon, ground, things)


# A part may travel this share of its own size; the drag stays between the two lengths (picture units).
REACH: dict[str, float] = {"gaze": 0.55, "mouth": 0.7, "nose": 1.2, "ear_left": 1.4, "ear_right": 1.4}
SHORTEST, LONGEST = 0.06, 0.2


def true_drag(
    rng: np.random.Generator, *, accept: Callable[[s.Part], bool] = lambda part: True, tries: int = 200
) -> TrueDrag:
    """A random scene with one part to move and the same scene with it moved."""
    for _ in range(tries):
        scene = random_scene(rng)
        index = int(rng.integers(len(scene.subjects)))
        parts = [p for p in scene.subjects[index].parts() if accept(p)]
        if not parts:
            continue
        part = parts[int(rng.integers(len(parts)))]
        longest = min(LONGEST, REACH.get(part.name, 1.6) * part.radius)
        if longest < SHORTEST:
            continue
        length, angle = rng.uniform(SHORTEST, longest), rng.uniform(0, 2 * math.pi)
        dx, dy = length * math.cos(angle), length * math.sin(angle)
        target = s.add(part.at, dx, dy)
        inside = all(0.08 <= c <= 0.92 for c in (*part.at, *target))
        goal = scene.moved(index, part.name, dx, dy)
        if inside and _visible(scene, goal, part):
            return TrueDrag(scene, goal, index, part.name, part.at, target, part.radius)
    raise RuntimeError(f"no visible drag found in {tries} random scenes")


def _visible(scene: Scene, goal: Scene, part: s.Part) -> bool:
    """Whether moving the part changes the picture clearly and the handle is not hidden behind something else."""
    a, b = (np.asarray(x.render(64), np.float32) for x in (scene, goal))
    changed = np.abs(a - b).max(2) > 24
    row, column = (min(63, int(c * 64)) for c in (part.at[1], part.at[0]))
    near = changed[max(0, row - 4) : row + 5, max(0, column - 4) : column + 5]
    return bool(changed.mean() > 0.004 and near.any())
