"""What can stand in a scene: each subject knows its parts, how to move one, and how to draw itself.

All lengths are in picture units (0..1). A subject is a frozen record; `moved` returns another record, so a drag's
goal picture is drawn by exactly the code that drew the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ddengine.scenes.canvas import Canvas, Colour, Point, curve, regular


@dataclass(frozen=True)
class Part:
    """A landmark of a subject: `at` = the point a user would grab, `radius` = half the part's extent."""

    name: str
    at: Point
    radius: float


class Subject(Protocol):
    """A drawable record with movable parts."""

    def parts(self) -> tuple[Part, ...]: ...

    def moved(self, name: str, dx: float, dy: float) -> Subject: ...

    def draw(self, canvas: Canvas) -> None: ...


def shade(colour: Colour, factor: float) -> Colour:
    """`colour` made darker (`factor` < 1) or lighter (> 1)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(round(255 - (255 - c) / factor) for c in colour)  # type: ignore[return-value]


def add(point: Point, dx: float, dy: float) -> Point:
    return (point[0] + dx, point[1] + dy)


def shifted(subject: Any, name: str, dx: float, dy: float) -> Any:
    """The record `subject` with its point `name` displaced."""
    return replace(subject, **{name: add(getattr(subject, name), dx, dy)})


@dataclass(frozen=True)
class Face:
    """A head with ears, eyes with pupils, nose and mouth."""

    centre: Point
    radius: float
    skin: Colour
    ear: Colour
    iris: Colour
    ears: str  # "round", "pointed" or "long"
    ear_left: Point = (0.0, 0.0)  # displacement of the ear's tip
    ear_right: Point = (0.0, 0.0)
    gaze: Point = (0.0, 0.0)  # displacement of both pupils
    mouth: Point = (0.0, 0.0)
    nose: Point = (0.0, 0.0)
    smile: float = 0.25
    eye: float = 0.2  # radius of an eye, share of the head's

    def parts(self) -> tuple[Part, ...]:
        r = self.radius
        mouth = add(self._mouth(), 0, self.smile * r * 0.25)
        tips = [Part(f"ear_{side}", self._tip(side), r * 0.28) for side in ("left", "right")]
        return (
            *tips,
            Part("gaze", add(self._eye(-1), *self.gaze), r * self.eye),
            Part("mouth", mouth, r * 0.3),
            Part("nose", add(self.centre, self.nose[0], self.nose[1] + 0.16 * r), r * 0.16),
            Part("head", add(self.centre, 0, -0.15 * r), r),
        )

    def moved(self, name: str, dx: float, dy: float) -> Face:
        if name == "head":
            return shifted(self, "centre", dx, dy)
        return shifted(self, name, dx, dy)

    def _eye(self, side: int) -> Point:
        return add(self.centre, side * 0.4 * self.radius, -0.15 * self.radius)

    def _mouth(self) -> Point:
        return add(self.centre, self.mouth[0], self.mouth[1] + 0.45 * self.radius)

    def _root(self, side: str) -> tuple[Point, float]:
        sign = -1 if side == "left" else 1
        angle = {"round": 0.75, "pointed": 0.7, "long": 0.42}[self.ears] * sign
        return add(self.centre, self.radius * math.sin(angle), -self.radius * math.cos(angle)), angle

    def _tip(self, side: str) -> Point:
        root, angle = self._root(side)
        reach = self.radius * {"round": 0.22, "pointed": 0.55, "long": 0.95}[self.ears]
        shift = self.ear_left if side == "left" else self.ear_right
        return add(root, reach * math.sin(angle) + shift[0], -reach * math.cos(angle) + shift[1])

    def draw(self, canvas: Canvas) -> None:
        r, c = self.radius, self.centre
        for side in ("left", "right"):
            (root, angle), tip = self._root(side), self._tip(side)
            if self.ears == "round":
                canvas.ellipse(tip, (0.34 * r, 0.34 * r), self.ear)
                canvas.ellipse(tip, (0.18 * r, 0.18 * r), shade(self.ear, 1.6))
            elif self.ears == "pointed":
                across = (math.cos(angle) * 0.38 * r, math.sin(angle) * 0.38 * r)
                canvas.polygon([add(root, -across[0], -across[1]), tip, add(root, *across), c], self.ear)
            else:
                canvas.stroke([c, root, tip], 0.34 * r, self.ear)
                canvas.stroke([root, tip], 0.14 * r, shade(self.ear, 1.6))
        canvas.ellipse(c, (r, r * 0.95), self.skin)
        for sign in (-1, 1):
            eye = self._eye(sign)
            canvas.ellipse(eye, (r * self.eye, r * self.eye), (250, 250, 246))
            canvas.ellipse(add(eye, *self.gaze), (r * self.eye * 0.55, r * self.eye * 0.55), self.iris)
        nose = add(c, self.nose[0], self.nose[1] + 0.16 * r)
        canvas.polygon(regular(nose, 0.13 * r, 3, math.pi / 2), shade(self.skin, 0.6))
        m, w = self._mouth(), 0.32 * r
        lips = curve(add(m, -w, 0), add(m, 0, self.smile * r), add(m, w, 0))
        canvas.stroke(lips, 0.09 * r, (150, 40, 50))


@dataclass(frozen=True)
class Disc:
    """A sun, moon or ball: a disc, with rays when `rays` > 0 and a highlight."""

    centre: Point
    radius: float
    colour: Colour
    rays: int = 0

    def parts(self) -> tuple[Part, ...]:
        return (Part("disc", self.centre, self.radius),)

    def moved(self, name: str, dx: float, dy: float) -> Disc:
        return shifted(self, "centre", dx, dy)

    def draw(self, canvas: Canvas) -> None:
        c, r = self.centre, self.radius
        if self.rays:
            canvas.polygon(regular(c, 1.55 * r, self.rays, 0.2, inner=0.62), shade(self.colour, 1.25))
        canvas.ellipse(c, (r, r), self.colour)
        canvas.ellipse(add(c, -0.3 * r, -0.3 * r), (0.3 * r, 0.3 * r), shade(self.colour, 1.5))


@dataclass(frozen=True)
class Solid:
    """A plain polygon or star."""

    centre: Point
    radius: float
    colour: Colour
    corners: int
    turn: float
    inner: float = 1.0

    def parts(self) -> tuple[Part, ...]:
        return (Part("shape", self.centre, self.radius),)

    def moved(self, name: str, dx: float, dy: float) -> Solid:
        return shifted(self, "centre", dx, dy)

    def draw(self, canvas: Canvas) -> None:
        canvas.polygon(regular(self.centre, self.radius, self.corners, self.turn, self.inner), self.colour)


@dataclass(frozen=True)
class Cloud:
    """Three overlapping ellipses."""

    centre: Point
    width: float
    colour: Colour

    def parts(self) -> tuple[Part, ...]:
        return (Part("cloud", self.centre, self.width * 0.5),)

    def moved(self, name: str, dx: float, dy: float) -> Cloud:
        return shifted(self, "centre", dx, dy)

    def draw(self, canvas: Canvas) -> None:
        c, w = self.centre, self.width
        canvas.ellipse(add(c, -0.28 * w, 0.04 * w), (0.24 * w, 0.16 * w), self.colour)
        canvas.ellipse(add(c, 0.28 * w, 0.05 * w), (0.24 * w, 0.15 * w), self.colour)
        canvas.ellipse(c, (0.28 * w, 0.22 * w), self.colour)


@dataclass(frozen=True)
class Boat:
    """A hull with a mast and a sail."""

    centre: Point  # middle of the deck
    width: float
    hull: Colour
    sail: Colour

    def parts(self) -> tuple[Part, ...]:
        return (Part("boat", add(self.centre, 0.0, 0.02), self.width * 0.6),)

    def moved(self, name: str, dx: float, dy: float) -> Boat:
        return shifted(self, "centre", dx, dy)

    def draw(self, canvas: Canvas) -> None:
        c, w = self.centre, self.width
        canvas.stroke([c, add(c, 0, -0.9 * w)], 0.05 * w, (80, 60, 45))
        canvas.polygon(
            [add(c, 0.05 * w, -0.88 * w), add(c, 0.45 * w, -0.12 * w), add(c, 0.05 * w, -0.12 * w)], self.sail
        )
        canvas.polygon(
            [add(c, -0.06 * w, -0.7 * w), add(c, -0.35 * w, -0.12 * w), add(c, -0.06 * w, -0.12 * w)],
            shade(self.sail, 0.85),
        )
        canvas.polygon(
            [add(c, -0.5 * w, 0), add(c, 0.5 * w, 0), add(c, 0.34 * w, 0.24 * w), add(c, -0.34 * w, 0.24 * w)],
            self.hull,
        )


@dataclass(frozen=True)
class House:
    """Walls, a roof with an apex, a door, a window and a chimney."""

    base: Point  # middle of the floor
    width: float
    wall: Colour
    roof: Colour
    door: Point = (0.0, 0.0)
    window: Point = (0.0, 0.0)
    apex: Point = (0.0, 0.0)

    def parts(self) -> tuple[Part, ...]:
        b, w = self.base, self.width
        return (
            Part("window", add(b, 0.22 * w + self.window[0], -0.42 * w + self.window[1]), 0.13 * w),
            Part("door", add(b, -0.2 * w + self.door[0], -0.18 * w + self.door[1]), 0.14 * w),
            Part("apex", add(b, self.apex[0], -1.08 * w + self.apex[1]), 0.3 * w),
            Part("house", add(b, 0, -0.35 * w), 0.6 * w),
        )

    def moved(self, name: str, dx: float, dy: float) -> House:
        if name == "house":
            return shifted(self, "base", dx, dy)
        return shifted(self, name, dx, dy)

    def draw(self, canvas: Canvas) -> None:
        b, w = self.base, self.width
        canvas.polygon(
            [add(b, -0.5 * w, 0), add(b, -0.5 * w, -0.66 * w), add(b, 0.5 * w, -0.66 * w), add(b, 0.5 * w, 0)],
            self.wall,
        )
        apex = add(b, self.apex[0], -1.15 * w + self.apex[1])
        canvas.polygon([add(b, -0.6 * w, -0.64 * w), apex, add(b, 0.6 * w, -0.64 * w)], self.roof)
        d = add(b, -0.2 * w + self.door[0], self.door[1])
        canvas.polygon(
            [add(d, -0.1 * w, 0), add(d, -0.1 * w, -0.36 * w), add(d, 0.1 * w, -0.36 * w), add(d, 0.1 * w, 0)],
            shade(self.roof, 0.6),
        )
        x = add(b, 0.22 * w + self.window[0], -0.42 * w + self.window[1])
        canvas.polygon(regular(x, 0.17 * w, 4, math.pi / 4), (245, 235, 160))


@dataclass(frozen=True)
class Hill:
    """Ground that rises from both picture edges to a peak."""

    peak: Point
    base: float
    spread: float
    colour: Colour

    def parts(self) -> tuple[Part, ...]:
        return (Part("peak", add(self.peak, 0, 0.03), self.spread * 0.3),)

    def moved(self, name: str, dx: float, dy: float) -> Hill:
        return shifted(self, "peak", dx, dy)

    def draw(self, canvas: Canvas) -> None:
        (x, y), s = self.peak, self.spread
        left = curve((x - 2 * s, self.base), (x - 0.7 * s, self.base), (x, y))
        right = curve((x, y), (x + 0.7 * s, self.base), (x + 2 * s, self.base))
        canvas.polygon([(-0.1, self.base), *left, *right, (1.1, self.base), (1.1, 1.1), (-0.1, 1.1)], self.colour)


@dataclass(frozen=True)
class Tree:
    """A trunk from a fixed root to a crown that can be moved."""

    root: Point
    crown: Point
    radius: float
    leaf: Colour
    pointed: bool

    def parts(self) -> tuple[Part, ...]:
        return (Part("crown", self.crown, self.radius),)

    def moved(self, name: str, dx: float, dy: float) -> Tree:
        return shifted(self, "crown", dx, dy)

    def draw(self, canvas: Canvas) -> None:
        canvas.stroke([self.root, self.crown], 0.28 * self.radius, (96, 66, 44))
        if self.pointed:
            c, r = self.crown, self.radius
            canvas.polygon([add(c, -r, 0.8 * r), add(c, 0, -1.3 * r), add(c, r, 0.8 * r)], self.leaf)
        else:
            canvas.ellipse(self.crown, (self.radius, self.radius), self.leaf)
            canvas.ellipse(
                add(self.crown, -0.25 * self.radius, -0.3 * self.radius),
                (0.4 * self.radius, 0.4 * self.radius),
                shade(self.leaf, 1.25),
            )


@dataclass(frozen=True)
class Flower:
    """A bent stem with a bloom."""

    root: Point
    bloom: Point
    radius: float
    petal: Colour
    petals: int

    def parts(self) -> tuple[Part, ...]:
        return (Part("bloom", self.bloom, self.radius),)

    def moved(self, name: str, dx: float, dy: float) -> Flower:
        return shifted(self, "bloom", dx, dy)

    def draw(self, canvas: Canvas) -> None:
        bend = (self.root[0], (self.root[1] + self.bloom[1]) / 2)
        canvas.stroke(curve(self.root, bend, self.bloom), 0.2 * self.radius, (62, 120, 60))
        for k in range(self.petals):
            a = 2 * math.pi * k / self.petals
            at = add(self.bloom, 0.6 * self.radius * math.cos(a), 0.6 * self.radius * math.sin(a))
            canvas.ellipse(at, (0.42 * self.radius, 0.42 * self.radius), self.petal)
        canvas.ellipse(self.bloom, (0.42 * self.radius, 0.42 * self.radius), (240, 196, 60))


@dataclass(frozen=True)
class Animal:
    """A four-legged animal in profile: body, legs, neck and head, tail."""

    body: Point
    length: float
    coat: Colour
    facing: int  # -1 left, 1 right
    head: Point = (0.0, 0.0)
    tail: Point = (0.0, 0.0)

    def parts(self) -> tuple[Part, ...]:
        s = self.length
        return (
            Part("head", self._head(), 0.2 * s),
            Part("tail", self._tail(), 0.12 * s),
            Part("animal", self.body, 0.6 * s),
        )

    def moved(self, name: str, dx: float, dy: float) -> Animal:
        if name == "animal":
            return shifted(self, "body", dx, dy)
        return shifted(self, name, dx, dy)

    def _head(self) -> Point:
        return add(self.body, self.facing * 0.62 * self.length + self.head[0], -0.36 * self.length + self.head[1])

    def _tail(self) -> Point:
        return add(self.body, -self.facing * 0.72 * self.length + self.tail[0], -0.22 * self.length + self.tail[1])

    def draw(self, canvas: Canvas) -> None:
        b, s, f = self.body, self.length, self.facing
        for k in (-0.34, -0.16, 0.16, 0.34):
            canvas.stroke([add(b, k * s, 0.1 * s), add(b, k * s, 0.5 * s)], 0.1 * s, shade(self.coat, 0.75))
        start = add(b, -f * 0.42 * s, -0.04 * s)
        canvas.stroke([start, self._tail()], 0.09 * s, shade(self.coat, 0.75))
        head = self._head()
        canvas.stroke([add(b, f * 0.36 * s, -0.06 * s), head], 0.2 * s, self.coat)
        canvas.ellipse(b, (0.5 * s, 0.27 * s), self.coat)
        canvas.polygon(
            [
                add(head, -f * 0.16 * s, -0.02 * s),
                add(head, -f * 0.12 * s, -0.3 * s),
                add(head, 0.02 * f * s, -0.1 * s),
            ],
            shade(self.coat, 0.75),
        )
        canvas.ellipse(head, (0.2 * s, 0.16 * s), self.coat)
        canvas.ellipse(add(head, f * 0.06 * s, -0.03 * s), (0.035 * s, 0.035 * s), (20, 20, 24))
