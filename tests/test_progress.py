"""None, True and callables all become something that stages can report to."""

from __future__ import annotations

import dataclasses

import pytest

from ddengine.errors import Cancelled, InputError
from ddengine.progress import Progress, reporter


def test_progress_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Progress("invert", 1, 38).step = 2


@pytest.mark.parametrize("nothing", [None, False])
def test_nothing_is_silent(nothing, capsys):
    with reporter(nothing) as report:
        report(Progress("invert", 1, 38))
    assert capsys.readouterr() == ("", "")


def test_a_callable_gets_every_record_and_may_stop_the_edit():
    seen = []

    def stop_at_two(at: Progress) -> None:
        seen.append(at)
        if at.step == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"), reporter(stop_at_two) as report:
        for step in (1, 2, 3):
            report(Progress("invert", step, 3))
    assert [at.step for at in seen] == [1, 2]


def test_one_bar_names_the_stages_and_ends_full_even_if_stages_alternate(capsys):
    with reporter(True, plan={"invert": 2, "drag": 2, "denoise": 3}) as report:
        for at in (
            ("invert", 1),
            ("invert", 2),
            ("drag", 1),
            ("denoise", 1),
            ("drag", 2),
            ("denoise", 2),
            ("denoise", 3),
        ):
            report(Progress(at[0], at[1], {"invert": 2, "drag": 2, "denoise": 3}[at[0]]))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1  # one bar, drawn over itself
    assert all(stage in err for stage in ("invert", "drag", "denoise"))
    assert "100%" in err.splitlines()[-1].split("\r")[-1]


def test_the_bar_is_closed_when_the_edit_fails(capsys):
    with pytest.raises(ZeroDivisionError), reporter(True) as report:
        report(Progress("invert", 1, 2))
        1 / 0  # noqa: B018
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.parametrize("wrong", ["yes", 1, 0, [print]])
def test_anything_else_is_refused(wrong):
    with pytest.raises(InputError, match="callable"), reporter(wrong):
        pass
