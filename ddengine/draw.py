"""Drawing for people: arrows on a picture, and a picture with its edit side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable

from PIL import Image, ImageDraw

from ddengine.drags import Drag, Point

DISPLAY_SIDE = 512  # smaller pictures are enlarged by a whole factor to at least this long side

# Pillow's shapes are not antialiased: they are drawn up to 4 times larger and reduced, on at most this many pixels a
# side.
_MAX_LAYER = 4096
_CASING = (20, 20, 24, 255)
_SHAFT = (255, 255, 255, 255)
_HANDLE = (255, 59, 48, 255)
_TARGET = (10, 132, 255, 255)


def display_factor(size: tuple[int, int]) -> int:
    """The whole factor by which a picture of `size` (width, height) is enlarged for display; 1 for large ones."""
    return max(1, math.ceil(DISPLAY_SIDE / max(size)))


def enlarged(picture: Image.Image, factor: int) -> Image.Image:
    """The picture `factor` times as large, smoothly interpolated."""
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def with_arrows(picture: Image.Image, drags: Iterable[Drag], factor: int = 1) -> Image.Image:
    """A copy of the picture, `factor` times as large, with an arrow for each drag.

    An arrow has a red dot at the handle, a white shaft and a blue head at the target. The drags' points are (x, y)
    pixels of the picture as given. Every part has a dark casing, so that arrows read on white and on black; widths
    follow the picture's size.
    """
    canvas = enlarged(picture, factor).convert("RGB")
    fine = max(1, min(4, _MAX_LAYER // max(canvas.size)))
    unit = fine * max(1.0, max(canvas.size) / 220)
    for drag in drags:
        _paste_arrow(canvas, _scaled(drag.handle, factor * fine), _scaled(drag.target, factor * fine), unit, fine)
    return canvas


def with_dots(
    picture: Image.Image, handles: Iterable[Point] = (), targets: Iterable[Point] = (), rings: Iterable[Point] = ()
) -> Image.Image:
    """A copy of the picture with the dots of handles (red) and of targets (blue), and white rings around points.

    All are (x, y) pixels of the picture; sizes and casings as of `with_arrows`.
    """
    canvas = picture.convert("RGB")
    fine = max(1, min(4, _MAX_LAYER // max(canvas.size)))
    unit = fine * max(1.0, max(canvas.size) / 220)
    spots = [(point, colour, 2.6) for points, colour in ((targets, _TARGET), (handles, _HANDLE)) for point in points]
    for (x, y), colour, radius in [*spots, *((point, None, 5.0) for point in rings)]:
        reach = math.ceil((radius + 2) * unit / fine)
        side = (2 * reach + 1) * fine
        layer = Image.new("RGBA", (side, side), (*_CASING[:3], 0))
        draw, left, top = ImageDraw.Draw(layer), round(x) - reach, round(y) - reach
        middle = (x - left + 0.5) * fine, (y - top + 0.5) * fine
        for grow, fill in ((0.8 * unit, _CASING), (0.0, colour or _SHAFT)):
            box = [middle[axis] + sign * (radius * unit + grow) for sign in (-1, 1) for axis in (0, 1)]
            if colour is None:
                draw.ellipse(box, outline=fill, width=round(1.1 * unit + 2 * grow))
            else:
                draw.ellipse(box, fill=fill)
        layer = layer.resize((2 * reach + 1, 2 * reach + 1), Image.Resampling.BOX)
        canvas.paste(layer, (left, top), layer)
    return canvas


def side_by_side(pictures: Iterable[Image.Image], gap: int = 12) -> Image.Image:
    """Pictures of one height in a row on white, `gap` pixels apart."""
    row = list(pictures)
    height = max(picture.height for picture in row)
    sheet = Image.new("RGB", (sum(picture.width for picture in row) + gap * (len(row) - 1), height), "white")
    x = 0
    for picture in row:
        sheet.paste(picture, (x, 0))
        x += picture.width + gap
    return sheet


def _scaled(point: Point, scale: float) -> Point:
    return (point[0] + 0.5) * scale, (point[1] + 0.5) * scale


def _paste_arrow(canvas: Image.Image, handle: Point, target: Point, unit: float, fine: int) -> None:
    """Draw one arrow, its points in pixels `fine` times smaller than the canvas', where it covers the canvas."""
    margin = 8 * unit
    left, top = (max(0, math.floor((min(a, b) - margin) / fine)) for a, b in zip(handle, target, strict=True))
    right, bottom = (
        min(side, math.ceil((max(a, b) + margin) / fine))
        for a, b, side in zip(handle, target, canvas.size, strict=True)
    )
    size = (right - left, bottom - top)
    layer = Image.new("RGBA", (size[0] * fine, size[1] * fine), (*_CASING[:3], 0))
    origin = (left * fine, top * fine)
    _arrow(ImageDraw.Draw(layer), _minus(handle, origin), _minus(target, origin), unit)
    layer = layer.resize(size, Image.Resampling.BOX)
    canvas.paste(layer, (left, top), layer)


def _arrow(draw: ImageDraw.ImageDraw, handle: Point, target: Point, unit: float) -> None:
    length = math.dist(handle, target)
    along = ((target[0] - handle[0]) / length, (target[1] - handle[1]) / length)
    head = min(6.5 * unit, 0.6 * length)  # a short arrow keeps its shape
    dot = min(2.6 * unit, 0.3 * length)
    neck = _along(target, along, -head)
    for grow, shaft, tip, start in ((0.8 * unit, _CASING, _CASING, _CASING), (0.0, _SHAFT, _TARGET, _HANDLE)):
        draw.line([handle, _along(neck, along, 0.2 * head)], fill=shaft, width=round(1.5 * unit + 2 * grow))
        draw.polygon(_head(target, along, head, 0.42 * head, grow), fill=tip)
        radius = dot + grow
        draw.ellipse([handle[0] - radius, handle[1] - radius, handle[0] + radius, handle[1] + radius], fill=start)


def _head(tip: Point, along: Point, length: float, half: float, grow: float) -> list[Point]:
    """The triangle of an arrow's head whose every side lies `grow` further out."""
    across = (-along[1], along[0])
    slant = math.hypot(length, half)
    point = _along(tip, along, grow * slant / half)
    wing = half + grow * (half + slant) / length
    base = _along(tip, along, -length - grow)
    return [point, _along(base, across, wing), _along(base, across, -wing)]


def _along(point: Point, direction: Point, distance: float) -> Point:
    return point[0] + direction[0] * distance, point[1] + direction[1] * distance


def _minus(a: Point, b: Point) -> Point:
    return a[0] - b[0], a[1] - b[1]
