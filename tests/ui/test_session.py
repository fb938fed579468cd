"""Sessions and their sources: nobody sees another's, and memory stays within its bounds whatever happens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddengine.config import PRESETS, DirectDragConfig
from ddengine.errors import InputError
from ddengine.ui.session import Limits, Picture, Session, Shelf, serves

PREVIEW = DirectDragConfig.preset("preview")
BYTES = 2 * 3 * 512 * 512  # of a picture that is shown as it is


def picture(name="a.png"):
    return Picture.of(name, Image.new("RGB", (512, 512)))


def source(config=PREVIEW, prompt="", nbytes=1000):
    return SimpleNamespace(prompt=prompt, prepared=SimpleNamespace(config=config), nbytes=SimpleNamespace(total=nbytes))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_sessions_do_not_share_sources():
    shelf, one = Shelf(), picture()
    for key in "ab":
        shelf.session(key)
    made = source()
    shelf.keep("a", one, made)
    assert shelf.source("a", one, "", PREVIEW) is made
    assert shelf.source("b", one, "", PREVIEW) is None
    assert shelf.source("a", picture(), "", PREVIEW) is None
    assert shelf.source("a", one, "a cat", PREVIEW) is None
    assert shelf.source("a", one, "", DirectDragConfig.preset("fast")) is None
    shelf.drop("a")
    assert shelf.source("a", one, "", PREVIEW) is None and shelf.held["sources"] == 0
    shelf.keep("a", one, made)  # of a page that was left meanwhile
    assert shelf.held["sources"] == 0


def test_what_is_unused_leaves_first_and_too_old_leaves_too():
    clock, left = Clock(), []
    shelf = Shelf(Limits(sessions=3, sources=2, source_seconds=10, session_seconds=100), clock=clock)
    shelf.on_drop(lambda session: left.append(session.key))
    for key in "abcd":
        shelf.session(key)
    assert left == ["a"]
    pictures = {key: picture() for key in "bcd"}
    for key in "bc":
        shelf.keep(key, pictures[key], source())
    clock.now = 5
    assert shelf.source("b", pictures["b"], "", PREVIEW)  # used: now c's is the older one
    shelf.keep("d", pictures["d"], source())
    assert [shelf.source(key, pictures[key], "", PREVIEW) is not None for key in "bcd"] == [True, False, True]
    clock.now = 16
    shelf.purge()
    assert shelf.held["sources"] == 0 and len(shelf) == 3
    clock.now = 200
    shelf.session("d")
    assert sorted(left) == ["a", "b", "c"] and len(shelf) == 1


def test_a_page_whose_edit_runs_is_not_too_old():
    clock = Clock()
    shelf = Shelf(Limits(session_seconds=10), clock=clock)
    shelf.session("a").job = SimpleNamespace(ended=SimpleNamespace(is_set=lambda: False))
    clock.now = 50
    shelf.purge()
    assert len(shelf) == 1


steps = st.lists(
    st.tuples(st.sampled_from(["open", "keep", "wait", "drop"]), st.sampled_from("abcde"), st.integers(1, 4)),
    max_size=40,
)


@given(steps)
def test_bounds_hold_whatever_happens(steps):
    clock, limits = Clock(), Limits(3, 5 * BYTES, 50, 3, 6000, 20)
    shelf = Shelf(limits, clock=clock)
    for what, key, amount in steps:
        session = shelf.session(key)
        if what == "open":
            session.open(picture())
        elif what == "keep" and session.base:
            shelf.keep(key, session.base, source(nbytes=1000 * amount))
        elif what == "wait":
            clock.now += 5 * amount
        elif what == "drop":
            shelf.drop(key)
        shelf.purge()
        held = shelf.held
        assert held["sessions"] <= 3 and held["picture_bytes"] <= 5 * BYTES
        assert held["sources"] <= 3 and held["source_bytes"] <= 6000


def test_a_session_chooses_among_its_pictures():
    session = Session("a")
    session.open(picture("cat.png"))
    edited, again = picture("cat-edit1.png"), picture("cat-edit2.png")
    session.last = SimpleNamespace(base=session.base, edited=edited)
    session.choose("cat-edit1.png")
    assert session.base is edited
    session.last = SimpleNamespace(base=edited, edited=again)
    assert list(session.pictures) == ["cat.png", "cat-edit1.png", "cat-edit2.png"]
    assert session.nbytes == 3 * BYTES
    session.choose("somebody-elses.png")
    assert session.base is edited
    session.open(picture("hill.png"))
    assert list(session.pictures) == ["hill.png"] and session.arrows.size == (512, 512)


@pytest.fixture(scope="module")
def prepared():
    import torch

    from ddengine.directdrag.prepare import Prepared

    def make(config):
        appearance = [torch.zeros(1)] if config.readout_guidance is not False and config.drag_end_step else None
        reference = SimpleNamespace(features=[None] * config.drag_end_step, appearance=appearance)
        return Prepared((8, 8), (4, 4), None, None, (), 1, reference, config, {}, {})

    return make


changes = st.fixed_dictionaries(
    {},
    optional={
        "n_inference_step": st.sampled_from([16, 20]),
        "drag_end_step": st.sampled_from([0, 2, 3]),
        "readout_guidance": st.sampled_from([True, False, "auto"]),
        "resize": st.sampled_from(["fit", "shrink"]),
        "rg_grid": st.sampled_from([0, 64]),
        "r2": st.sampled_from([3, 4]),
    },
)


@given(changes, changes)
def test_a_source_that_serves_is_one_the_engine_takes(prepared, made, wanted):
    """Never offers what the engine refuses, for models with a readout head ("auto" guides) and without."""
    made, wanted = (DirectDragConfig.preset("preview", **one) for one in (made, wanted))
    if serves(made, wanted):
        guided = wanted.readout_guidance is not False and wanted.drag_end_step > 0
        prepared(made).check(wanted, guided)
        prepared(made).check(wanted, False)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "preview"])
def test_serving_is_refused_where_the_engine_refuses(prepared, name):
    wanted = DirectDragConfig.preset(name)
    assert not serves(PREVIEW, wanted)
    with pytest.raises(InputError, match="prepare the picture again"):
        prepared(PREVIEW).check(wanted, True)
