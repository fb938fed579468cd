"""Variations of one picture: its crop mirrored, its colours a little off, a part of it hidden."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from ddengine.image import to_tensor

COLOUR, HUE = 0.1, 0.05  # largest change of brightness, contrast and saturation; of the hue, in turns
ERASED = (0.02, 0.1)  # share of the area


def augmented(picture: Image.Image, size: int, numbers: np.random.Generator) -> Tensor:
    """One variation of an RGB picture, [1, 3, size, size] in [-1, 1], drawn from `numbers`.

    Shorter side to `size`, random crop, mirrored in one of two, colours changed in random order, and in one of five a
    rectangle made grey: the published code's recipe.
    """
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (int(numbers.integers(side - size + 1)) for side in (width, height))
    crop = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    if numbers.random() < 0.5:
        crop = ImageOps.mirror(crop)
    for change in numbers.permutation(len(_CHANGES)):
        crop = _CHANGES[change](crop, numbers)
    pixels = to_tensor(crop)
    if numbers.random() < 0.2:
        _erase(pixels, numbers)
    return pixels


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
    return lambda picture, numbers: kind(picture).enhance(numbers.uniform(1 - COLOUR, 1 + COLOUR))


def _turned_hue(picture: Image.Image, numbers: np.random.Generator) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    turn = round(numbers.uniform(-HUE, HUE) * 256)
    turned = hue.point([(level + turn) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


_CHANGES = (
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Color),
    _turned_hue,
)


def _erase(pixels: Tensor, numbers: np.random.Generator) -> None:
    side = pixels.shape[-1]
    area = numbers.uniform(*ERASED) * side * side
    shape = math.exp(numbers.uniform(math.log(0.3), math.log(3.3)))
    height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
    top, left = (int(numbers.integers(side - extent + 1)) for extent in (height, width))
    pixels[..., top : top + height, left : left + width] = 0
