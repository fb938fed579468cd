"""Processes that load, answer, die or cannot start, with work that needs no engine."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from ddengine.bench.evaluation.pool import Died, here, in_processes
from ddengine.errors import ModelError


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)  # new processes get this path too
    return importlib.import_module("squares")


def test_processes_answer_what_this_one_does_and_outlive_a_death(work):
    jobs = [n for n in range(12) if n != 7]
    alone = sorted(here(work.squares, jobs))
    assert sorted(in_processes(work.Squares(), iter(jobs), 2)) == alone and len(alone) == 22
    found = list(in_processes(work.Squares(), range(12), 2))
    (dead,) = [answer for _, answer in found if isinstance(answer, Died)]
    assert (dead.job, "signal 9" in dead.error, "--jobs" in dead.error) == (7, True, True)
    assert sorted(pair for pair in found if not isinstance(pair[1], Died)) == sorted([*alone, (7, 7)])


def test_what_cannot_be_loaded_is_raised_here_as_what_it_is(work):
    with pytest.raises(ModelError, match="no weights; fetch them"):
        list(in_processes(work.Squares(broken=True), range(3), 2))


def test_leaving_early_ends_the_processes(work):
    answers = in_processes(work.Squares(), range(100), 2)
    next(answers)
    answers.close()  # waits for them: a process that lived on would hang here
