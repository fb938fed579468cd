"""The demo writes pictures that a person can see, with arrows that a person can see."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ddengine.demo import Example, examples, show
from ddengine.drags import Drag
from ddengine.draw import DISPLAY_SIDE, display_factor, side_by_side, with_arrows
from ddengine.errors import InputError

DRAG = Drag((30, 40), (90, 60))


@pytest.mark.parametrize(
    ("size", "factor"),
    [((128, 128), 4), ((100, 64), 6), ((256, 200), 2), ((512, 300), 1), ((900, 700), 1)],
)
def test_small_pictures_are_enlarged_by_a_whole_factor(size, factor):
    assert display_factor(size) == factor
    assert max(size) * factor >= min(DISPLAY_SIDE, max(size))


@pytest.mark.parametrize("ground", ["white", "black", "red", (10, 132, 255), (128, 128, 128)])
def test_arrows_read_on_every_ground(ground):
    """Along the shaft there is something much lighter or darker than the ground; far away nothing has changed."""
    plain = Image.new("RGB", (128, 96), ground)
    drawn = np.asarray(with_arrows(plain, [DRAG], 4)).astype(int)
    assert drawn.shape == (384, 512, 3)
    difference = np.abs(drawn - np.asarray(plain)[0, 0]).max(2)
    for share in np.linspace(0, 1, 9):
        x, y = (4 * (a + share * (b - a) + 0.5) for a, b in zip(DRAG.handle, DRAG.target, strict=True))
        around = difference[round(y) - 9 : round(y) + 10, round(x) - 9 : round(x) + 10]
        assert around.max() > 100
    assert difference[300:].max() == 0
    assert difference[:, :60].max() == 0


def test_the_handle_is_red_and_the_target_blue_where_they_are():
    drawn = with_arrows(Image.new("RGB", (512, 512), "white"), [Drag((100, 200), (300, 400))])
    red, green, blue = drawn.getpixel((100, 200))
    assert red > 200 > 100 > green
    red, green, blue = drawn.getpixel((297, 397))
    assert blue > 200 > 100 > red


def test_arrows_of_any_length_and_place_can_be_drawn():
    picture = Image.new("RGB", (64, 64), "white")
    for drag in (
        Drag((0, 0), (0.25, 0)),
        Drag((0, 0), (63, 63)),
        Drag((63, 0), (0, 63)),
        Drag((5, 60), (5, 63)),
    ):
        assert np.asarray(with_arrows(picture, [drag], 8)).min() < 100
    assert np.asarray(picture).min() == 255


def test_large_pictures_keep_their_size():
    assert with_arrows(Image.new("RGB", (3000, 200)), [DRAG]).size == (3000, 200)


def test_side_by_side():
    sheet = side_by_side([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 20), "blue")], gap=5)
    assert sheet.size == (45, 20)
    assert [sheet.getpixel((x, 10)) for x in (9, 12, 16)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]


def test_show_writes_three_pictures_that_hold_the_edit(tmp_path):
    example = Example("boat", Image.new("RGB", (128, 96), "white"), (DRAG,))
    asked = []

    def editor(picture, drags):
        asked.append((picture.size, drags))
        return Image.new("RGB", picture.size, "green")

    shown = show(example, editor, tmp_path / "new" / "folder")
    assert asked == [((128, 96), (DRAG,))]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "boat-after.png",
        "boat-before.png",
        "boat-side-by-side.png",
    ]
    before, after, both = (np.asarray(Image.open(path)) for path in (shown.before, shown.after, shown.side_by_side))
    assert before.shape == after.shape == (384, 512, 3)
    assert (after == (0, 128, 0)).all()
    np.testing.assert_array_equal(both[:, :512], before)
    np.testing.assert_array_equal(both[:, -512:], after)


def test_a_folder_that_cannot_be_made_is_refused_before_the_edit(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    example = Example("boat", Image.new("RGB", (128, 96), "white"), (DRAG,))
    with pytest.raises(InputError, match="folder"):
        show(example, lambda picture, drags: pytest.fail("edited"), tmp_path / "file")


def test_the_bundled_examples_are_whole():
    found = examples()
    assert len(found) == 3
    assert len({example.name for example in found}) == 3
    for example in found:
        assert example.drags
