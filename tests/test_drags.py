"""Drags are checked, and their points survive every coordinate space."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddengine.drags import MAX_ASPECT, MAX_DRAGS, Drag, Spaces, fit, parse_drags
from ddengine.errors import InputError

WIDTH, HEIGHT = 300, 200
ONE = ((10, 20), (30.5, 40))


@pytest.mark.parametrize(
    "drags",
    [
        [ONE],
        (ONE,),
        [[[10, 20], [30.5, 40]]],
        [Drag((10, 20), (30.5, 40))],
        np.array([ONE]),
        [np.array(ONE)],
        [(np.array([10, 20]), np.array([30.5, 40], np.float32))],
        torch.tensor([ONE]),
        (pair for pair in [ONE]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_spelling_of_drags_gives_the_same_record(drags):
    assert parse_drags(drags, WIDTH, HEIGHT) == (Drag((10.0, 20.0), (30.5, 40.0)),)


def test_corners_are_inside():
    corners = ((0, 0), (WIDTH - 1, HEIGHT - 1))
    assert parse_drags([corners], WIDTH, HEIGHT) == (Drag(*corners),)


@pytest.mark.parametrize(
    ("drags", "says"),
    [
        (ONE, "bare pair"),
        (list(ONE), "bare pair"),
        (np.array(ONE), "bare pair"),
        ([10, 20, 30, 40], "bare pair"),
        (Drag(*ONE), "brackets"),
        ([], "no drags"),
        ((), "no drags"),
        (None, "pairs"),
        (7, "pairs"),
        ("10,20:30,40", "pairs"),
        ({"handle": (1, 2)}, "pairs"),
        (["ab"], "pairs"),
        ([7], "pairs"),
        ([((1, 2), (3, 4), (5, 6))], "3 parts"),
        ([((1, 2),)], "1 parts"),
        ([((1, 2, 3), (4, 5, 6))], "two numbers"),
        ([((1, "2"), (3, 4))], "two numbers"),
        ([((1, None), (3, 4))], "two numbers"),
        ([((True, 2), (3, 4))], "two numbers"),
        ([((1j, 2), (3, 4))], "two numbers"),
        ([(1, (3, 4))], "two numbers"),
        ([((math.nan, 2), (3, 4))], "finite"),
        ([((1, 2), (math.inf, 4))], "finite"),
        ([((1, 2), (3, -math.inf))], "finite"),
        ([((10**400, 2), (3, 4))], "finite"),
        ([((10**5000, 2), (3, 4))], "finite"),
        ([((WIDTH, 2), (3, 4))], "outside"),
        ([((1, 2), (3, HEIGHT))], "outside"),
        ([((-0.01, 2), (3, 4))], "outside"),
        ([((1, 2), (HEIGHT + 1, HEIGHT + 1))], "outside"),
        ([((5, 5), (5.0, 5.0))], "same point"),
        ([Drag((5, 5), (5, 5))], "same point"),
        ([Drag("a", (5, 5))], "two numbers"),
        ([ONE] * (MAX_DRAGS + 1), f"limit is {MAX_DRAGS}"),
        (iter([ONE] * (MAX_DRAGS + 1)), str(MAX_DRAGS)),
        ([[ONE]], "1 parts"),
    ],
)
def test_bad_drags_are_refused_with_the_reason(drags, says):
    with pytest.raises(InputError, match=says):
        parse_drags(drags, WIDTH, HEIGHT)


def _twins(depth):
    value = ()
    for _ in range(depth):
        value = (value, value)
    return value


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("drags", "says"),
    [
        ([(_twins(60), (1, 2))], "two numbers"),
        ([(_nested(5000), (1, 2))], "two numbers"),
        ([((1, _nested(5000)), (1, 2))], "two numbers"),
        ([[1] * 1_000_000], "1000000 parts"),
        ([{"a": _nested(5000)}], "drag 0 is"),
        (np.zeros((5000, 2, 2)), r"array of shape \(5000, 2, 2\)"),
        ([np.zeros((0, 1 << 40))], "array of shape"),
        ([[np.broadcast_to(np.zeros(()), (1 << 30,)), (1, 2)]], "array of shape"),
        (torch.zeros(()).expand(1 << 40), "array of shape"),
    ],
    ids=["doubled", "deep", "deep number", "long", "dictionary", "array", "empty array", "wide point", "tensor"],
)
def test_what_has_no_end_is_refused_in_a_short_message(drags, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_drags(drags, WIDTH, HEIGHT)
    assert len(str(caught.value)) < 300


def test_the_limit_itself_is_allowed():
    assert len(parse_drags([ONE] * MAX_DRAGS, WIDTH, HEIGHT)) == MAX_DRAGS


def test_an_endless_iterable_is_refused_not_awaited():
    def forever():
        while True:
            yield ONE

    with pytest.raises(InputError, match=str(MAX_DRAGS)):
        parse_drags(forever(), WIDTH, HEIGHT)


def test_the_message_names_the_drag_and_the_limits():
    with pytest.raises(InputError) as caught:
        parse_drags([ONE, ((1, 2), (500, 4))], WIDTH, HEIGHT)
    assert all(part in str(caught.value) for part in ("drag 1", "target", "(500, 4)", "299", "199"))


# Odd, tall, wide, tiny and huge sizes all come out of these ranges.
short_side = st.integers(64, 3000)
ratio = st.floats(1, MAX_ASPECT - 0.1)
model_size = st.sampled_from([128, 256, 512, 768])
rules = st.sampled_from([{}, {"upscale": False}, {"upscale": False, "snap": 1}])


@st.composite
def spaces(draw):
    short, longer = draw(short_side), draw(ratio)
    sides = [short, int(short * longer)]
    width, height = sides if draw(st.booleans()) else sides[::-1]
    return fit(width, height, draw(model_size), **draw(rules))


@given(spaces(), st.floats(0, 1), st.floats(0, 1))
def test_points_survive_the_round_trip_through_every_space(space, u, v):
    width, height = space.image_size
    xy_image = np.array([[u * (width - 1), v * (height - 1)]])
    xy_work = space.work_from_image(xy_image)
    yx_feature = space.feature_from_work(xy_work)
    yx_latent = space.latent_from_feature(yx_feature)
    back = space.image_from_work(space.work_from_feature(space.feature_from_latent(yx_latent)))
    assert np.abs(back - xy_image).max() < 1e-6
    assert np.abs(space.feature_from_image(xy_image) - yx_feature).max() < 1e-6
    assert np.abs(space.image_from_feature(yx_feature) - xy_image).max() < 1e-6


@given(spaces(), st.floats(0, 1), st.floats(0, 1))
def test_a_point_of_the_picture_lies_in_the_same_place_of_every_grid(space, u, v):
    """The share of the way across, counted from edge to edge, is the same in each space, in the right
    axis."""
    width, height = space.image_size
    xy_image = np.array([[u * (width - 1), v * (height - 1)]])
    share = (xy_image + 0.5) / (width, height)
    for xy, size in (
        (space.work_from_image(xy_image), space.work_size),
        (space.feature_from_image(xy_image)[:, ::-1], space.feature_hw[::-1]),
        (space.latent_from_feature(space.feature_from_image(xy_image))[:, ::-1], space.latent_hw[::-1]),
    ):
        assert np.abs((xy + 0.5) / size - share).max() < 1e-9
        assert (xy > -0.5).all()
        assert (xy < np.array(size) - 0.5).all()


@given(spaces())
def test_the_size_rule(space):
    width, height = space.work_size
    if space.snapped:
        assert width % 8 == height % 8 == 0
        assert space.latent_hw == (height // 8, width // 8)
        assert space.feature_hw == (4 * space.latent_hw[0], 4 * space.latent_hw[1])
    assert min(space.latent_hw) >= 2
    assert space.feature_hw == (height // 2, width // 2)
    # Each side is within half a snapping step of the common scale.
    scale = max(space.work_size) / max(space.image_size)
    for side, work in zip(space.image_size, space.work_size, strict=True):
        assert abs(work - side * scale) <= (8 if space.snapped else 1) or work == 16


@pytest.mark.parametrize(
    ("size", "model", "rule", "work"),
    [
        ((512, 512), 512, {}, (512, 512)),
        ((1000, 600), 512, {}, (512, 304)),  # 307.2 -> 304
        ((600, 1000), 512, {}, (304, 512)),
        ((100, 64), 256, {}, (256, 160)),  # scaled up; 163.84 -> 160
        ((100, 64), 256, {"upscale": False}, (96, 64)),
        ((4000, 500), 512, {}, (512, 64)),
        ((1024, 128), 128, {}, (128, 16)),
        ((1000, 600), 512, {"upscale": False, "snap": 1}, (512, 307)),
        ((341, 203), 512, {"upscale": False, "snap": 1}, (341, 203)),
    ],
)
def test_working_sizes(size, model, rule, work):
    assert fit(*size, model, **rule).work_size == work


@pytest.mark.parametrize("size", [(64 * MAX_ASPECT + 1, 64), (64, 64 * MAX_ASPECT + 1)])
def test_pictures_too_long_are_refused(size):
    with pytest.raises(InputError, match="8:1"):
        fit(*size, 512)


def test_maps_take_lists_and_tensors_and_keep_their_kind_in_float64():
    space = Spaces((100, 50), (200, 100))
    expected = np.array([[49.5, 99.5]])
    from_list = space.feature_from_image([[99.5, 49.5]])
    from_tensor = space.feature_from_image(torch.tensor([[99.5, 49.5]]))
    assert isinstance(from_list, np.ndarray)
    assert from_tensor.dtype == torch.float64
    np.testing.assert_array_equal(from_list, expected)
    np.testing.assert_array_equal(from_tensor.numpy(), expected)
