"""`--no-ray` on real sockets with an engine that can be held up: how it stops, and who may stay connected."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
from serve_fakes import FakeEngine, form

from ddengine.bench.faults import closed
from ddengine.errors import ModelError
from ddengine.serve import process
from ddengine.serve.limits import Limits
from ddengine.serve.options import EngineOptions, ServeOptions

KEY = "0123456789abcdef-one"


def wait(condition, seconds: float = 60.0):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@contextmanager
def served(monkeypatch, keys=(), **limits) -> Iterator[SimpleNamespace]:
    """The service in a thread; `signal()` is what a signal does, `edit()` posts an edit from another thread."""
    engine, servers, told, ended, editing = FakeEngine(), [], [], [], []

    class Server(process._Server):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            servers.append(self)

    def run() -> None:
        try:
            process.run(ServeOptions(limits=Limits(decoders=1, **limits), port=0, keys=keys), told.append)
            ended.append(None)
        except ModelError as error:
            ended.append(error)

    def edit(**more) -> SimpleNamespace:
        found = SimpleNamespace(answer=None)

        def post() -> None:
            found.answer = httpx.post(f"{it.url}/v1/edits", **form(), timeout=60, **more)

        editing.append(threading.Thread(target=post))
        editing[-1].start()
        found.join = editing[-1].join
        wait(engine.held.is_set)
        return found

    monkeypatch.setattr(EngineOptions, "load", lambda self: engine)
    monkeypatch.setattr(process, "_Server", Server)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        (url,) = wait(lambda: list(told))
        port = int(url.rpartition(":")[2])
        it = SimpleNamespace(engine=engine, url=url, edit=edit, ended=ended, join=thread.join, server=servers[0])
        it.signal = lambda: servers[0].handle_exit(signal.SIGTERM, None)
        it.connect = lambda: socket.create_connection(("127.0.0.1", port), timeout=30)
        it.get = lambda path, **more: httpx.get(f"{url}{path}", timeout=30, **more)
        wait(lambda: it.get("/v2/health/ready").status_code == 200)
        engine.hold = "drag"
        yield it
    finally:
        engine.go.set()
        for server in servers * 2:
            server.handle_exit(signal.SIGTERM, None)
        for one in (thread, *editing):
            one.join(30)
            assert not one.is_alive()


def refused(url: str) -> None:
    """A new connection is taken, and told that the service stops."""
    answer = httpx.post(f"{url}/v1/edits", **form(), timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1


def test_what_runs_ends_while_new_edits_are_refused(monkeypatch):
    with served(monkeypatch, drain_s=600) as it:
        waiting = it.edit()
        later = httpx.post(f"{it.url}/v1/edits?async=true", **form(), timeout=30).json()
        it.signal()
        for _ in range(3):
            refused(it.url)
            ready = it.get("/v2/health/ready")
            assert (ready.status_code, ready.json()["state"]) == (503, "draining")
            assert it.get("/v2/health/live").status_code == 200
            time.sleep(0.2)
        assert it.get(later["href"]).json()["state"] == "queued"
        began = time.monotonic()
        it.engine.go.set()
        waiting.join(30)
        assert waiting.answer.status_code == 200 and waiting.answer.headers["content-type"] == "image/png"
        wait(lambda: it.get(later["href"]).json()["state"] == "done")
        assert it.get(later["href"] + "/picture").status_code == 200  # its end was seen, so there is time to fetch it
        it.join(30)
        assert time.monotonic() - began < 30 and it.ended == [None]


def test_what_does_not_end_in_time_is_told_so(monkeypatch):
    """The answer is the service's own, and the process leaves when it has said it would."""
    with served(monkeypatch, drain_s=3.0) as it:
        waiting, began = it.edit(), time.monotonic()
        with it.connect() as half:  # and an edit that never comes whole
            half.sendall(
                b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            )
            half.sendall(b"Content-Length: 1000\r\n\r\n--b\r\n")
            wait(lambda: "ddengine_jobs_open 2.0" in it.get("/metrics").text)
            it.signal()
            refused(it.url)
            waiting.join(30)
            assert 2.9 < time.monotonic() - began < 30
            assert (waiting.answer.status_code, waiting.answer.json()["error"]["code"]) == (503, "unavailable")
            assert "retry-after" in waiting.answer.headers
            it.join(30)
            told = b"".join(iter(lambda: half.recv(4096), b""))
            assert told.startswith(b"HTTP/1.1 503 ") and b'"unavailable"' in told
        assert it.ended == [None] and it.engine.stopped == 1


