"""Arrows under the hand: whatever is clicked, pulled and undone, the drags are an edit that can be run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ddengine.drags import MAX_DRAGS, Drag, parse_drags
from ddengine.ui.arrows import Arrows

SIZE = (96, 64)
A, B, C = (10.0, 10.0), (30.0, 20.0), (50.0, 40.0)

coordinate = st.floats(allow_nan=True, allow_infinity=True, width=16) | st.sampled_from([-5.0, 0.0, 10.2, 63.0, 95.5])
point = st.tuples(coordinate, coordinate)
near = st.sampled_from([0.0, 3.0, 20.0])
action = (
    st.tuples(st.just("click"), point, near)
    | st.tuples(st.just("pull"), point, point, near)
    | st.tuples(st.sampled_from(["undo", "clear"]))
)


def act(arrows, action):
    name, *arguments = action
    return getattr(arrows, name)(*arguments)


@given(st.lists(action, max_size=40))
def test_any_sequence_is_a_valid_edit_that_undo_takes_back(actions):
    arrows = Arrows(SIZE)
    for one in actions:
        before, arrows = arrows, act(arrows, one)
        if arrows.drags:
            assert parse_drags(arrows.drags, *SIZE) == arrows.drags
        assert arrows.start is None or arrows.held is None
        if arrows.held is not None:
            assert arrows.held[0] < len(arrows.drags)
        if one[0] in ("click", "pull", "clear") and (before.drags, before.start) != (arrows.drags, arrows.start):
            undone = arrows.undo()
            assert (undone.drags, undone.start) == (before.drags, before.start)
        assert arrows.hint()
    for _ in range(2 * len(actions) + 1):
        arrows = arrows.undo()
    assert arrows == Arrows(SIZE)


def test_two_clicks_make_an_arrow_and_a_click_near_an_end_moves_it():
    one = Arrows(SIZE).click(A).click(B)
    assert one.drags == (Drag(A, B),)
    held = one.click((31, 21), near=3)
    assert held.held == (0, "target") and held.drags == one.drags
    moved = held.click(C)
    assert moved.drags == (Drag(A, C),) and moved.held is None
    assert moved.undo().drags == one.drags
    assert one.click((12, 11), near=3).click(C).drags == (Drag(C, B),)
    assert held.undo() == one  # what is held is put down first
    assert held.click(A).held == (0, "target")  # on its other end it is no arrow: still in the hand


def test_a_second_click_on_a_start_takes_it_back():
    begun = Arrows(SIZE).click(A)
    assert begun.start == A
    assert begun.click(A).start is None and begun.click(A).drags == ()


def test_a_target_may_lie_on_another_arrows_end():
    assert Arrows(SIZE).click(A).click(B).click(C).click(B, near=5).drags == (Drag(A, B), Drag(C, B))


def test_a_pull_is_an_arrow_or_moves_the_end_it_began_on():
    pulled = Arrows(SIZE).pull(A, B)
    assert pulled.drags == (Drag(A, B),)
    assert pulled.pull((29, 20), C, near=3).drags == (Drag(A, C),)
    assert pulled.pull(C, (60, 60), near=3).drags == (Drag(A, B), Drag(C, (60, 60)))
    assert Arrows(SIZE).click(A).pull((11, 10), B, near=3).drags == (Drag(A, B),)  # from a start that waits
    assert Arrows(SIZE).pull(A, A).drags == ()


def test_no_more_arrows_than_an_edit_takes_and_none_is_lost():
    arrows = Arrows(SIZE)
    for number in range(MAX_DRAGS + 5):
        arrows = arrows.click((number, 1)).click((number, 30))
    assert len(arrows.drags) == MAX_DRAGS and "limit" in arrows.hint()
    cleared = arrows.clear()
    assert cleared.drags == () and cleared.undo().drags == arrows.drags
    assert cleared.clear() == cleared
