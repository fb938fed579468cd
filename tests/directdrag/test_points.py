"""Points on their way to the feature grid and back: the published rules, and ours to sub-pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddengine.config import DirectDragConfig
from ddengine.directdrag.points import image_points, points_for
from ddengine.drags import Drag, fit

AUTHORS, OURS = DirectDragConfig.preset("authors"), DirectDragConfig()


def test_golden_conversions(golden: Path) -> None:
    for case in json.loads((golden / "units" / "point_conversion.json").read_text()):
        spaces = fit(case["width"], case["height"], 512, upscale=False, snap=1)
        points = case["points_xy_in"]
        drags = [Drag(tuple(a), tuple(b)) for a, b in zip(points[0::2], points[1::2], strict=True)]
        handles, targets = points_for(AUTHORS, drags, spaces)
        assert handles.tolist() == case["handles_yx"]
        assert targets.tolist() == case["targets_yx"]
        assert image_points(AUTHORS, handles, spaces).tolist() == case["handles_back_xy"]


def test_the_swapped_clamp_displaces_points_of_wide_pictures() -> None:
    spaces, drags = fit(512, 341, 512, upscale=False, snap=1), [Drag((480.0, 100.0), (500.0, 300.0))]
    swapped = torch.stack(points_for(AUTHORS, drags, spaces))[:, 0]
    assert swapped.tolist() == [[50.0, 164.0], [150.0, 164.0]]  # x 480 and 500 became 328
    straight = torch.stack(points_for(AUTHORS.changed(clamp_swapped=False), drags, spaces))[:, 0]
    assert straight.tolist() == [[50.0, 240.0], [150.0, 250.0]]  # 499, the last that keeps 12 pixels


def test_large_pictures_shrink_and_round() -> None:
    spaces = fit(1024, 600, 512, upscale=False, snap=1)
    handles, _ = points_for(AUTHORS, [Drag((301.0, 205.0), (500.0, 300.0))], spaces)
    assert handles.tolist() == [[51.0, 75.0]]  # (150.5, 102.5) rounds to (150, 102)
    assert image_points(AUTHORS, handles, spaces).tolist() == [[300.0, 204.0]]


@given(
    size=st.tuples(st.integers(64, 3000), st.integers(64, 3000)),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    model_size=st.sampled_from([128, 256, 512]),
)
def test_our_points_return_to_sub_pixel(size, place, model_size) -> None:
    if max(size) > 8 * min(size):
        return
    spaces = fit(*size, model_size)
    x, y = ((side - 1) * share for side, share in zip(size, place, strict=True))
    handles, _ = points_for(OURS, [Drag((x, y), (0.0, 0.0))], spaces)
    scale = max(size) / model_size
    assert image_points(OURS, handles, spaces)[0] == pytest.approx((x, y), abs=1e-3 * max(scale, 1))
    # A centre stays a centre: the same share of the grid, counted from its outer edge.
    shares = (np.array(handles[0].tolist()[::-1]) + 0.5) / np.array(spaces.feature_hw[::-1])
    assert shares == pytest.approx((np.array([x, y]) + 0.5) / np.array(size), abs=1e-5)


def test_a_margin_keeps_points_from_the_border() -> None:
    spaces = fit(512, 256, 512)
    handles, targets = points_for(OURS.changed(clamp_margin=20), [Drag((0.0, 3.0), (511.0, 250.0))], spaces)
    for point, expected in ((handles, (20, 20)), (targets, (491, 235))):
        assert spaces.work_from_feature(point)[0].tolist() == pytest.approx(expected, abs=1e-4)
