"""A worker by itself: getting ready, batches, faults of the device and of memory, its end; and with the real engine."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from serve_fakes import FakeEngine, serving, until

from ddengine.config import DirectDragConfig
from ddengine.engine import Engine
from ddengine.errors import BackendUnavailable, InputError, ModelError
from ddengine.memory_errors import memory_errors
from ddengine.serve.contract import Edited, EditJob, Failed, Picture, Prepared, PrepareJob, Queued, Step
from ddengine.serve.limits import Limits
from ddengine.serve.local import LocalWorkers
from ddengine.serve.logs import JsonLines
from ddengine.serve.pictures import from_pil, to_pil
from ddengine.serve.worker import Worker

DRAGS = (((20.0, 30.0), (40.0, 30.0)),)


def picture(size=(80, 64), seed=0) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3))
    return Picture(*size, pixels.astype(np.uint8).tobytes())


def job(name: str, **fields) -> EditJob:
    return EditJob(name, DRAGS, **{"picture": picture(), **fields})


class Line:
    """A worker with a fake engine whose jobs' events are kept by their ids."""

    def __init__(self, engine=None, self_test=False, **limits) -> None:
        self.engine = engine or FakeEngine()
        self.events: dict[str, list] = {}
        self.changed = threading.Condition()
        bounds, self.lost = Limits(**{"progress_s": 0.0, **limits}), []
        self.worker = Worker(self.engine.load, bounds, self_test=self_test, lost=lambda: self.lost.append(True))
        self.wait(lambda: self.worker.readiness().state not in ("loading", "testing"))

    def submit(self, one) -> None:
        def emit(event) -> None:
            with self.changed:
                self.events.setdefault(one.id, []).append(event)
                self.changed.notify_all()

        self.worker.submit(one, emit)

    def wait(self, condition) -> None:
        with self.changed:
            for _ in range(6000):
                if condition():
                    return
                self.changed.wait(0.01)
        raise AssertionError("it did not happen")

    def final(self, name: str):
        self.wait(lambda: isinstance(self.events.get(name, [None])[-1], (Edited, Prepared, Failed)))
        return self.events[name][-1]

    def held(self, stage: str, *jobs) -> None:
        """The first job runs and stays at a stage, the others wait."""
        self.engine.hold = stage
        self.submit(jobs[0])
        assert self.engine.held.wait(60)
        for one in jobs[1:]:
            self.submit(one)


