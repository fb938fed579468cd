"""The lane: one job at a time and in order, a bounded queue, and stopping that works wherever a job is."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

from ddengine.errors import InputError
from ddengine.progress import Progress
from ddengine.ui import words
from ddengine.ui.lane import MAX_WAITING, Job, Lane

PLAN = {"invert": 10, "drag": 20, "denoise": 10}


@pytest.fixture
def lane():
    made = Lane()
    yield made
    made.close()


def held(go, begun=None):
    """A job that takes steps until it is let go."""

    def work(job):
        if begun:
            begun.set()
        for step in range(1, 100_000):
            job.tell(Progress("drag", min(step, 20), 20))
            if go.wait(0.001):
                return "done"
        raise AssertionError("never let go")

    return Job(work, dict(PLAN))


def test_jobs_run_in_order_and_one_at_a_time(lane):
    running, order = [], []

    def work(number):
        def run(job):
            running.append(number)
            assert len(running) == 1
            order.append(number)
            running.remove(number)
            return number

        return run

    jobs = [Job(work(number), {}) for number in range(MAX_WAITING)]
    for job in jobs:
        lane.add(job)
    assert all(job.ended.wait(10) for job in jobs)
    assert [job.result for job in jobs] == order == list(range(MAX_WAITING))


def test_the_queue_is_counted_and_bounded_and_one_that_waits_can_leave(lane):
    go, begun = threading.Event(), threading.Event()
    first = held(go, begun)
    lane.add(first)
    assert begun.wait(10)
    waiting = [Job(lambda job: "later", {}) for _ in range(MAX_WAITING)]
    for job in waiting:
        lane.add(job)
    assert lane.ahead(first) == 0
    assert [lane.ahead(job) for job in waiting] == list(range(1, MAX_WAITING + 1))
    with pytest.raises(InputError, match=f"{MAX_WAITING} edits wait already, the limit is {MAX_WAITING}"):
        lane.add(Job(lambda job: None, {}))
    assert "Waiting: 1 edit before this one" in words.progress(waiting[0], lane.ahead(waiting[0]))
    assert "Waiting: 3 edits before this one" in words.progress(waiting[2], lane.ahead(waiting[2]))
    assert "Dragging step" in words.progress(first, 0) and "Starting" in words.progress(waiting[0], 0)
    lane.cancel(waiting[0])
    assert waiting[0].ended.is_set() and waiting[0].cancelled and lane.ahead(waiting[1]) == 1
    go.set()
    assert waiting[-1].ended.wait(10) and waiting[-1].result == "later" and first.result == "done"


def test_a_cancel_stops_a_running_job_at_its_next_step_and_the_next_one_runs(lane):
    begun = threading.Event()
    job, after = held(threading.Event(), begun), Job(lambda job: 1, {})
    lane.add(job)
    lane.add(after)
    assert begun.wait(10)
    lane.cancel(job)
    assert job.ended.wait(10) and job.cancelled and job.result is None and job.error is None
    assert after.ended.wait(10) and after.result == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("points is 3; give 2"), "points is 3; give 2"),
        (MemoryError(), "not enough memory"),
        (KeyError("secret"), "KeyError"),
    ],
)
def test_what_goes_wrong_is_a_message_and_the_lane_goes_on(lane, error, said):
    def fail(job):
        raise error

    job, after = Job(fail, {}), Job(lambda job: 1, {})
    lane.add(job)
    lane.add(after)
    assert job.ended.wait(10) and said in job.error and "secret" not in job.error
    assert after.ended.wait(10) and after.result == 1


def test_closing_stops_all_jobs_and_takes_no_more():
    lane, begun = Lane(), threading.Event()
    jobs = [held(threading.Event(), begun), Job(lambda job: 1, {})]
    for job in jobs:
        lane.add(job)
    assert begun.wait(10)
    lane.close()
    assert all(job.ended.is_set() and job.cancelled for job in jobs)
    with pytest.raises(InputError, match="closing"):
        lane.add(Job(lambda job: 1, {}))


def test_a_job_keeps_the_last_handles_and_previews_now_and_then():
    looks = []
    job = Job(lambda job: None, dict(PLAN))
    for step in range(1, 21):
        preview = Image.new("RGB", (8, 8), (step, 0, 0))
        points = np.array([[step, 2.0]])
        job.tell(Progress("drag", step, 20, points, lambda preview=preview: looks.append(1) or preview))
    at, points, shown = job.look()
    assert (at.step, points) == (20, ((20.0, 2.0),))
    assert len(looks) == 1 and shown.getpixel((0, 0)) == (1, 0, 0)  # 20 steps in no time: one preview


def test_the_share_never_falls_and_ends_at_one():
    job, seen = Job(lambda job: None, dict(PLAN)), []
    stages = [("invert", step, 10) for step in range(1, 11)]
    for step in range(1, 11):
        stages += [("drag", 2 * step - 1, 20), ("drag", 2 * step, 20), ("denoise", step, 10)]
    for stage in stages:
        job.tell(Progress(*stage))
        seen.append(job.share())
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1] == 1


def test_dragging_that_ends_early_is_not_waited_for():
    job = Job(lambda job: None, {"drag": 20, "denoise": 10, "decode": 1}, drags=2)
    for stage in (("drag", 1, 20), ("denoise", 1, 10)):
        job.tell(Progress(*stage))
    assert job.share() == pytest.approx((3 * 10 + 2) / 81)
    for stage in (("drag", 2, 20), ("denoise", 2, 10), ("denoise", 10, 10)):
        job.tell(Progress(*stage))
    assert job.share() == pytest.approx(80 / 81)


def test_an_empty_plan_is_no_division():
    assert Job(lambda job: None, {}).share() == 0
