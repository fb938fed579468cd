"""Edits over HTTP: pictures and JSON, waiting and following, cancelling, deadlines, keys, places in the queue."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import time
import tracemalloc
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from serve_fakes import EDIT, PICTURE, STAGES, Call, FakeEngine, form, multipart, picture_bytes, serving, until

from ddengine.serve import jobs
from ddengine.serve.contract import Edited, Picture, Queued, Step
from ddengine.serve.jobs import Job

ASYNC = {"Prefer": "respond-async"}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


async def events_of(http, body) -> list[tuple[int, str, dict]]:
    """All server-sent events of an edit."""
    text = (await http.get(body["events"])).text
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(int(block["id"]), block["event"], json.loads(block["data"])) for block in blocks]


async def held(it) -> Call:
    """A client that waits for an edit which stays where its engine's `hold` says."""
    headers, body = multipart()
    call = Call(it.app, "POST", "/v1/edits", headers=headers, body=body)
    await until(it.engine.held.is_set)
    return call


async def test_a_picture_comes_back_in_the_format_asked_for(intake):
    async with serving(intake=intake) as it:
        answers = {}
        for accept in ("*/*", "image/png", "image/webp", "image/jpeg", "image/jpeg;q=0.5, image/webp"):
            answer = answers[accept] = await it.http.post("/v1/edits", **form(), headers={"Accept": accept})
            assert answer.status_code == 200, answer.text
        kinds = {accept: answer.headers["content-type"] for accept, answer in answers.items()}
        assert list(kinds.values()) == ["image/png", "image/png", "image/webp", "image/jpeg", "image/webp"]
        expected = pixels(PICTURE).copy()
        expected[30, 40] = (255, 0, 0)
        for accept in ("*/*", "image/webp"):  # without loss
            np.testing.assert_array_equal(pixels(answers[accept].content), expected)
        assert pixels(answers["image/jpeg"].content).shape == expected.shape
        report = json.loads(answers["*/*"].headers["edit-report"])
        assert report["handles"] == [[40, 30]] and report["passes"]["drag"] == {"forward": 3, "backward": 3}
        answer = await it.http.post("/v1/edits", **form(), headers={"Accept": "text/html"})
        assert answer.status_code == 406


async def test_what_is_asked_for_reaches_the_engine(intake):
    async with serving(intake=intake) as it:
        edit = {"config": "fast", "settings": {"r2": 16, "preserve": False}, "seed": 7}
        answer = await it.http.post("/v1/edits", **form(edit), headers={"Accept": "application/json"})
        body = answer.json()
        assert answer.status_code == 200 and body["state"] == "done" and body["handles"] == [[40.0, 30.0]]
        assert body["timings"]["total"] == 0.7 and body["backend"] == {"drag": "fake"}
        assert (body["picture"]["width"], body["picture"]["height"]) == (80, 64)
        shown = await it.http.get(body["picture"]["href"], headers={"Accept": "image/png"})
        assert pixels(shown.content)[30, 40].tolist() == [255, 0, 7]
        ((image, drags, config, seed),) = it.engine.seen
        np.testing.assert_array_equal(np.asarray(image), pixels(PICTURE))
        assert drags[0].handle == (20, 30) and seed == 7
        assert (config.n_inference_step, config.r2, config.preserve) == (25, 16, False)


async def test_an_edit_in_the_background_is_followed_to_its_end(intake):
    async with serving(intake=intake) as it:
        started = await it.http.post("/v1/edits?async=true", **form({"previews": True}))
        assert started.status_code == 202 and started.headers["location"] == started.json()["href"]
        found = await events_of(it.http, started.json())
        assert [number for number, _, _ in found] == list(range(1, len(found) + 1))
        assert [name for _, name, _ in found] == ["queued", *["progress"] * 14, "done"]
        stages = [data["stage"] for _, name, data in found if name == "progress"]
        assert stages == [stage for stage in STAGES for _ in range(2)]
        assert found[-1][2]["state"] == "done" and found[-1][2]["picture"]["href"]
        assert [data["points"] for _, _, data in found if data.get("stage") == "drag"] == [[[21, 30]], [[22, 30]]]
        # Whoever comes back with the number of the last event gets the rest.
        rest = (await it.http.get(started.json()["events"], headers={"Last-Event-ID": "15"})).text
        assert rest.startswith("id: 16\nevent: done") and rest.count("id:") == 1
        assert (await it.http.get(started.json()["href"])).json()["state"] == "done"


