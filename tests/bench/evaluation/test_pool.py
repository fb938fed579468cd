"""Processes that load, answer, die or cannot start, with work that needs no engine."""

from __future__ import annotations

import importlib
import multiprocessing
from pathlib import Path

import pytest

from ddengine.bench.evaluation.pool import Died, here, in_processes
from ddengine.errors import DDEngineError, ModelError


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


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("opens", [1, 2])
def test_a_worker_that_cannot_start_or_be_replaced_costs_no_other(work, tmp_path: Path, opens: int, dies: bool):
    """Two are asked for. opens=1: one of them never starts; opens=2: the one that meets 7 is not replaced."""
    jobs = [n for n in range(12) if opens == 2 or n != 7]
    found = list(in_processes(work.Scarce(str(tmp_path), opens, dies), jobs, 2))
    assert [answer.job for _, answer in found if isinstance(answer, Died)] == ([7] if opens == 2 else [])
    answers = sorted(pair for pair in found if not isinstance(pair[1], Died))
    assert answers == sorted([*here(work.squares, [n for n in range(12) if n != 7]), *([(7, 7)] if opens == 2 else [])])


def test_without_anybody_left_the_reason_is_raised_but_only_for_jobs_that_are_left(work, tmp_path: Path):
    answers = in_processes(work.Scarce(str(tmp_path), 1), [1, 7, 2], 1)
    assert [next(answers) for _ in range(3)] == [(1, 1), (1, 1), (7, 7)]
    assert isinstance(next(answers)[1], Died)
    with pytest.raises(ModelError, match="no memory; close something"):
        next(answers)
    last = list(in_processes(work.Scarce(str(tmp_path), 3), [1, 7], 1))  # two are opened already
    assert [pair[0] for pair in last] == [1, 1, 7, 7] and len(list(tmp_path.iterdir())) == 3
    with pytest.raises(DDEngineError, match=r"could not start.*signal 9"):
        list(in_processes(work.Scarce(str(tmp_path), 0, dies=True), [1], 2))


def test_leaving_early_ends_the_processes(work):
    answers = in_processes(work.Squares(), range(100), 2)
    next(answers)
    assert multiprocessing.active_children()
    answers.close()  # waits for them
    assert not multiprocessing.active_children()