def test_a_second_signal_is_not_patient(monkeypatch):
    with served(monkeypatch, drain_s=600) as it:
        waiting, began = it.edit(), time.monotonic()
        it.signal()
        refused(it.url)
        it.signal()
        waiting.join(30)
        it.join(30)
        assert time.monotonic() - began < 30 and it.ended == [None]
        assert (waiting.answer.status_code, waiting.answer.json()["error"]["code"]) == (503, "unavailable")


def test_a_lost_worker_ends_the_service_and_says_so(monkeypatch):
    with served(monkeypatch, drain_s=30) as it:
        it.engine.hold, it.engine.error = None, RuntimeError("CUDA error: an illegal memory access was encountered")
        refused(it.url)
        it.join(30)
        assert len(it.ended) == 1 and "worker was lost" in str(it.ended[0])


def test_a_connection_without_a_request_is_closed(monkeypatch):
    """In whatever way it holds one back; a request that was let in takes the time it takes."""
    with served(monkeypatch, keys=(KEY,), head_s=2.0) as it:
        key = {"Authorization": f"Bearer {KEY}"}
        waiting = it.edit(headers=key)
        head = b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        slow = {name: it.connect() for name in ("nothing", "half a head", "no key", "the second head")}
        for name, sent in (("half a head", head), ("no key", head + b"\r\n")):
            slow[name].sendall(sent)
        slow["the second head"].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in slow["the second head"].recv(4096)
        assert b" 401 " in slow["no key"].recv(4096)
        began, left = time.monotonic(), dict(slow)
        while left:
            for name, connection in list(left.items()):
                try:
                    if name != "nothing":
                        connection.sendall(b"x")  # in the midst of a header, or a body nobody asked for
                except ConnectionError:
                    del left[name]
                    continue
                if closed(connection):
                    del left[name]
            assert it.get("/v2/health/ready").status_code == 200
            assert time.monotonic() - began < 30, f"{list(left)} still open"
            time.sleep(0.05)
        for connection in slow.values():
            connection.close()
        time.sleep(max(0, began + 3 - time.monotonic()))
        assert waiting.answer is None
        it.engine.go.set()
        waiting.join(30)
        assert waiting.answer.status_code == 200


def test_many_connections_leave_room_for_others(monkeypatch):
    """Of those that wait the oldest is closed, an edit is not."""
    with served(monkeypatch, connections=8) as it:
        waiting = it.edit()
        many = []
        for _ in range(20):
            many.append(it.connect())
            many[-1].sendall(b"GET /v2 HTTP/1.1\r\n")
        for path in ("/v2/health/live", "/v2/health/ready", "/v2"):
            assert it.get(path).status_code == 200
        wait(lambda: sum(not closed(one) for one in many) <= 8)
        assert not closed(many[-1]) and len(it.server.server_state.connections) <= 8 + 1
        it.engine.go.set()
        waiting.join(30)
        assert waiting.answer.status_code == 200
        for one in many:
            one.close()


def test_a_connection_is_used_again(monkeypatch):
    with served(monkeypatch, head_s=1.0) as it, httpx.Client(base_url=it.url, timeout=30) as http:
        it.engine.hold = None
        for _ in range(8):
            assert http.post("/v1/edits", **form()).status_code == 200
            time.sleep(0.2)  # 1.6 s in all
            assert len(it.server.server_state.connections) == 1


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import fakes
from ddengine.serve.limits import Limits
from ddengine.serve.options import EngineOptions, ServeOptions
from ddengine.serve.process import run
engine = fakes.FakeEngine()
EngineOptions.load = lambda self: engine

def listening(url):
    print(url, flush=True)

def hold():
    for word in sys.stdin:
        engine.hold = word.strip() or None
        print("so be it", flush=True)

import threading
threading.Thread(target=hold, daemon=True).start()
run(ServeOptions(limits=Limits(decoders=1, drain_s=60), port=0), listening)
"""


def test_a_real_signal(tmp_path):
    """SIGTERM to a process of its own: new connections are taken and refused, the edit ends, exit code 0."""
    script = SCRIPT.format(folder=str(Path(__file__).parent))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as it:
        try:
            url = it.stdout.readline().strip()
            wait(lambda: httpx.get(f"{url}/v2/health/ready").status_code == 200)
            it.stdin.write("drag\n")
            assert it.stdout.readline() == "so be it\n"
            answers = []
            editing = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}/v1/edits", **form(), timeout=60))
            )
            editing.start()
            wait(lambda: "ddengine_running 1.0" in httpx.get(f"{url}/metrics").text)
            it.send_signal(signal.SIGTERM)
            wait(lambda: httpx.get(f"{url}/v2/health/ready").json()["state"] == "draining")
            refused(url)
            time.sleep(0.5)
            refused(url)
            it.stdin.write("\n")
            editing.join(30)
            assert [answer.status_code for answer in answers] == [200]
            assert it.wait(30) == 0
        finally:
            it.kill()
