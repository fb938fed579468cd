"""preserve: untouched pixels come back bit for bit, changed ones are the edit's, and the seam between is soft."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddengine.directdrag import preserve
from ddengine.directdrag.preserve import FEATHER, GROW, change_weight, composite

REACH = GROW + round(3 * FEATHER) + 3  # farthest a change can be felt: widening, feather, first blur


def pictures(height=96, width=128, top=40, left=50, size=16, level=1.0):
    unedited = torch.zeros(1, 3, height, width)
    edited = unedited.clone()
    edited[..., top : top + size, left : left + size] = level
    return edited, unedited


def test_no_change_gives_back_every_bit():
    image = np.random.default_rng(0).integers(0, 256, (333, 401, 3), dtype=np.uint8)
    edited, unedited = pictures(level=0.0)
    weight = change_weight(edited, unedited)
    assert weight.max() == 0
    assert np.array_equal(composite(image, edited + 0.7, weight), image)


def test_a_change_stays_near_itself_and_arrives_whole():
    edited, unedited = pictures()
    weight = change_weight(edited, unedited)
    assert weight[..., 44:52, 54:62].min() > 0.999
    outside = torch.ones(96, 128, dtype=torch.bool)
    outside[40 - REACH : 56 + REACH, 50 - REACH : 66 + REACH] = False
    assert weight[0, 0][outside].max() == 0
    steps = weight[0, 0, 48].diff().abs().max()
    assert 0 < steps < 0.25  # feathered: no hard edge


@given(st.integers(64, 500), st.integers(64, 500), st.integers(0, 80), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_a_large_picture_keeps_its_detail_away_from_the_change(height, width, top, left):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    edited, unedited = pictures(top=top, left=left)
    out = composite(image, edited, change_weight(edited, unedited))
    rows = np.arange(height) * 96 / height
    columns = np.arange(width) * 128 / width
    away_rows = (rows < top - REACH - 2) | (rows > top + 16 + REACH + 2)
    away_columns = (columns < left - REACH - 2) | (columns > left + 16 + REACH + 2)
    away = away_rows[:, None] | away_columns[None, :]
    assert np.array_equal(out[away], image[away])


def test_small_differences_are_the_codec_not_the_edit():
    edited, unedited = pictures(level=0.04)
    assert change_weight(edited, unedited).max() == 0


def test_outside_a_users_mask_every_pixel_stays():
    edited, unedited = pictures()
    mask = torch.zeros(96, 128)
    mask[:, :58] = 1  # the change spans columns 50 to 65
    weight = change_weight(edited, unedited, mask)[0, 0]
    assert weight[:, 58:].max() == 0
    assert weight[48, 50] > 0.5
    assert weight[48].diff().abs().max() < 0.4  # the seam is soft and lies inside


def test_a_users_mask_bounds_pixels_at_full_size():
    image = np.random.default_rng(2).integers(0, 256, (601, 803, 3), dtype=np.uint8)
    edited, unedited = pictures()
    allowed = np.zeros((601, 803), np.float32)
    allowed[281:301, 347:361] = 1  # borders that are no working pixel's
    out = composite(image, edited, change_weight(edited, unedited), allowed)
    assert np.array_equal(out[allowed == 0], image[allowed == 0])
    assert (out[allowed == 1] == 255).all()  # all within the change


@pytest.mark.parametrize("size", [(96, 128), (700, 500), (64, 70)], ids=["same", "larger", "smaller"])
def test_strips_and_the_bounding_box_change_nothing(size, monkeypatch):
    """Against one resize of the whole picture."""
    generator = torch.Generator().manual_seed(0)
    edited = torch.rand(1, 3, 96, 128, generator=generator) * 2 - 1
    weight = torch.zeros(1, 1, 96, 128)
    weight[..., 20:70, 0:60] = torch.rand(50, 60, generator=generator)
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    share, *levels = (
        np.asarray(Image.fromarray(plane.numpy()).resize(size[::-1], kind), np.float64)
        for plane, kind in [(weight[0, 0], 2), *(((channel + 1) * 127.5, 3) for channel in edited[0])]
    )
    expected = image + share[..., None] * (np.stack(levels, -1).clip(0, 255) - image)
    for strip in (256, 7):
        monkeypatch.setattr(preserve, "STRIP", strip)
        out = composite(image, edited, weight)
        assert np.abs(out - expected).max() < 0.52
        assert np.array_equal(out[share == 0], image[share == 0])


def test_a_huge_picture_is_blended_in_little_memory():
    image = np.zeros((4000, 4000, 3), np.uint8)
    edited, weight = torch.ones(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    tracemalloc.start()
    out = composite(image, edited, weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert out.min() == 255
    assert peak < 2 * image.nbytes  # one copy, and strips