@pytest.fixture
def line():
    made = []

    def make(*args, **kwargs) -> Line:
        made.append(Line(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.engine.go.set()
        one.worker.close()
        assert not one.worker._thread.is_alive()


def test_a_worker_is_ready_only_after_an_edit_has_passed(line):
    engine = FakeEngine()
    engine.error = InputError("not today")
    failed = line(engine, self_test=True)
    state = failed.worker.readiness()
    assert (state.ready, state.state) == (False, "failed") and "not today" in state.reason
    failed.wait(lambda: failed.lost == [True])  # whoever runs the process is told
    failed.submit(job("a"))
    assert failed.final("a").code == "unavailable"
    good = line(FakeEngine(), self_test=True)
    assert good.worker.readiness().ready and good.engine.edits == [1] and good.worker.readiness().about["size"] == 128
    (_, drags, config, _) = good.engine.seen[0]
    assert config == DirectDragConfig.preset(
        "default", n_inference_step=4, drag_end_step=1, track_per_step=1, max_drag_per_track=1
    )
    assert len(drags) == 1
    unready = Worker(lambda: 1 / 0, Limits())
    for _ in range(1000):
        if unready.readiness().state == "failed":
            break
        threading.Event().wait(0.01)
    assert "division" in unready.readiness().reason
    unready.close()


def test_edits_that_wait_together_run_as_one(line):
    it = line(batch=3)
    same = [job(f"same-{number}", picture=picture(seed=number)) for number in range(4)]
    others = [
        job("another size", picture=picture((64, 80))),
        job("another setting", settings=(("r2", 16),)),
        job("another seed", seed=1),
    ]
    it.held("encode", job("first"), same[0], *others, *same[1:])
    it.engine.go.set()
    finals = {name: it.final(name) for name in ["first", *(one.id for one in same + others)]}
    assert all(isinstance(final, Edited) for final in finals.values())
    assert it.engine.edits == [1, 3, 1, 1, 1, 1]
    assert [finals[one.id].batch for one in same] == [3, 3, 3, 1]
    stats = it.worker.stats()
    assert (stats.batches, stats.batched) == (1, 3)
    for one in same:  # each its own picture
        expected = np.asarray(to_pil(one.picture)).copy()
        expected[30, 40] = (255, 0, 0)
        np.testing.assert_array_equal(np.asarray(to_pil(finals[one.id].picture)), expected)


@pytest.mark.parametrize(
    ("backend", "any_batch", "together"),
    [("eager", True, True), ("auto", True, True), ("auto", False, False), ("compile", True, False)],
)
def test_a_batch_only_where_the_passes_take_several(line, backend, any_batch, together):
    engine = FakeEngine()
    engine.backend.name, engine.any_batch = backend, any_batch
    it = line(engine, batch=4)
    it.held("encode", *(job(str(number)) for number in range(3)))
    engine.go.set()
    assert [it.final(str(number)).batch for number in (1, 2)] == ([2, 2] if together else [1, 1])
    assert engine.edits == ([1, 2] if together else [1, 1, 1])


@pytest.mark.parametrize(("error", "code"), [(ModelError("no text encoder"), "invalid"), (KeyError("te"), "internal")])
def test_a_prompt_that_cannot_be_used_fails_its_own_edit_alone(line, error, code):
    engine = FakeEngine()
    edit, passes = engine.edit, engine.passes

    def refuse(prompt) -> None:
        if prompt:
            raise error

    engine.passes = lambda prompt: (refuse(prompt), passes(prompt))[1]
    engine.edit = lambda *args, prompt, **rest: (refuse(prompt), edit(*args, **rest))[1]
    it = line(engine, batch=3)
    it.held("encode", job("first"), job("a", prompt="a cat"), job("b"), job("c"))
    engine.go.set()
    assert it.final("a").code == code
    assert [it.final(name).batch for name in "bc"] == [2, 2] and engine.edits == [1, 2]
    assert it.worker.readiness().ready


def test_what_cannot_be_compared_runs_alone(line):
    it = line(batch=3)
    it.engine.model.size = "unknown"
    it.held("encode", *(job(name) for name in "abc"))
    it.engine.go.set()
    assert [it.final(name).batch for name in "abc"] == [1, 1, 1] and it.worker.readiness().ready


def test_the_engine_is_asked_while_others_look_and_come(line):
    engine, asked, answer = FakeEngine(), threading.Event(), threading.Event()

    def passes(prompt):
        asked.set()
        assert answer.wait(60)
        return SimpleNamespace(any_batch=True)

    engine.passes = passes
    it = line(engine, batch=2)
    it.submit(job("a"))
    assert asked.wait(60)
    seen = []

    def look() -> None:
        it.submit(job("b"))
        seen.extend([it.worker.readiness().ready, it.worker.stats().running, it.worker.stats().queued])
        seen.append(it.worker.cancel("a"))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(30)
    assert seen == [True, 1, 1, True], "they wait for the engine"
    answer.set()
    assert it.final("a").code == "cancelled" and isinstance(it.final("b"), Edited)
    assert engine.edits == [1]  # a batch of one: the other had gone by then


class Untold(Exception):
    def __str__(self) -> str:
        raise ValueError("not even that")


@pytest.mark.parametrize("error", [SystemExit(3), Untold()])
def test_an_error_of_the_worker_itself_ends_it_for_all_to_see(line, caplog, error):
    it = line()
    it.held("encode", job("a"), job("b"))
    it.engine.error = error
    it.engine.go.set()
    assert it.final("a").code == "internal" and it.final("b").code == "unavailable"
    it.wait(lambda: it.lost == [True])
    state = it.worker.readiness()
    assert (state.ready, state.state) == (False, "poisoned") and it.worker.stats().running == 0
    it.submit(job("c"))
    assert it.final("c").code == "unavailable" and it.events["a"].count(it.final("a")) == 1
    (told,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert told.facts == {"edit": "a"} and told.exc_info


def test_lines_of_the_log_name_the_jobs_they_are_about(line, caplog):
    it = line(batch=2)
    it.engine.error = RuntimeError("a bug")
    it.submit(job("a"))
    it.submit(PrepareJob("p", "src", picture()))
    it.final("p")
    it.held("encode", job("b"), job("c"), job("d"))
    it.engine.go.set()
    it.final("d")
    facts = [record.facts for record in caplog.records if record.levelname == "ERROR"]
    assert facts == [{"edit": "a"}, {"source": "p"}, {"edit": "b"}, {"edits": ["c", "d"]}]
    assert json.loads(JsonLines().format(caplog.records[-1]))["edits"] == ["c", "d"]


def test_one_of_a_batch_can_go_and_the_last_one_stops_it(line):
    it = line(batch=4)
    it.held("encode", job("first"), job("a"), job("b"), job("late", deadline_s=60.0), job("c"))
    it.engine.held.clear()
    it.engine.hold = "drag"  # lets the first one go on to there
    it.wait(lambda: it.engine.held.is_set())
    it.engine.held.clear()
    assert it.worker.cancel("first") and it.final("first").code == "cancelled"
    it.wait(lambda: len(it.engine.edits) == 2 and it.engine.held.is_set())
    assert it.engine.edits == [1, 4]
    assert it.worker.cancel("a") and it.final("a").code == "cancelled"
    (late,) = [entry for entry in it.worker._running if entry.job.id == "late"]
    late.ends = 0.0  # as if its time had passed
    assert it.final("late").code == "deadline"
    assert it.engine.stopped == 1  # the batch goes on
    it.engine.go.set()
    assert isinstance(it.final("b"), Edited) and isinstance(it.final("c"), Edited)
    it.engine.go.clear()
    it.engine.held.clear()
    it.held("drag", job("d"), job("e"), job("f"))
    it.worker.cancel("d")
    it.engine.held.clear()
    it.wait(lambda: it.engine.edits[-1] == 2 and it.engine.held.is_set())
    assert it.worker.cancel("e") and it.worker.cancel("f")
    it.wait(lambda: it.engine.stopped == 3)
    assert not it.worker.cancel("f")


def test_a_batch_that_does_not_fit_is_taken_apart(line):
    engine, tried = FakeEngine(), []

    def edit_batch(edits, **rest):
        tried.append(len(edits))
        raise InputError("cuda has not enough memory for it")

    engine.edit_batch = edit_batch
    it = line(engine, batch=2)
    it.held("encode", job("a"), job("b", picture=picture(seed=1)), job("c", picture=picture(seed=2)))
    engine.go.set()
    finals = [it.final(name) for name in "bc"]
    assert tried == [2] and engine.edits == [1, 1, 1] and it.worker.stats().batches == 0
    assert [final.batch for final in finals] == [1, 1]
    for seed, final in zip((1, 2), finals, strict=True):
        expected = np.asarray(to_pil(picture(seed=seed))).copy()
        expected[30, 40] = (255, 0, 0)
        np.testing.assert_array_equal(np.asarray(to_pil(final.picture)), expected)


def test_all_of_a_batch_are_told_when_its_results_cannot_be_used(line):
    engine = FakeEngine()
    engine.edit_batch = lambda edits, **rest: [SimpleNamespace(image=None) for _ in edits]
    it = line(engine, batch=3)
    it.held("encode", *(job(name) for name in "abcd"))
    engine.go.set()
    assert [it.final(name).code for name in "bcd"] == ["internal"] * 3 and it.worker.readiness().ready


def test_a_fault_of_the_device_poisons_the_worker(line):
    it = line()
    it.held("encode", job("a"), job("b"), job("c"))
    it.engine.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    it.engine.go.set()
    for name in "abc":
        assert it.final(name).code == "unavailable" and "replaced" in it.final(name).message
    state = it.worker.readiness()
    assert (state.ready, state.state) == (False, "poisoned") and "illegal memory" in state.reason
    it.submit(job("d"))
    assert it.final("d").code == "unavailable" and it.engine.edits == [1]
    it.wait(lambda: it.lost == [True])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("the picture is too plain"), "invalid"),
        (MemoryError(), "out_of_memory"),
        (BackendUnavailable("build it: /home/user/cache"), "invalid"),
        (RuntimeError("a bug"), "internal"),
        (KeyError("a bug"), "internal"),
    ],
)
def test_other_errors_end_one_job_alone(line, error, code):
    it = line()
    it.engine.error = error
    it.submit(job("a"))
    assert it.final("a").code == code and "/home" not in it.final("a").message
    it.submit(PrepareJob("p", "src", picture()))
    assert it.final("p").code == code
    it.engine.error = None
    it.submit(job("b"))
    assert isinstance(it.final("b"), Edited) and it.worker.readiness().ready


