"""A supersampled drawing surface in picture units (0..1, x right, y down)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 3


class Canvas:
    """Draws flat shapes `SUPERSAMPLING` times larger than `size` pixels and averages them down."""

    def __init__(self, size: int, background: Image.Image) -> None:
        self.size = size
        self.scale = size * SUPERSAMPLING
        self.image = background.resize((self.scale, self.scale), Image.Resampling.BILINEAR)
        self.pen = ImageDraw.Draw(self.image)

    def ellipse(self, centre: Point, radii: Point, fill: Colour) -> None:
        (x, y), (rx, ry), s = centre, radii, self.scale
        self.pen.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self.pen.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=fill)

    def stroke(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A polyline with round joints and ends; `width` in picture units."""
        w = max(1.0, width * self.scale)
        xy = [(x * self.scale, y * self.scale) for x, y in points]
        self.pen.line(xy, fill=fill, width=round(w), joint="curve")
        for x, y in (xy[0], xy[-1]):
            self.pen.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=fill)

    def finish(self) -> Image.Image:
        return self.image.reduce(SUPERSAMPLING)


def curve(start: Point, control: Point, end: Point, steps: int = 12) -> list[Point]:
    """Points of the quadratic Bezier curve from `start` to `end`."""
    out = []
    for k in range(steps + 1):
        t = k / steps
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        out.append((a * start[0] + b * control[0] + c * end[0], a * start[1] + b * control[1] + c * end[1]))
    return out


def regular(centre: Point, radius: float, corners: int, turn: float, inner: float = 1.0) -> list[Point]:
    """Corners of a regular polygon, or of a star when `inner` < 1 (every second corner drawn in)."""
    n = corners if inner == 1.0 else 2 * corners
    radii = (radius, radius * inner)
    return [
        (
            centre[0] + radii[k % 2] * math.cos(turn + 2 * math.pi * k / n),
            centre[1] + radii[k % 2] * math.sin(turn + 2 * math.pi * k / n),
        )
        for k in range(n)
    ]


def backdrop(size: int, top: Colour, bottom: Colour, texture: float, seed: int) -> Image.Image:
    """A vertical gradient from `top` to `bottom` with soft noise of amplitude `texture` (levels of 255)."""
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    ground = np.asarray(top, np.float32) * (1 - ramp) + np.asarray(bottom, np.float32) * ramp
    picture = np.broadcast_to(ground, (size, size, 3)).copy()
    if texture > 0:
        noise = np.random.default_rng(seed).normal(0, texture, (10, 10, 3)).astype(np.float32)
        noise = noise.mean(2, keepdims=True) + 0.3 * noise
        planes = [Image.fromarray(noise[..., c]).resize((size, size), Image.Resampling.BICUBIC) for c in range(3)]
        picture += np.stack([np.asarray(p) for p in planes], 2)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
