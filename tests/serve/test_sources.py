"""Prepared sources: kept within number, bytes and time; 410 for what is gone, 404 for what never was."""

from __future__ import annotations

import asyncio

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from serve_fakes import EDIT, PICTURE, Call, FakeEngine, form, multipart, picture_bytes, serving, until

from ddengine.serve.contract import Prepared
from ddengine.serve.ids import Ids
from ddengine.serve.sources import Sources


def preparation(picture=PICTURE, options="{}"):
    return form(part="options", edit=options, picture=picture)


async def test_a_source_is_prepared_once_and_edited_often(intake):
    async with serving(intake=intake) as it:
        answer = await it.http.post("/v1/sources", **preparation(options='{"config": "fast"}'))
        made = answer.json()
        assert answer.status_code == 201 and (made["width"], made["height"], made["nbytes"]) == (80, 64, 1000)
        assert made["expires_s"] == it.service.limits.source_s and made["timings"] == {"encode": 0.1}
        for seed in range(2):
            assert (await it.http.post("/v1/edits", json={**EDIT, "source": made["source"], "seed": seed})).is_success
        changed = {"r2": 16}
        await it.http.post("/v1/edits", json={**EDIT, "source": made["source"], "settings": changed})
        configs = [config for _, _, config, _ in it.engine.seen]
        assert [config.n_inference_step for config in configs] == [25] * 3  # the source's own
        assert [config.r2 for config in configs] == [12, 12, 16]
        outside = {"drags": [{"handle": [81, 3], "target": [5, 5]}], "source": made["source"]}
        assert (await it.http.post("/v1/edits", json=outside)).status_code == 422
        assert (
            await it.http.post("/v1/edits", json={**EDIT, "source": made["source"], "prompt": "x"})
        ).status_code == 422
        text = (await it.http.get("/metrics")).text
        assert "ddengine_sources 1.0" in text and "ddengine_source_hits 5.0" in text
        assert (await it.http.delete(f"/v1/sources/{made['source']}")).status_code == 204
        assert (await it.http.delete(f"/v1/sources/{made['source']}")).status_code == 410
        answer = await it.http.post("/v1/edits", json={**EDIT, "source": made["source"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "gone")
        assert (await it.http.post("/v1/sources", **preparation(picture=None))).status_code == 422


async def test_ids_that_were_never_given_are_not_found(intake):
    async with serving(intake=intake) as it:
        made = (await it.http.post("/v1/sources", **preparation())).json()["source"]
        edit = (await it.http.post("/v1/edits", **form())).headers["edit-id"]
        for wrong in (made[:-1] + ("0" if made[-1] != "0" else "1"), "src_x", edit, "../" + made, made + "0"):
            answer = await it.http.post("/v1/edits", json={**EDIT, "source": wrong})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert (await it.http.delete(f"/v1/sources/{edit}")).status_code == 404


async def test_too_many_too_large_too_old(intake):
    engine, now = FakeEngine(), [0.0]
    async with serving(engine, intake, sources=2, source_bytes=1 << 16, source_s=60.0) as it:
        it.workers.worker.sources._clock = lambda: now[0]

        async def prepared(nbytes: int):
            engine.nbytes = nbytes
            return await it.http.post("/v1/sources", **preparation())

        async def status(source: str) -> int:
            return (await it.http.post("/v1/edits", json={**EDIT, "source": source})).status_code

        one, two = [(await prepared(1000)).json()["source"] for _ in range(2)]
        assert await status(one) == 200  # used last: two makes room
        three = (await prepared(1000)).json()["source"]
        assert [await status(source) for source in (one, two, three)] == [200, 410, 200]
        large = (await prepared(65_000)).json()["source"]  # room for nothing else
        assert [await status(source) for source in (one, three, large)] == [410, 410, 200]
        answer = await prepared(66_000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert await status(large) == 200  # nothing was lost for it
        now[0] += 59
        assert await status(large) == 200  # used again: a new time begins
        now[0] += 59
        assert await status(large) == 200
        now[0] += 61
        assert await status(large) == 410
        stats = it.workers.worker.stats()
        assert (stats.sources, stats.source_bytes, stats.source_evictions) == (0, 0, 4)


async def test_an_edit_that_waits_keeps_its_source(intake):
    engine = FakeEngine()
    async with serving(engine, intake, sources=1) as it:
        source = (await it.http.post("/v1/sources", **preparation())).json()["source"]
        engine.hold = "warp"
        first, second = (
            asyncio.ensure_future(it.http.post("/v1/edits", json={**EDIT, "source": source, "seed": n})) for n in (1, 2)
        )
        await until(lambda: engine.held.is_set() and it.workers.worker.stats().queued == 1)
        assert await it.workers.forget(source)
        engine.go.set()
        assert [(await one).status_code for one in (first, second)] == [200, 200]


async def test_a_source_whose_client_goes_is_not_kept(intake):
    engine = FakeEngine()
    engine.hold = "invert"
    async with serving(engine, intake) as it:
        headers, body = multipart(part="options", edit="{}")
        call = Call(it.app, "POST", "/v1/sources", headers=headers, body=body)
        await until(engine.held.is_set)
        call.disconnect()
        await until(lambda: engine.stopped == 1 and it.service.jobs.open == 0)
        assert (await call.done()).status == 499 and it.workers.worker.stats().sources == 0
        engine.hold = None
        assert (await it.http.post("/v1/sources", **preparation(picture_bytes("JPEG")))).status_code == 201


async def test_a_source_that_is_there_just_when_its_client_goes_is_not_kept(intake):
    async with serving(intake=intake) as it:
        waiting, made, forgotten = asyncio.Event(), [], []

        async def prepare(job):
            try:
                waiting.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:  # as if both had come at once
                made.append(job.source)
                yield Prepared(job.source, 80, 64, 1000, 60.0, {}, {})

        async def forget(source):
            forgotten.append(source)
            return True

        it.workers.prepare, it.workers.forget = prepare, forget
        headers, body = multipart(part="options", edit="{}")
        call = Call(it.app, "POST", "/v1/sources", headers=headers, body=body)
        await waiting.wait()
        call.disconnect()
        assert (await call.done()).status == 499
        await until(lambda: made and it.service.jobs.open == 0)
        assert forgotten == made


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "drop", "wait"]), st.integers(0, 5), st.integers(1, 60))))
def test_no_sequence_of_uses_breaks_a_bound(uses):
    """Held against a plain model: an ordered list of (key, bytes, end)."""
    now = 0.0
    sources, model = Sources(3, 100, 50.0, lambda: now), []
    for what, key, number in uses:
        if what == "wait":
            now += number
        model = [entry for entry in model if entry[2] > now]
        if what == "put":
            assert sources.put(str(key), (key, number), number)
            model = [entry for entry in model if entry[0] != key]
            while model and (len(model) >= 3 or sum(entry[1] for entry in model) + number > 100):
                model.pop(0)
            model.append((key, number, now + 50))
        elif what == "get":
            found = sources.get(str(key))
            held = next((entry for entry in model if entry[0] == key), None)
            assert found == (held and (key, held[1]))
            if held:
                model.remove(held)
                model.append((key, held[1], now + 50))
        elif what == "drop":
            assert sources.drop(str(key)) == any(entry[0] == key for entry in model)
            model = [entry for entry in model if entry[0] != key]
        assert sources.usage() == (len(model), sum(entry[1] for entry in model))
    assert not sources.put("large", None, 101)


def test_ids_are_known_by_kind_owner_and_secret():
    ids, other = Ids(), Ids()
    made = ids.new("src", "me")
    assert ids.ours(made, "src", "me")
    assert not ids.ours(made, "edt", "me") and not ids.ours(made, "src", "you") and not other.ours(made, "src", "me")
    for wrong in ("", "src_", made + "a", made.upper(), made.replace(made[6], "é"), "edt" + made[3:], made + "\n"):
        assert not ids.ours(wrong, "src", "me")
    heads = [ids.new("src")[4:28] for _ in range(200)]
    assert len(set(heads)) == 200 and np.mean([len(head) for head in heads]) == 24
