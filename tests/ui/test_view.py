"""What is shown: where a click lands, what is drawn, and that nothing is drawn elsewhere."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddengine.drags import Drag
from ddengine.ui.arrows import Arrows
from ddengine.ui.view import MAX_SHOWN, View, data_url, draw_arrows, draw_travel, veil

sides = st.tuples(st.integers(64, 9000), st.integers(64, 9000))


@given(sides, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_point_shown_is_the_point_clicked(size, share):
    view = View(size)
    assert 512 <= max(view.shown) <= MAX_SHOWN
    x, y = view.picture_at(share)
    shown = view.shown_at((x, y))
    clicked = tuple((value + 0.5) / side for value, side in zip(shown, view.shown, strict=True))
    assert clicked == pytest.approx(share, abs=1e-9)
    inside = Arrows(size).inside((x, y))
    assert abs(inside[0] - x) <= 0.5 and abs(inside[1] - y) <= 0.5  # whole pixels, and never outside
    assert 0 <= inside[0] < size[0] and 0 <= inside[1] < size[1]


@given(sides, st.floats())
def test_what_a_browser_says_of_nearness_is_bounded(size, share):
    assert 0 < View(size).near(share) <= 0.06 * max(size)


@pytest.mark.parametrize("share", [(float("nan"), 0.5), (-3.0, 7.0), (float("inf"), float("-inf"))])
def test_what_a_browser_says_of_places_ends_inside(share):
    x, y = Arrows((90, 70)).inside(View((90, 70)).picture_at(share))
    assert 0 <= x <= 89 and 0 <= y <= 69


def changed(a, b):
    """Rows and columns of the picture, in shares, between which two pictures differ."""
    rows, columns = np.nonzero((np.asarray(a) != np.asarray(b)).any(-1))
    return (columns.min() / a.width, rows.min() / a.height, columns.max() / a.width, rows.max() / a.height)


GREY = Image.new("RGB", (200, 100), (90, 90, 90))
VIEW = View((200, 100))
SHOWN = VIEW.enlarge(GREY)


def test_an_arrow_is_drawn_from_its_handle_to_its_target_and_nowhere_else():
    drawn = draw_arrows(SHOWN, VIEW, Arrows((200, 100)).pull((50, 50), (100, 50)))
    assert drawn.size == SHOWN.size
    left, top, right, bottom = changed(SHOWN, drawn)
    assert left == pytest.approx(0.25, abs=0.03) and right == pytest.approx(0.5, abs=0.03)
    assert 0.4 < top < 0.5 < bottom < 0.6
    red, green, blue = drawn.getpixel(tuple(map(round, VIEW.shown_at((50, 50)))))
    assert red > 200 and green < 100 and blue < 100


def test_a_start_has_a_dot_and_what_is_held_a_ring():
    start = draw_arrows(SHOWN, VIEW, Arrows((200, 100)).click((50, 50)))
    left, top, right, bottom = changed(SHOWN, start)
    assert left < 0.25 < right and top < 0.5 < bottom and right - left < 0.06
    arrow = Arrows((200, 100)).pull((50, 50), (100, 50))
    held = draw_arrows(SHOWN, VIEW, arrow.click((100, 50)))
    left, _, right, _ = changed(draw_arrows(SHOWN, VIEW, arrow), held)
    assert 0.45 < left < 0.5 < right < 0.55


def test_a_travelling_handle_is_drawn_where_it_is_even_when_it_has_arrived():
    preview = Image.new("RGB", (64, 32), (90, 90, 90))
    for here in ((60.0, 50.0), (100.0, 50.0)):
        drawn = draw_travel(preview, VIEW, [here], [(100.0, 50.0)])
        x, y = map(round, VIEW.shown_at(here))
        assert drawn.size == SHOWN.size and drawn.getpixel((x, y))[0] > 200
    drawn = draw_travel(preview, VIEW, [(0.0, 0.0)], [(199.0, 99.0)])  # to the corners
    assert drawn.size == SHOWN.size


def test_the_veil_lies_where_nothing_may_change():
    mask = np.zeros((SHOWN.height, SHOWN.width), np.float32)
    mask[:, SHOWN.width // 2 :] = 1
    seen = np.asarray(veil(SHOWN, mask)).astype(int)
    assert (seen[:, SHOWN.width // 2 :] == 90).all()
    assert (seen[:, : SHOWN.width // 2].mean(-1) < 70).all()


def test_a_data_url_holds_the_picture():
    kind, data = data_url(GREY).split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == GREY.size


def test_arrows_of_a_large_picture_are_drawn_on_the_small_one():
    view = View((4000, 2000))
    (drag,) = view.arrows([Drag((1000, 1000), (2000, 1000))])
    assert view.shown == (1024, 512) and drag.handle == pytest.approx((255.6, 255.6), abs=0.1)
