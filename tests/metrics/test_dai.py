"""DAI: known patches, the published division undone, borders."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.metrics.dai import RADII, dai


def test_a_moved_patch_scores_zero_and_a_constant_difference_its_square() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    moved = np.roll(pixels, (7, 12), (0, 1))
    drag = Drag((30, 25), (42, 32))
    for radius in RADII:
        assert dai(Image.fromarray(pixels), Image.fromarray(moved), [drag], radius) == (0.0,)
    grey, lighter = (Image.new("RGB", (100, 80), (value, 0, 0)) for value in (51, 102))
    for radius in RADII:  # (0.2)² in one channel of each of (1 + 2r)² pixels
        assert dai(grey, lighter, [drag], radius) == (pytest.approx(0.04),)


def test_the_sum_over_a_patch_written_out() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 256, (40, 50, 3), np.uint8) for _ in range(2))
    total = 0.0
    for dy in range(-5, 6):
        for dx in range(-5, 6):
            total += sum((a[20 + dy, 10 + dx, c] / 255 - b[30 + dy, 44 + dx, c] / 255) ** 2 for c in range(3))
    found = dai(Image.fromarray(a), Image.fromarray(b), [Drag((10, 20), (44, 30)), Drag((10.2, 19.7), (44, 30))], 5)
    assert found == (pytest.approx(total / 121), pytest.approx(total / 121))


def test_patches_over_the_border_have_no_value() -> None:
    picture = Image.new("RGB", (50, 40))
    inside = [Drag((5, 5), (44, 34))]
    assert dai(picture, picture, inside, 5) == (0.0,)
    for handle, target in (((4, 5), (44, 34)), ((5, 4), (44, 34)), ((5, 5), (45, 34)), ((5, 5), (44, 35))):
        assert dai(picture, picture, [Drag(handle, target), *inside], 5) == (None, 0.0)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="resize"):
        dai(Image.new("RGB", (50, 40)), Image.new("RGB", (40, 50)), [Drag((5, 5), (6, 6))], 1)