async def test_previews_come_at_their_pace_and_only_the_newest_is_kept(intake):
    async with serving(FakeEngine(steps=4), intake, preview_s=0.0, preview_side=32) as it:
        started = await it.http.post("/v1/edits", **form({"previews": True}), headers=ASYNC)
        found = await events_of(it.http, started.json())
        shown = [data["preview"] for _, _, data in found if "preview" in data]
        (job,) = it.service.jobs._jobs.values()
        assert sum(getattr(event, "preview", None) is not None for _, event in job._events) == 1
        assert shown and shown[-1].startswith("data:image/jpeg;base64,")
        assert Image.open(BytesIO(base64.b64decode(shown[-1].partition(",")[2]))).size == (32, 32)
        plain = await it.http.post("/v1/edits", **form(), headers=ASYNC)
        assert not any("preview" in data for _, _, data in await events_of(it.http, plain.json()))


async def test_events_reach_a_reader_while_the_edit_runs(intake):
    engine = FakeEngine()
    engine.hold = "drag"
    async with serving(engine, intake) as it:
        started = (await it.http.post("/v1/edits", **form(), headers=ASYNC)).json()
        call = Call(it.app, "GET", started["events"])
        text = b""
        while b'"drag"' not in text:
            text += await asyncio.wait_for(call.sent.get(), 20)
        assert b"event: done" not in text
        state = (await it.http.get(started["href"])).json()
        assert state["state"] == "running" and state["progress"]["stage"] == "drag"
        early = await it.http.get(started["href"] + "/picture")
        assert (early.status_code, early.json()["error"]["code"]) == (409, "not_finished")
        engine.go.set()
        assert b"event: done" in (await call.done()).body
        assert call.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stage", STAGES)
async def test_cancel_works_at_every_stage(intake, stage):
    engine = FakeEngine()
    engine.hold = stage
    async with serving(engine, intake) as it:
        started = (await it.http.post("/v1/edits", **form(), headers=ASYNC)).json()
        await until(engine.held.is_set)
        gone = await it.http.delete(started["href"])
        assert gone.status_code == 200 and gone.json()["state"] == "cancelled"
        await until(lambda: engine.stopped == 1)  # the engine itself has let go
        assert (await events_of(it.http, started))[-1][1] == "failed"
        answer = await it.http.get(started["href"] + "/picture")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
        engine.hold = None
        assert (await it.http.post("/v1/edits", **form())).status_code == 200  # and the next one works
        assert (await it.http.delete(started["href"])).json()["state"] == "cancelled"


async def test_a_waiting_edit_is_cancelled_without_having_run(intake):
    engine = FakeEngine()
    engine.hold = "encode"
    async with serving(engine, intake) as it:
        first = (await it.http.post("/v1/edits", **form(), headers=ASYNC)).json()
        await until(engine.held.is_set)
        second = (await it.http.post("/v1/edits", **form(), headers=ASYNC)).json()
        await until(lambda: it.workers.worker.stats().queued == 1)
        assert (await it.http.get(second["href"])).json()["queued_behind"] == 1
        assert (await it.http.delete(second["href"])).json()["state"] == "cancelled"
        await until(lambda: it.workers.worker.stats().queued == 0)
        engine.go.set()
        assert (await events_of(it.http, first))[-1][1] == "done"
        assert engine.edits == [1]


@pytest.mark.parametrize("stage", ["encode", "drag", "decode"])
async def test_a_client_that_goes_stops_its_edit(intake, stage):
    engine = FakeEngine()
    engine.hold = stage
    async with serving(engine, intake) as it:
        call = await held(it)
        call.disconnect()
        await until(lambda: engine.stopped == 1)
        assert (await call.done()).status == 499  # for the log: nobody reads it
        await until(lambda: it.service.jobs.open == 0)
        assert b'ddengine_jobs_total{kind="edit",outcome="client_gone"} 1.0' in (await it.http.get("/metrics")).content


async def test_a_server_that_cancels_the_request_stops_its_edit(intake):
    """Servers that tell of a client's leave by cancelling the request's task."""
    engine = FakeEngine()
    engine.hold = "drag"
    async with serving(engine, intake) as it:
        call = await held(it)
        call.task.cancel()
        await until(lambda: engine.stopped == 1 and it.service.jobs.open == 0)


