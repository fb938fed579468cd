"""What is refused, and how: every code with a request that earns it; bodies, keys, hosts, other sites' pages."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_fakes import DRAG, EDIT, PICTURE, Call, FakeEngine, form, multipart, picture_bytes, serving, until

from ddengine.errors import InputError
from ddengine.serve.accept import media_for
from ddengine.serve.contract import STATUS
from ddengine.serve.faults import Fault
from ddengine.serve.limits import Limits
from ddengine.serve.logs import JsonLines
from ddengine.serve.options import ServeOptions, read_keys

KEY, OTHER = "0123456789abcdef-one", "0123456789abcdef-two"


def drag(x, y=30, to=(40, 30)):
    return {"drags": [{"handle": [x, y], "target": list(to)}]}


# (what it shows, the edit's JSON, status, code, a word of the message)
BODIES = [
    ("no json", "{", 400, "bad_request", "JSON"),
    ("not an object", "[]", 422, "invalid", "edit"),
    ("a key twice", '{"drags": [], "drags": []}', 400, "bad_request", "twice"),
    ("NaN", '{"drags": [{"handle": [NaN, 1], "target": [2, 2]}]}', 400, "bad_request", "NaN"),
    ("infinity", '{"drags": [{"handle": [1, 1], "target": [-Infinity, 2]}]}', 400, "bad_request", "Infinity"),
    ("infinity by exponent", '{"drags": [{"handle": [1, 1], "target": [1e999, 2]}]}', 422, "invalid", "finite"),
    ("a number too long", '{"seed": ' + "9" * 5000 + "}", 400, "bad_request", "JSON"),
    ("nested deeply", "[" * 100_000, 400, "bad_request", "JSON"),
    ("half a surrogate", '{"prompt": "\\ud800", "drags": [{"handle": [1, 1], "target": [2, 2]}]}', 422, "invalid", ""),
    ("no drags", json.dumps({"drags": []}), 422, "invalid", "drags"),
    ("drags missing", "{}", 422, "invalid", "drags"),
    ("10,000 drags", json.dumps({"drags": [DRAG] * 10_000}), 422, "invalid", "limit is 32"),
    ("out of frame", drag(80), 422, "invalid", "outside"),
    ("just out of frame", drag(79.5), 422, "invalid", "outside"),
    ("negative", drag(-1), 422, "invalid", "outside"),
    ("a drag of no length", drag(40), 422, "invalid", "same point"),
    ("text for a number", drag("20"), 422, "invalid", "number"),
    ("three numbers", {"drags": [{"handle": [1, 2, 3], "target": [2, 2]}]}, 422, "invalid", ""),
    ("an unknown field", {"modle": "x"}, 422, "invalid", "modle"),
    ("a model", {"model": "runwayml/stable-diffusion-v1-5"}, 422, "invalid", "model"),
    ("an address", {"image": "http://169.254.169.254/"}, 422, "invalid", "image"),
    ("an unknown preset", {"config": "../../etc/passwd"}, 422, "invalid", "config"),
    ("an unknown setting", {"settings": {"nothing": 1}}, 422, "invalid", "nothing"),
    ("a setting named as an argument", {"settings": {"self": 1}}, 422, "invalid", "'self'"),
    ("a setting out of range", {"settings": {"r2": 1000}}, 422, "invalid", "r2"),
    ("a setting of another type", {"settings": {"r2": "wide"}}, 422, "invalid", "r2"),
    ("too many steps", {"settings": {"n_inference_step": 101}}, 422, "invalid", "limit is 100"),
    ("too many updates", {"settings": {"track_per_step": 1000}}, 422, "invalid", "limit is 1000"),
    ("a negative seed", {"seed": -1}, 422, "invalid", "seed"),
    ("a seed too large", {"seed": 2**63}, 422, "invalid", "seed"),
    ("a seed that is true", {"seed": True}, 422, "invalid", "seed"),
    ("a prompt too long", {"prompt": "x" * 401}, 422, "invalid", "limit is 400"),
    ("no deadline", {"deadline_s": 0}, 422, "invalid", "deadline_s"),
    ("a picture and a source", {"source": "src_x"}, 422, "invalid", "one of the two"),
]


@pytest.mark.parametrize(
    ("edit", "status", "code", "word"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES]
)
async def test_edits_that_are_none(intake, edit, status, code, word):
    async with serving(intake=intake) as it:
        answer = await it.http.post("/v1/edits", **form(edit))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code) and word in error["message"], answer.text
        assert len(error["message"]) < 1500 and "Traceback" not in answer.text
        assert it.engine.edits == [] and it.service.jobs.open == 0


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"content": PICTURE, "headers": {"Content-Type": "image/png"}}, 415),
        ({"content": b"x"}, 415),
        ({"content": b'{"prompt": "\xff"}', "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400),
        ({"content": b"--b\r\n\r\nx\r\n--b--", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400),
        (form(more=("a", b"1")), 400),  # an unknown part
        ({"files": [("picture", PICTURE), ("picture", PICTURE), ("edit", (None, json.dumps(EDIT)))]}, 400),
        ({"files": {"picture": PICTURE}}, 422),
        (form(picture=None), 422),
        ({"json": EDIT}, 422),
        ({"json": {**EDIT, "prompt": "x" * (1 << 20)}}, 413),
        ({"files": {"picture": PICTURE, "edit": ("a.json", b" " * (1 << 20) + b"{}")}}, 413),
        ({"files": {"picture": PICTURE, "edit": (None, b" " * (1 << 20) + b"{}")}}, 400),
    ],
)
async def test_bodies_that_are_none(intake, arguments, status):
    async with serving(intake=intake) as it:
        answer = await it.http.post("/v1/edits", **arguments)
        assert answer.status_code == status, answer.text
        assert it.engine.edits == [] and it.service.jobs.open == 0


async def test_a_large_body_is_cut_while_it_comes(intake):
    """With an honest Content-Length before anything is read, without one at the limit."""
    async with serving(intake=intake, body_bytes=20_000) as it:
        answer = await it.http.post("/v1/edits", **form(picture=b"x" * 30_000))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        headers, body = multipart(picture=b"x" * 30_000)
        for lie in ({}, {"content-length": "10"}):
            call = Call(it.app, "POST", "/v1/edits", headers={**headers, **lie}, body=body[:15_000], more=True)
            await asyncio.sleep(0.01)
            assert not call.task.done()
            call.feed(body[15_000:], more=True)  # the end never comes
            assert (await asyncio.wait_for(call.done(), 10)).status == 413 and call.headers["connection"] == "close"
        assert (await it.http.post("/v2/models/ddengine/infer", content=b"x" * 30_000)).status_code == 413
        wrong = Call(it.app, "POST", "/v1/edits", headers={"content-length": "-1"})
        assert (await wrong.done()).status == 400
        assert it.service.jobs.open == 0


@settings(max_examples=40)
@given(data=st.data())
def test_any_bytes_as_a_body(intake, data):
    """A good multipart body with bytes changed, cut and added anywhere: an edit, or a refusal that says why."""
    headers, body = multipart()
    if data.draw(st.booleans()):
        headers["content-type"] += data.draw(st.sampled_from(["", "x", ";", '; boundary="', "; charset=utf-16"]))
    whole = bytearray(body)
    ends = len(body) - len(PICTURE) + 200  # the form itself, the picture's bytes are fuzzed elsewhere
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(ends, 150) - 1) | st.integers(len(body) - 250, len(body) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))

    async def ask() -> Call:
        async with serving(intake=intake) as it:
            call = Call(it.app, "POST", "/v1/edits", headers=headers, body=bytes(whole[:cut]))
            await call.done()
            assert it.service.jobs.open == 0
            return call

    call = asyncio.run(ask())
    assert call.status in (200, 400, 413, 415, 422), call.body
    if call.status != 200:
        assert call.json["error"]["message"]


async def test_a_body_that_is_cut_off_is_let_go_of(intake):
    """Its parts are closed, the one too that never came to its end."""
    async with serving(intake=intake) as it:
        headers, body = multipart()
        for cut in (len(body) - 4, len(body) // 2, 300):
            call = await Call(it.app, "POST", "/v1/edits", headers=headers, body=body[:cut]).done()
            assert call.status == 400 and "boundary" in call.json["error"]["message"]
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", ResourceWarning)
                gc.collect()
            assert not [one for one in told if "SpooledTemporaryFile" in str(one.message)]
        assert it.service.jobs.open == 0


async def test_a_slow_body_is_not_waited_for(intake):
    async with serving(intake=intake, body_s=0.1) as it:
        headers, body = multipart()
        for path in ("/v1/edits", "/v1/sources"):
            call = Call(it.app, "POST", path, headers=headers, body=body[:50], more=True)
            assert (await asyncio.wait_for(call.done(), 10)).status == 408
            assert call.json["error"]["code"] == "body_timeout"
        assert it.service.jobs.open == 0


async def test_a_client_that_goes_while_it_sends(intake):
    async with serving(intake=intake) as it:
        headers, body = multipart()
        call = Call(it.app, "POST", "/v1/edits", headers=headers, body=body[:50], more=True)
        call.disconnect()
        await asyncio.wait([call.task], timeout=10)
        assert call.task.done() and it.service.jobs.open == 0 and it.engine.edits == []
        assert call.status in (0, 499)


async def test_pictures_beyond_the_limits(intake):
    async with serving(intake=intake, pixels=80 * 64) as it:
        it.service.intake.check(PICTURE)
    from ddengine.serve.pictures import Intake

    small = Intake(Limits(pixels=80 * 64 - 1))
    async with serving(intake=small) as it:
        answer = await it.http.post("/v1/edits", **form())
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    small.close()
    async with serving(intake=intake) as it:
        for data, status in (
            (picture_bytes("GIF"), 415),
            (picture_bytes("TIFF"), 415),
            (b"", 415),
            (PICTURE[: len(PICTURE) // 2], 422),
            (picture_bytes(size=(63, 200)), 422),  # a side too short
            (picture_bytes(size=(80, 64 * 11)), 422),  # too long and thin
        ):
            answer = await it.http.post("/v1/edits", **form(picture=data))
            assert answer.status_code == status, answer.text


async def test_without_its_key_nothing_but_health_is_told(intake):
    async with serving(intake=intake, key=KEY) as it:
        assert (await it.http.post("/v1/edits", **form())).status_code == 200
        it.http.headers.pop("Authorization")
        paths = ("/v1/edits", "/v1/sources", "/v1/edits/x", "/metrics", "/openapi.json", "/v2", "/v2/models/ddengine")
        for given in (None, "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer \xe4"):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for path in paths:
                answer = await it.http.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer")
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await it.http.get(path)).status_code == 200
        assert (await it.http.get("/metrics", headers={"Authorization": f"bearer {KEY}"})).status_code == 200


async def test_one_keys_things_are_not_anothers(intake):
    async with serving(intake=intake, key=(KEY, OTHER)) as it:
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER))
        source = (await it.http.post("/v1/sources", **form(part="options", edit="{}"), headers=mine)).json()["source"]
        again = {**mine, "Idempotency-Key": "k"}
        edit = (await it.http.post("/v1/edits", json={**EDIT, "source": source}, headers=again)).headers["edit-id"]
        for method, path, arguments in (
            ("GET", f"/v1/edits/{edit}", {}),
            ("GET", f"/v1/edits/{edit}/picture", {}),
            ("DELETE", f"/v1/edits/{edit}", {}),
            ("DELETE", f"/v1/sources/{source}", {}),
            ("POST", "/v1/edits", {"json": {**EDIT, "source": source}}),
        ):
            assert (await it.http.request(method, path, headers=theirs, **arguments)).status_code == 404, path
        other = {**theirs, "Idempotency-Key": "k"}  # another's key of the same name
        assert (await it.http.post("/v1/edits", **form(), headers=other)).headers["edit-id"] != edit
        assert (await it.http.get(f"/v1/edits/{edit}", headers=mine)).status_code == 200


async def test_names_and_pages_of_other_sites(intake):
    async with serving(intake=intake, hosts=("localhost", "127.0.0.1", "[::1]")) as it:
        for host, status in (
            ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("evil.example", 421),
            ("localhost.evil.example", 421), ("", 421), ("[::1", 421), ("127.0.0.1.evil.example:80", 421),
        ):  # fmt: skip
            assert (await it.http.get("/v2", headers={"Host": host})).status_code == status, host
            for path in ("/v2/health/live", "/v2/health/ready"):  # probes name an address that nobody can foresee
                assert (await it.http.get(path, headers={"Host": host})).status_code == 200, host
        for origin, status in (("http://evil.example", 403), ("null", 403), ("http://localhost", 200)):
            answer = await it.http.post("/v1/edits", **form(), headers={"Origin": origin})
            assert answer.status_code == status, origin
            assert not [name for name in answer.headers if name.startswith("access-control")]
        foreign = await it.http.get("/v2/health/ready", headers={"Host": "x.example", "Origin": "http://evil.example"})
        assert foreign.status_code == 403
    async with serving(intake=intake, key=KEY) as it:  # a key is not sent by a page that does not have it
        headers = {"Origin": "http://app.example", "Host": "10.1.2.3:8000"}
        assert (await it.http.post("/v1/edits", **form(), headers=headers)).status_code == 200
        it.http.headers.pop("Authorization")
        assert (await it.http.post("/v1/edits", **form(), headers=headers)).status_code == 401


async def test_more_requests_than_places(intake):
    """Those beyond are told so in JSON; health checks and refusals take no place, and a place is given back."""
    engine = FakeEngine()
    engine.hold = "drag"
    async with serving(engine, intake, key=KEY, connections=2) as it:
        headers, body = multipart()
        headers["authorization"] = f"Bearer {KEY}"
        running = [Call(it.app, "POST", "/v1/edits", headers=headers, body=body) for _ in range(2)]
        await until(lambda: it.service.jobs.open == 2 and engine.held.is_set())
        for method, path in (("POST", "/v1/edits"), ("GET", "/metrics")):
            answer = await it.http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert answer.headers["retry-after"] == "1" and "limit" in answer.json()["error"]["message"]
        assert (await it.http.get("/metrics", headers={"Authorization": "Bearer no"})).status_code == 401
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await it.http.get(path)).status_code == 200
        engine.go.set()
        assert [(await call.done()).status for call in running] == [200, 200]
        assert [(await it.http.get("/metrics")).status_code for _ in range(3)] == [200] * 3


async def test_what_a_server_cancels_when_it_stops_is_told_so(intake):
    async with serving(intake=intake) as it:
        headers, body = multipart()
        call = Call(it.app, "POST", "/v1/edits", headers=headers, body=body[:50], more=True)
        await until(lambda: it.service.jobs.open == 1)
        await it.service.jobs.drain(0)  # the body still comes: nothing runs yet that could be cancelled
        assert not call.task.done()
        call.task.cancel()
        assert (await call.done()).status == 503 and call.json["error"]["code"] == "unavailable"
        assert "retry-after" in call.headers and it.service.jobs.open == 0


async def test_a_body_that_comes_too_late_begins_nothing(intake):
    async with serving(intake=intake) as it:
        headers, body = multipart()
        call = Call(it.app, "POST", "/v1/edits", headers=headers, body=body[:50], more=True)
        await until(lambda: it.service.jobs.open == 1)
        await it.service.jobs.drain(0)
        call.feed(body[50:])
        assert (await call.done()).status == 503 and it.engine.edits == [] and it.service.jobs.open == 0


async def test_a_body_is_hashed_for_its_key_alone(intake, monkeypatch):
    from ddengine.serve import edits

    monkeypatch.setattr(edits, "_fingerprint", lambda picture, asked: 1 / 0)
    async with serving(intake=intake) as it:
        assert (await it.http.post("/v1/edits", **form())).status_code == 200
        assert (await it.http.post("/v1/edits", **form(), headers={"Idempotency-Key": "k"})).status_code == 500


async def test_every_answer_says_its_request_and_how_to_treat_it(intake, caplog):
    async with serving(intake=intake) as it:
        with caplog.at_level(logging.INFO, "ddengine.serve.access"):
            for path, given in (("/v2/health/live", "abc-1"), ("/nothing", "bad id"), ("/v1/edits", "x" * 65)):
                answer = await it.http.get(path, headers={"X-Request-ID": given})
                name = answer.headers["x-request-id"]
                assert (name == given) == (given == "abc-1") and name.replace("-", "").isalnum()
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["cache-control"] == "no-store" and "content-security-policy" in answer.headers
            assert [answer.status_code, answer.json()["error"]["code"]] == [405, "method_not_allowed"]
        lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
        assert [(line["route"], line["status"]) for line in lines] == [
            ("/v2/health/live", 200), ("other", 404), ("/v1/edits", 405),
        ]  # fmt: skip
        websocket = []

        async def send(message):
            websocket.append(message)

        await it.app({"type": "websocket", "path": "/", "headers": []}, None, send)
        assert websocket == [{"type": "websocket.close", "code": 1008}]


async def test_a_bug_of_ours_is_a_500_without_its_story(intake, monkeypatch):
    async with serving(intake=intake) as it:
        monkeypatch.setattr(it.service, "check", lambda asked: 1 / 0)
        answer = await it.http.post("/v1/edits", **form())
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
        assert "division" not in answer.text and it.service.jobs.open == 0
        assert answer.headers["x-content-type-options"] == "nosniff" and "x-request-id" in answer.headers


async def test_metrics_have_few_labels_none_of_a_request(intake):
    async with serving(intake=intake) as it:
        await it.http.post("/v1/edits", **form())
        for number in range(20):
            await it.http.get(f"/path-{number}", headers={"Host": "localhost"})
            await it.http.get(f"/v1/edits/edt_{number}")
        text = (await it.http.get("/metrics")).text
        assert 'ddengine_jobs_total{kind="edit",outcome="ok"} 1.0' in text
        assert 'ddengine_requests_total{route="/v1/edits/{edit_id}",status="404"} 20.0' in text
        assert 'ddengine_stage_seconds_count{stage="drag"} 1.0' in text and "process_resident_memory_bytes" in text
        assert "path-" not in text and "edt_" not in text
        assert len({line.split("{")[0] for line in text.splitlines() if line.startswith("ddengine")}) < 60


def test_every_code_has_its_status_and_is_told():
    for code, status in STATUS.items():
        fault = Fault(code, "a message", retry_s=2.2)
        assert fault.status == status and fault.body()["error"] == {"code": code, "message": "a message"}
        assert fault.body("/v2/models/x") == {"error": "a message", "code": code}
        assert fault.headers()["Retry-After"] == "3"
    assert "Retry-After" in Fault("busy", "").headers() and "Retry-After" not in Fault("invalid", "").headers()


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "image/png"), ("image/*", "image/png"), ("application/*", "application/json"), ("", None),
        ("image/webp, image/png;q=0.9", "image/webp"), ("*/*, image/png;q=0", "image/webp"), ("text/html", None),
        ("application/json;q=0.1, text/html", "application/json"), ("image/png;q=nonsense", None),
        ("IMAGE/JPEG", "image/jpeg"), (";;,,", None),
    ],
)  # fmt: skip
def test_accept(accept, media):
    if media is None:
        with pytest.raises(Fault, match="Accept"):
            media_for(accept)
    else:
        assert media_for(accept) == media


def test_limits_say_what_they_allow():
    for name, value in (
        ("body_bytes", 0),
        ("points", 1.5),
        ("queue", True),
        ("deadline_s", float("nan")),
        ("jobs", "1"),
    ):
        with pytest.raises(InputError, match=name):
            Limits(**{name: value})
    assert Limits(deadline_s=5).deadline_s == 5


def test_no_other_machine_gets_in_without_a_key(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com", ""):
        with pytest.raises(InputError, match="key"):
            ServeOptions(host=host)
        assert ServeOptions(host=host, keys=(KEY,)).host == host
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert {host, "edit.example"} <= {*ServeOptions(host=host, names=("Edit.example",)).hosts}
    for short in ("short", "x" * 15, "with a space in it....", "kéykéykéykéykéykéy"):
        with pytest.raises(InputError, match="at least 16"):
            ServeOptions(keys=(short,))
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n{OTHER}\n")
    assert read_keys(file, "ignored") == (KEY, OTHER) and read_keys(None, KEY) == (KEY,) and read_keys(None, None) == ()
    file.write_text("# none\n")
    with pytest.raises(InputError, match="no key"):
        read_keys(file, None)


def test_the_command_refuses_before_it_loads_anything(monkeypatch):
    from click.testing import CliRunner

    from ddengine.cli import main

    monkeypatch.delenv("DDENGINE_API_KEY", raising=False)
    for words, said in (
        (["--host", "0.0.0.0"], "API key"),
        (["--points", "0"], "points"),
        (["--key-file", "missing"], "missing"),
        (["--port", "70000"], "70000"),
    ):
        done = CliRunner().invoke(main, ["serve", "--no-ray", *words])
        assert done.exit_code == 2 and said in done.stderr, done.stderr


async def test_an_engine_is_never_asked_for_a_hostile_picture(intake):
    engine = FakeEngine()
    async with serving(engine, intake) as it:
        answer = await it.http.post("/v1/edits", **form(picture=PICTURE[:-30]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid") and engine.edits == []
