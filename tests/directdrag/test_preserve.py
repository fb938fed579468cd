"""preserve: untouched pixels come back bit for bit, changed ones are the edit's, and the seam between is soft."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert 0 < steps < 0.2  # feathered: no hard edge


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
    assert weight[48].diff().abs().max() < 0.3  # the seam is soft and lies inside