@pytest.mark.parametrize("stage", ["invert", "drag"])
async def test_a_deadline_that_passes(intake, stage):
    engine = FakeEngine()
    engine.hold = stage
    async with serving(engine, intake) as it:
        asking = asyncio.ensure_future(it.http.post("/v1/edits", **form({"deadline_s": 60.0})))
        await until(engine.held.is_set)
        (entry,) = it.workers.worker._running
        assert 0 < entry.ends - time.monotonic() <= 60
        entry.ends = 0.0  # as if its time had passed
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        assert engine.stopped == 1


async def test_a_deadline_holds_where_the_worker_says_nothing(intake):
    async with serving(intake=intake) as it:
        left = asyncio.Event()

        async def silent(job):
            yield Queued(0)
            try:
                await asyncio.Event().wait()
            finally:
                left.set()

        it.workers.edit = silent
        answer = await it.http.post("/v1/edits", **form({"deadline_s": 0.1}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline") and left.is_set()


async def test_a_deadline_passes_in_the_queue_too(intake):
    engine = FakeEngine()
    engine.hold = "encode"
    async with serving(engine, intake) as it:
        await it.http.post("/v1/edits", **form(), headers=ASYNC)
        await until(engine.held.is_set)
        answer = await it.http.post("/v1/edits", **form({"deadline_s": 0.1}))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        assert it.workers.worker.stats().queued == 0
        assert (await it.http.post("/v1/edits", **form({"deadline_s": 1e6}))).status_code == 422


async def test_a_full_queue_says_when_to_come_back(intake):
    engine = FakeEngine()
    engine.hold = "encode"
    async with serving(engine, intake, queue=2) as it:
        started = [(await it.http.post("/v1/edits", **form(), headers=ASYNC)).json() for _ in range(3)]
        for path in ("/v1/edits", "/v1/sources", "/v2/models/ddengine/infer"):
            answer = await it.http.post(path, content=b"x" * 5_000)  # refused before the body is looked at
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1, path
            assert (answer.json()["code"] if "v2" in path else answer.json()["error"]["code"]) == "busy"
        engine.go.set()
        assert [(await events_of(it.http, one))[-1][1] for one in started] == ["done"] * 3
        assert (await it.http.post("/v1/edits", **form())).status_code == 200


async def test_a_refused_request_gives_its_place_back(intake):
    async with serving(intake=intake, queue=0) as it:
        for content in (b"{", json.dumps({**EDIT, "source": "src_x"}).encode(), b'{"drags": []}'):
            answer = await it.http.post("/v1/edits", content=content, headers={"Content-Type": "application/json"})
            assert 400 <= answer.status_code < 500 != 429
        assert (await it.http.post("/v1/edits", **form(picture=b"no picture"))).status_code == 415
        assert it.service.jobs.open == 0
        assert (await it.http.post("/v1/edits", **form())).status_code == 200


async def test_one_key_is_one_edit(intake):
    async with serving(intake=intake) as it:
        key = {"Idempotency-Key": "k-1"}
        first = await it.http.post("/v1/edits", **form(), headers=key)
        again = await it.http.post("/v1/edits", **form(), headers=key)
        assert first.headers["edit-id"] == again.headers["edit-id"] and first.content == again.content
        assert it.engine.edits == [1]
        other = await it.http.post("/v1/edits", **form({"seed": 1}), headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "key_reused")
        assert (await it.http.post("/v1/edits", **form(picture=picture_bytes(seed=1)), headers=key)).status_code == 422
        bad = await it.http.post("/v1/edits", **form(), headers={"Idempotency-Key": "k" * 201})
        assert bad.status_code == 422 and it.service.jobs.open == 0


async def test_one_key_at_once_is_one_edit_and_outlives_all_but_its_last_client(intake):
    engine = FakeEngine()
    engine.hold = "drag"
    async with serving(engine, intake) as it:
        headers, body = multipart()
        headers["Idempotency-Key"] = "k-2"
        calls = [Call(it.app, "POST", "/v1/edits", headers=headers, body=body) for _ in range(3)]
        await until(lambda: engine.held.is_set() and sum(job.waiting for job in it.service.jobs._jobs.values()) == 3)
        calls[0].disconnect()
        assert (await calls[0].done()).status == 499
        engine.go.set()
        answers = [await call.done() for call in calls[1:]]
        assert [call.status for call in answers] == [200, 200] and answers[0].body == answers[1].body
        assert engine.edits == [1] and it.service.jobs.open == 0


async def test_a_key_whose_edit_failed_for_our_reasons_may_be_tried_again(intake):
    engine = FakeEngine()
    engine.error = RuntimeError("something of ours")
    async with serving(engine, intake) as it:
        key = {"Idempotency-Key": "k-3"}
        failed = await it.http.post("/v1/edits", **form(), headers=key)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal")
        assert "something of ours" not in failed.text
        engine.error = None
        assert (await it.http.post("/v1/edits", **form(), headers=key)).status_code == 200


async def test_outcomes_are_kept_within_bounds(intake):
    async with serving(intake=intake, jobs=2) as it:
        ids = [(await it.http.post("/v1/edits", **form({"seed": n}))).headers["edit-id"] for n in range(4)]
        codes = [(await it.http.get(f"/v1/edits/{one}")).status_code for one in ids]
        assert codes == [410, 410, 200, 200]
        assert (await it.http.get("/v1/edits/" + ids[0][:-1] + "x")).status_code == 404
        assert (await it.http.get(f"/v1/edits/{ids[0]}/events")).json()["error"]["code"] == "gone"
    async with serving(intake=intake, job_s=0.05) as it:
        one = (await it.http.post("/v1/edits", **form(), headers={"Idempotency-Key": "k"})).headers["edit-id"]
        await until(lambda: not it.service.jobs._keys and not it.service.jobs._jobs)  # without anybody asking
        assert (await it.http.get(f"/v1/edits/{one}")).status_code == 410
    async with serving(intake=intake, job_bytes=1 << 16) as it:
        big = picture_bytes(size=(200, 200))  # its noise takes more than half of the room
        ids = [(await it.http.post("/v1/edits", **form(picture=big))).headers["edit-id"] for _ in range(2)]
        assert (await it.http.get(f"/v1/edits/{ids[0]}")).status_code == 410


async def test_an_outcome_s_bytes_are_those_that_it_takes():
    """Against what Python allocates, of outcomes with few and many events, points and pictures."""
    now = time.monotonic
    for events, points, preview in ((0, 1, 0), (20, 1, 9000), (700, 1, 9000), (700, 32, 0)):
        gc.collect()
        tracemalloc.start()
        jobs = [Job(f"edt_{number}", "edit", "me", 512, now) for number in range(4)]
        for job in jobs:
            for step in range(events):
                at = tuple((x + step + 0.5, x * step + 0.5) for x in range(points))
                job.add(Step("drag", step + 1000, 2000, at, bytes(preview + step) if preview else None))
            job.add(Edited(Picture(1, 1, b""), ((1.5, 2.5),) * points, {"drag": 0.5}, {"drag": {"forward": 3}}, {}))
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        counted = sum(job.nbytes for job in jobs)
        assert taken <= counted <= 2 * taken, (events, points, preview)


@pytest.mark.parametrize(
    ("error", "status", "code"), [(MemoryError(), 503, "out_of_memory"), (OSError("encoder error -2"), 500, "internal")]
)
async def test_a_result_that_cannot_be_encoded_is_our_fault(intake, monkeypatch, caplog, error, status, code):
    def fail(*_):
        raise error

    async with serving(intake=intake) as it:
        monkeypatch.setattr(jobs, "encoded", fail)
        answer = await it.http.post("/v1/edits", **form(), headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        (told,) = [record for record in caplog.records if record.name == jobs.__name__ and record.exc_info]
        (job,) = it.service.jobs._jobs.values()
        assert told.facts == {"edit": job.id} and job.state == "failed" and it.service.jobs.open == 0
        monkeypatch.undo()
        assert (await it.http.post("/v1/edits", **form(), headers={"Idempotency-Key": "k"})).status_code == 200


async def test_a_stopping_service_ends_what_it_has_and_takes_nothing_new(intake):
    engine = FakeEngine()
    engine.hold = "drag"
    async with serving(engine, intake) as it:
        call = await held(it)
        draining = asyncio.ensure_future(it.service.jobs.drain(20))
        await asyncio.sleep(0)
        refused = await it.http.post("/v1/edits", **form())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in refused.headers
        ready = await it.http.get("/v2/health/ready")
        assert (ready.status_code, ready.json()["state"]) == (503, "draining")
        assert (await it.http.get("/v2/health/live")).status_code == 200
        engine.go.set()
        assert (await call.done()).status == 200
        await draining


async def test_what_does_not_end_in_time_is_cancelled_when_the_service_stops(intake):
    engine = FakeEngine()
    engine.hold = "drag"
    async with serving(engine, intake) as it:
        call = await held(it)
        await it.service.jobs.drain(0.05)
        assert (await call.done()).status == 503 and call.json["error"]["code"] == "unavailable"
        await until(lambda: engine.stopped == 1)