def test_too_little_memory_is_recognised_as_the_engine_says_it(line):
    it = line()
    with pytest.raises(InputError) as caught, memory_errors(torch.device("cpu"), (128, 128)):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    it.engine.error = caught.value
    it.submit(job("a"))
    assert it.final("a").code == "out_of_memory"


def test_the_line_is_bounded_and_told(line):
    it = line(queue=1)
    it.held("encode", *(job(str(number)) for number in range(5)))
    assert [it.events[str(number)][0] for number in range(3)] == [Queued(0), Queued(1), Queued(2)]
    for number in (3, 4):
        assert it.final(str(number)).code == "busy"
    assert (it.worker.stats().running, it.worker.stats().queued) == (1, 2)


def test_the_end_of_a_worker(line):
    """What runs may end in the time given; what is left then is told so, and nothing new is taken."""
    it = line()
    it.held("drag", job("a"), job("b"))
    closing = threading.Thread(target=it.worker.close, args=(20,))
    closing.start()
    it.wait(lambda: it.worker.readiness().state == "draining")
    it.submit(job("c"))
    assert it.final("c").code == "unavailable"
    it.engine.go.set()
    closing.join(20)
    assert isinstance(it.final("a"), Edited) and isinstance(it.final("b"), Edited)
    it = line()
    it.held("drag", job("a"), job("b"))
    it.worker.close(0.05)
    assert [it.final(name).code for name in "ab"] == ["unavailable", "unavailable"]


