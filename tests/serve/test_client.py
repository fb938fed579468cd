"""The client: against a real server over a fake engine, and against answers made up to be difficult."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from io import BytesIO
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from serve_fakes import PICTURE, STAGES, FakeEngine

from ddengine import client as module
from ddengine.client import Client, RefusedInput, RemoteCancelled, ServiceError
from ddengine.errors import Cancelled, InputError
from ddengine.serve.app import create_app
from ddengine.serve.limits import Limits
from ddengine.serve.local import LocalWorkers

DRAGS = [((20, 30), (40, 30))]
KEY = "a key of tests 0123".replace(" ", "-")


@pytest.fixture
def live(intake):
    """A service in a thread of its own on a free port, with a key, and a client of it."""
    limits = Limits(progress_s=0.0, preview_s=0.0, drain_s=0.5, queue=2)
    engine = FakeEngine()
    workers = LocalWorkers.start(engine.load, limits, self_test=False)
    app = create_app(workers, limits, KEY)
    app.state.service.intake.close()
    app.state.service.intake = intake
    app.state.service.stop = lambda: app.state.service.jobs.drain(0.2)  # not the intake: it is all tests'
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    ends = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < ends, "the server does not start"
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with Client(url, KEY, timeout=60) as found:
        yield SimpleNamespace(client=found, url=url, engine=engine, workers=workers, service=app.state.service)
    engine.go.set()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def picture() -> Image.Image:
    return Image.open(BytesIO(PICTURE))


def test_an_edit_comes_back_whole(live, tmp_path):
    assert live.client.ready()
    result = live.client.edit(picture(), DRAGS, config="fast", settings={"r2": 16}, seed=7)
    expected = np.asarray(picture()).copy()
    expected[30, 40] = (255, 0, 7)
    np.testing.assert_array_equal(np.asarray(result.image), expected)
    assert result.handles == ((40.0, 30.0),) and result.timings["total"] == 0.7 and result.batch == 1
    assert result.passes == {"drag": {"forward": 3, "backward": 3}}
    ((_, _, config, seed),) = live.engine.seen
    assert config.r2 == 16 and config.n_inference_step == 25 and seed == 7
    np.testing.assert_array_equal(np.asarray(Image.open(result.save(tmp_path / "out.png"))), expected)


def test_what_is_wrong_is_found_here_or_told_by_the_service(live):
    with pytest.raises(InputError, match="9999"):
        live.client.edit(picture(), [((20, 30), (9999, 30))])
    assert live.engine.edits == []
    with pytest.raises(RefusedInput, match="no_such") as refused:
        live.client.edit(picture(), DRAGS, settings={"no_such": 1})
    assert (refused.value.code, refused.value.status) == ("invalid", 422)
    with Client(live.url, "another-key-of-tests") as stranger, pytest.raises(ServiceError) as refused:
        stranger.edit(picture(), DRAGS)
    assert (refused.value.code, refused.value.status) == ("unauthorized", 401)


def test_a_source_that_is_gone_is_prepared_again_unasked(live):
    source = live.client.prepare(picture(), config="fast")
    first, name = live.client.edit(source, DRAGS), source.id
    live.workers.worker.forget(name)
    second = live.client.edit(source, DRAGS)
    assert source.id != name and first.image.tobytes() == second.image.tobytes()
    assert [config.n_inference_step for _, _, config, _ in live.engine.seen] == [25, 25]
    source.id = "src_" + "x" * 48  # of a service that was restarted since
    live.client.edit(source, DRAGS)
    live.client.forget(source)
    live.client.forget(source)  # gone already


def test_an_edit_is_followed_and_fetched(live):
    edit = live.client.submit(picture(), DRAGS, previews=True)
    seen = list(edit.events())
    assert {at.stage for at in seen} == set(STAGES)
    assert [at.points for at in seen if at.stage == "drag"][-1] == ((22.0, 30.0),)
    previews = [at.preview for at in seen if at.preview is not None]
    assert previews and previews[-1].size == (64, 64)
    assert edit.result().handles == ((40.0, 30.0),) and not edit.cancel()


def test_an_edit_is_cancelled_while_it_runs(live):
    live.engine.hold = "drag"
    edit = live.client.submit(picture(), DRAGS)
    assert live.engine.held.wait(20)
    assert edit.cancel()
    ends = time.monotonic() + 20
    while not live.engine.stopped and time.monotonic() < ends:  # at its next step, after the answer
        time.sleep(0.005)
    assert live.engine.stopped == 1
    with pytest.raises(RemoteCancelled) as told:
        edit.result()
    assert isinstance(told.value, Cancelled) and told.value.code == "cancelled"


# Answers made up here.


def answering(*answers):
    """A client whose requests get these answers in turn, the requests it made, and the pauses between them."""
    left, seen = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    return Client(http=httpx.Client(base_url="http://localhost", transport=httpx.MockTransport(answer))), seen


def done() -> httpx.Response:
    report = {"handles": [[1, 2]], "timings": {}, "passes": {}, "waited_s": 0, "batch": 1}
    return httpx.Response(200, content=PICTURE, headers={"Edit-Id": "edt_1", "Edit-Report": json.dumps(report)})


def failed(status: int, code: str, **headers: str) -> httpx.Response:
    lines = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": {"code": code, "message": "said so"}}, headers=lines)


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def test_a_busy_service_is_asked_again_when_it_says(pauses):
    client, seen = answering(
        failed(429, "busy", Retry_After="7"), failed(503, "unavailable", Retry_After="400"),
        httpx.ConnectError("refused"), done(),
    )  # fmt: skip
    assert client.edit(picture(), DRAGS).id == "edt_1"
    assert 7 <= pauses[0] <= 8.75 and 60 <= pauses[1] <= 75 and 0 < pauses[2] < 5
    keys = {request.headers["Idempotency-Key"] for request in seen}
    assert len(seen) == 4 and len(keys) == 1
    client, again = answering(done())
    client.edit(picture(), DRAGS)
    assert again[0].headers["Idempotency-Key"] not in keys


def test_it_gives_up_at_last_and_at_once_where_trying_is_no_use(pauses):
    client, seen = answering(*[failed(503, "unavailable") for _ in range(5)])
    with pytest.raises(ServiceError, match="said so") as error:
        client.edit(picture(), DRAGS)
    assert len(seen) == 5 and error.value.status == 503 and pauses == sorted(pauses)
    for status, code in (
        (422, "invalid"),
        (500, "internal"),
        (504, "deadline"),
        (413, "too_large"),
        (401, "unauthorized"),
    ):
        client, seen = answering(failed(status, code))
        with pytest.raises(ServiceError) as error:
            client.edit(picture(), DRAGS)
        assert len(seen) == 1 and error.value.code == code
        assert isinstance(error.value, InputError) == (code in ("invalid", "too_large"))
    client, _ = answering(httpx.Response(500, text="<html>a proxy's page</html>"))
    with pytest.raises(ServiceError, match="proxy's page"):
        client.edit(picture(), DRAGS)
    client, _ = answering(*[httpx.ConnectError("refused")] * 5)
    with pytest.raises(ServiceError, match="refused; is it running"):
        client.edit(picture(), DRAGS)


def timeouts(request: httpx.Request) -> dict[str, float | None]:
    return request.extensions["timeout"]


def test_what_may_run_already_is_not_sent_again(pauses):
    """The service cancels an edit whose client leaves: sent again, it would run from its beginning."""
    for ask in (
        lambda it: it.edit(picture(), DRAGS),
        lambda it: it.submit(picture(), DRAGS),
        lambda it: it.prepare(picture()),
    ):
        client, seen = answering(httpx.ReadTimeout("nothing came"))
        with pytest.raises(ServiceError, match="no answer within 150 s") as error:
            ask(client)
        assert len(seen) == 1 and pauses == [] and (error.value.code, error.value.status) == ("deadline", 0)
    client, seen = answering(httpx.WriteTimeout("half of it went"), done())  # nothing runs before all of it has come
    assert client.edit(picture(), DRAGS).id == "edt_1" and len(seen) == 2
    client, seen = answering(httpx.ReadTimeout("nothing came"), httpx.Response(200, json={"state": "cancelled"}))
    assert client.cancel("edt_1") and len(seen) == 2


def test_an_answer_is_waited_for_as_long_as_the_edit_may_take(pauses):
    made = httpx.Response(201, json={"source": "src_1", "timings": {}})
    client, seen = answering(done(), done(), made, done())  # by an httpx.Client of one's own, which waits for 5 s
    client.edit(picture(), DRAGS)
    client.edit(picture(), DRAGS, deadline_s=1000)
    client.edit(client.prepare(picture(), deadline_s=500), DRAGS, deadline_s=20)
    assert [timeouts(request)["read"] for request in seen] == [150, 1000 + module.MARGIN_S, 500 + module.MARGIN_S, 150]
    assert {timeouts(request)["connect"] for request in seen} == {5.0}
    client, seen = answering(done())
    client._http.timeout = None  # for ever
    client.edit(picture(), DRAGS, deadline_s=1000)
    assert timeouts(seen[0])["read"] is None


def test_a_source_lost_twice_is_an_error(pauses):
    made = {"source": "src_1", "timings": {}}
    client, seen = answering(
        httpx.Response(201, json=made), failed(410, "gone"), httpx.Response(201, json=made), failed(410, "gone")
    )
    with pytest.raises(ServiceError) as error:
        client.edit(client.prepare(picture()), DRAGS)
    assert error.value.code == "gone" and len(seen) == 4


def test_broken_events_go_on_where_they_broke(pauses):
    def event(number: int, name: str = "progress") -> str:
        data = {"stage": "drag", "step": number, "total": 3}
        return f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"

    first = httpx.Response(200, text=": still there\n\n" + event(1) + event(2))
    client, seen = answering(first, httpx.ReadError("broken"), httpx.Response(200, text=event(3) + event(4, "done")))
    assert [at.step for at in client.events("edt_1")] == [1, 2, 3]
    assert [request.headers.get("Last-Event-ID") for request in seen] == [None, "2", "2"]


def test_importing_it_is_light():
    heavy = "{'torch', 'diffusers', 'httpx', 'fastapi', 'ray'}"
    code = f"import sys, ddengine.client; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_without_httpx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(module.BackendUnavailable, match="pip install"):
        Client()