def test_progress_is_told_at_its_pace(line):
    told = []
    for pace in (0.0, 60.0):
        it = line(FakeEngine(steps=50), progress_s=pace)
        it.submit(job("a"))
        it.final("a")
        told.append([event for event in it.events["a"] if isinstance(event, Step)])
    assert len(told[0]) == 50 * 7
    assert [(step.stage, step.step) for step in told[1]][:4] == [
        ("encode", 1),
        ("encode", 50),
        ("invert", 1),
        ("invert", 50),
    ]


async def test_leaving_the_events_cancels_the_job():
    engine = FakeEngine()
    engine.hold = "drag"
    workers = LocalWorkers.start(engine.load, Limits(), self_test=False)
    await until(lambda: workers.worker.readiness().ready)
    events = workers.edit(job("a"))
    async for event in events:
        if isinstance(event, Step):
            break
    await events.aclose()
    await until(lambda: engine.stopped == 1)
    engine.held.clear()
    reading = asyncio.ensure_future(ended(workers, job("b")))
    await until(engine.held.is_set)
    reading.cancel()
    await until(lambda: engine.stopped == 2)
    assert reading.cancelled() and workers.worker.cancel("b") is False
    await workers.close()


async def test_a_source_whose_reader_leaves_when_it_is_there_already_is_not_kept():
    engine = FakeEngine()
    workers = LocalWorkers.start(engine.load, Limits(), self_test=False)
    await until(lambda: workers.worker.readiness().ready)
    events = workers.prepare(PrepareJob("p", "src", picture()))
    assert isinstance(await anext(events), Queued)
    await until(lambda: workers.worker.stats().sources == 1)  # its last event waits to be read
    await events.aclose()
    assert workers.worker.stats().sources == 0
    await workers.close()


def test_a_source_that_is_cancelled_while_it_is_put_away_is_not_kept(line):
    it = line()
    prepare = it.engine.prepare

    class Cancelling:
        @property
        def total(self) -> int:
            assert it.worker.cancel("p")
            return 1000

    def prepared(*args, **kwargs):
        source = prepare(*args, **kwargs)
        source.nbytes = Cancelling()
        return source

    it.engine.prepare = prepared
    it.submit(PrepareJob("p", "src", picture()))
    assert it.final("p").code == "cancelled" and it.worker.stats().sources == 0


def test_a_source_that_has_expired_is_let_go_of_without_anybody_asking(line):
    it = line(source_s=0.05)
    it.submit(PrepareJob("p", "src", picture()))
    assert isinstance(it.final("p"), Prepared)
    it.wait(lambda: not it.worker.sources._kept)


# The real engine.

QUICK = (
    ("n_inference_step", 3), ("drag_end_step", 1), ("track_per_step", 1), ("max_drag_per_track", 2),
    ("latent_warpage", False),
)  # fmt: skip
MOVED = (((60.0, 60.0), (80.0, 60.0)),)


@pytest.fixture(scope="module")
def real():
    return Engine.load("embedded", backend="eager", device="cpu")


def drawn(seed: int) -> Picture:
    rows, columns = np.mgrid[:128, :128]
    pixels = np.stack([rows * 2, columns * 2, 30 * seed + 0 * rows], -1)
    pixels[(rows - 60) ** 2 + (columns - 60) ** 2 < 300] = (255, 255 - 40 * seed, 0)
    return from_pil(Image.fromarray(pixels.astype(np.uint8)))


async def ended(workers, one):
    return [event async for event in workers.edit(one)][-1]


async def test_edits_at_once_give_the_bytes_of_edits_one_by_one_and_of_the_engine(real, intake):
    jobs = [EditJob(str(n), MOVED, drawn(n), settings=QUICK, seed=n) for n in range(2)]
    async with serving(real, intake) as it:
        alone = [await ended(it.workers, one) for one in jobs]
        together = await asyncio.gather(*(ended(it.workers, one) for one in jobs))
        source = PrepareJob("p", "src", drawn(1), settings=QUICK)
        assert isinstance([event async for event in it.workers.prepare(source)][-1], Prepared)
        prepared = await ended(it.workers, EditJob("s", MOVED, source="src", seed=1))
        wrong = await ended(it.workers, EditJob("w", MOVED, source="src", settings=(("n_inference_step", 8),)))
    assert [final.picture for final in alone] == [final.picture for final in together]
    assert len({final.picture.rgb for final in alone}) == 2
    config = DirectDragConfig.preset("default", **dict(QUICK))
    for one, final in zip(jobs, alone, strict=True):
        expected = real.edit(to_pil(one.picture), MOVED, config=config, seed=one.seed)
        assert final.picture.rgb == expected.image.tobytes() and final.handles == expected.handles
        assert final.passes == expected.passes
    assert prepared.picture == alone[1].picture and "reference" not in prepared.passes
    assert wrong.code == "invalid" and "prepare" in wrong.message


async def test_a_batch_of_the_real_engine_gives_the_edits_up_to_rounding(real, intake):
    """Alone and in a batch: the same points, and pixels that differ by less than anyone sees."""
    jobs = [EditJob(str(n), MOVED, drawn(n), settings=QUICK) for n in range(2)]
    async with serving(real, intake, batch=2) as it:
        alone = [await ended(it.workers, one) for one in jobs]
        first = asyncio.ensure_future(ended(it.workers, EditJob("x", MOVED, drawn(2), settings=QUICK, seed=1)))
        await until(lambda: it.workers.worker.stats().running == 1)
        together = await asyncio.gather(*(ended(it.workers, one) for one in jobs))
        await first
    assert [final.batch for final in together] == [2, 2]
    for one, other in zip(alone, together, strict=True):
        apart = np.abs(
            np.frombuffer(one.picture.rgb, np.uint8).astype(int) - np.frombuffer(other.picture.rgb, np.uint8)
        )
        assert apart.mean() < 0.5 and np.abs(np.subtract(one.handles, other.handles)).max() < 1


@pytest.mark.parametrize("stage", ["encode", "invert", "reference", "drag", "denoise"])
async def test_the_real_engine_stops_at_the_step_after_a_cancel(real, intake, stage):
    seen, over = [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def emit(event) -> None:  # in the worker's thread: the engine waits for it
        seen.append(event)
        if isinstance(event, Step) and event.stage == stage:
            assert it.workers.worker.cancel("a")
        elif isinstance(event, (Edited, Failed)):
            loop.call_soon_threadsafe(over.set)

    async with serving(real, intake) as it:
        it.workers.worker.submit(EditJob("a", MOVED, drawn(0), settings=QUICK), emit)
        await over.wait()
    assert isinstance(seen[-1], Failed) and seen[-1].code == "cancelled"
    assert [event.stage for event in seen[:-1] if isinstance(event, Step)].count(stage) == 1
    assert isinstance(seen[-2], Step) and seen[-2].stage == stage  # and none after it
