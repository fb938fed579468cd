"""The service when things go wrong: each fault is made on a real one, and the next edit must be as good as before."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from ddengine.bench.load import EDIT, JOBS, Say, picture
from ddengine.bench.service import Running, running
from ddengine.client import Client, RemoteEdit, ServiceError

LONG: dict[str, Any] = {"config": "fast"}  # seconds of dragging
LASTING: dict[str, Any] = {"settings": {"n_inference_step": 100, "inversion_strength": 1.0}}  # ten seconds
HEAD_S = 2.0  # in which a request's headers must have come
DRAIN_S = 2.0  # of a service that stops before its edit has ended
SILENT = 100  # connections without a whole request
STAGES = ("encode", "invert", "reference", "warp", "drag", "denoise")
PATIENCE_S = 120.0


def measure(*, ray: bool = False, say: Say = lambda _: None) -> dict[str, Any]:
    """Make every fault in turn; what came of each, in the order of the table."""
    found: dict[str, Any] = {}
    options = ("--queue", "2", "--progress-s", "0", "--body-bytes", str(1 << 20), "--head-s", str(HEAD_S))
    with running(*options, "--drain-s", "60", ray=ray) as service:
        with service.client(retries=8) as client:
            first = _pixels(client)
            faults: dict[str, Callable[[Running, Client], dict[str, Any]]] = {
                "cancelled": _cancelled,
                "client gone": _client_gone,
                "deadline": _deadline,
                "queue full": _queue_full,
                "hostile": _hostile,
                "half a request": _half_a_request,
                **({"worker killed": _worker_killed} if ray else {}),
            }
            for name, fault in faults.items():
                found[name] = fault(service, client)
                found[name]["next_equal"] = _pixels(client) == first
                say(f"  {name}: {found[name]}")
        found["stopped"] = _stopped(service)
        say(f"  stopped: {found['stopped']}")
    with running(*options, "--drain-s", str(DRAIN_S), ray=ray) as service:
        found["stopped late"] = {"drain_s": DRAIN_S, **_stopped(service)}
        say(f"  stopped late: {found['stopped late']}")
    return found


def _pixels(client: Client) -> bytes:
    return client.edit(picture(), [JOBS[0]], **EDIT).image.tobytes()


def _cancelled(service: Running, client: Client) -> dict[str, Any]:
    """Cancel at every stage: seconds until the worker is idle again, beside the longest step of an edit."""
    seconds, codes = {}, {}
    for stage in STAGES:
        edit = client.submit(picture(), [JOBS[0]], **(LONG if stage in ("warp", "drag") else EDIT | _slow(stage)))
        for at in edit.events():
            if at.stage == stage:
                break
        began = time.perf_counter()
        edit.cancel()
        _idle(client)
        seconds[stage], codes[stage] = time.perf_counter() - began, _outcome(edit)
    times = [time.perf_counter() for _ in client.submit(picture(), [JOBS[0]], **LONG).events()]
    return {"seconds": seconds, "codes": codes, "longest_step_s": max(b - a for a, b in itertools.pairwise(times))}


def _slow(stage: str) -> dict[str, Any]:
    """Settings that make a stage last."""
    steps = {"n_inference_step": 100, "inversion_strength": 1.0, "drag_end_step": 0 if stage == "denoise" else 1}
    return {"settings": {**steps, "track_per_step": 1, "max_drag_per_track": 1}}


def _outcome(edit: RemoteEdit) -> str:
    try:
        edit.result()
    except ServiceError as error:
        return error.code
    return "ok"


def _client_gone(service: Running, client: Client) -> dict[str, Any]:
    """A client hangs up while its edit runs."""
    connection = _posted(service, LONG)
    _until(lambda: _number(client, "running") == 1)
    time.sleep(0.3)
    began = time.perf_counter()
    connection.close()
    _idle(client)
    return {"seconds": time.perf_counter() - began}


def _deadline(service: Running, client: Client) -> dict[str, Any]:
    """An edit that takes longer than it may."""
    began = time.perf_counter()
    error = _error(lambda: client.edit(picture(), [JOBS[0]], deadline_s=1.0, **LONG))
    seconds = time.perf_counter() - began
    _idle(client)
    return {"code": _named(error), "seconds": seconds, "deadline_s": 1.0}


def _queue_full(service: Running, client: Client) -> dict[str, Any]:
    """One edit more than there are places."""
    edits = [client.submit(picture(), [JOBS[0]], **LONG) for _ in range(3)]
    with service.client() as impatient:
        began = time.perf_counter()
        error = _error(lambda: impatient.edit(picture(), [JOBS[0]], **EDIT))
        seconds = time.perf_counter() - began
    for edit in edits:
        edit.cancel()
    _idle(client)
    return {"code": _named(error), "seconds": seconds, "retry_after_s": None if error is None else error.retry_s}


def _hostile(service: Running, client: Client) -> dict[str, Any]:
    """Bodies that mean harm, on the wire: the status and code of each."""
    good = '{"drags":[{"handle":[194,74],"target":[209,54]}]}'
    many = '{"drags":[' + ",".join(['{"handle":[9,9],"target":[12,9]}'] * 10_000) + "]}"
    png = _png(64, 64)
    bodies = {
        "truncated picture": (png[: len(png) // 2], good),
        "a header of 50,000 x 50,000": (_png(50_000, 50_000, empty=True), good),
        "another format": (b"GIF89a" + bytes(100), good),
        "more bytes than allowed": (bytes(2 << 20), good),
        "10,000 points": (png, many),
        "NaN": (png, good.replace("194", "NaN")),
        "a point outside": (png, good),
        "no JSON": (png, "{"),
    }
    found = {}
    for name, (data, edit) in bodies.items():
        files: dict[str, Any] = {"picture": ("a.png", data, "image/png"), "edit": (None, edit, "application/json")}
        answer = httpx.post(f"{service.url}/v1/edits", files=files, timeout=60)
        found[name] = f"{answer.status_code} {answer.json()['error']['code']}"
    return {"answers": found}


def _worker_killed(service: Running, client: Client) -> dict[str, Any]:
    """SIGKILL for the replica that runs an edit."""
    edit = client.submit(picture(), [JOBS[0]], **LONG)
    for at in edit.events():
        if at.stage == "drag":
            break
    os.kill(service.workers()[0], signal.SIGKILL)
    began = time.perf_counter()
    error = _error(edit.result)
    told = time.perf_counter() - began
    _until(lambda: _error(lambda: _pixels(client)) is None)
    retry_s = None if error is None else error.retry_s
    return {"code": _named(error), "seconds": told, "retry_after_s": retry_s, "next_s": time.perf_counter() - began}


def _half_a_request(service: Running, client: Client) -> dict[str, Any]:
    """Connections that begin a request and never end it: what others wait meanwhile, and when they are closed."""
    at = urlsplit(service.url)
    began = time.perf_counter()
    many = [socket.create_connection((str(at.hostname), at.port or 80), timeout=30) for _ in range(SILENT)]
    for one in many:
        one.sendall(b"POST /v1/edits HTTP/1.1\r\nHost: localhost\r\n")
    asked = time.perf_counter()
    status = httpx.get(f"{service.url}/v2/health/ready", timeout=60).status_code
    answered_s = time.perf_counter() - asked
    left = list(many)
    while left and time.perf_counter() - began < HEAD_S + 10:
        time.sleep(0.01)
        left = [one for one in left if not closed(one)]
    seconds = time.perf_counter() - began
    for one in many:
        one.close()
    return {
        "connections": SILENT, "ready": status, "ready_within_s": answered_s, "head_s": HEAD_S,
        "closed": SILENT - len(left), "seconds": seconds,
    }  # fmt: skip


def closed(connection: socket.socket) -> bool:
    """Whether the service has hung up; does not wait."""
    connection.setblocking(False)
    try:
        return connection.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def _stopped(service: Running) -> dict[str, Any]:
    """SIGTERM while an edit runs: how that ends, what new requests are told as soon as it is known, when it leaves."""
    outcome: list[ServiceError | None] = []

    def work() -> None:
        with service.client() as client:
            outcome.append(_error(lambda: client.edit(picture(), [JOBS[0]], **LASTING)))

    thread = threading.Thread(target=work)
    with service.client() as client:
        thread.start()
        _until(lambda: _number(client, "running") == 1)
        service.process.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        _until(lambda: _ready(service)["state"] == "draining")
        draining_s, status = time.perf_counter() - began, _ready(service)["status"]
        refused = _error(lambda: client.edit(picture(), [JOBS[0]], **EDIT))
    thread.join(PATIENCE_S)
    ended_s = time.perf_counter() - began
    code = service.process.wait(PATIENCE_S)
    return {
        "ready": status, "draining_s": draining_s, "running_edit": _named(outcome[0]), "running_s": ended_s,
        "new_edit": _named(refused), "retry_after_s": None if refused is None else refused.retry_s,
        "exit_code": code, "exit_s": time.perf_counter() - began,
    }  # fmt: skip


def _ready(service: Running) -> dict[str, Any]:
    """What the service says of itself on a connection of its own, and with which status."""
    answer = httpx.get(f"{service.url}/v2/health/ready", timeout=60)
    return {**answer.json(), "status": answer.status_code}


def _error(call: Callable[[], object]) -> ServiceError | None:
    try:
        call()
    except ServiceError as error:
        return error
    return None


def _named(error: ServiceError | None) -> str:
    """The HTTP status and code of an answer; status 0: there was none, nobody could be reached."""
    return "200 ok" if error is None else f"{error.status} {error.code}"


def _number(client: Client, name: str) -> float:
    """A gauge of /metrics."""
    for line in client.metrics().splitlines():
        if line.startswith(f"ddengine_{name} "):
            return float(line.split()[1])
    raise RuntimeError(f"/metrics has no ddengine_{name}")


def _idle(client: Client) -> None:
    _until(lambda: _number(client, "running") == 0 and _number(client, "queued") == 0)


def _until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError(f"it did not happen within {PATIENCE_S:g} s")
        time.sleep(0.005)


def _posted(service: Running, asked: dict[str, Any]) -> socket.socket:
    """A connection on which an edit has been sent."""
    edit = json.dumps({**asked, "drags": [{"handle": JOBS[0][0], "target": JOBS[0][1]}]})
    files: dict[str, Any] = {
        "picture": ("a.png", _png(256, 256), "image/png"),
        "edit": (None, edit, "application/json"),
    }
    request = httpx.Request("POST", f"{service.url}/v1/edits", files=files)
    body, at = request.read(), urlsplit(service.url)
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    connection = socket.create_connection((str(at.hostname), at.port or 80), timeout=30)
    connection.sendall("\r\n".join(["POST /v1/edits HTTP/1.1", *lines, "", ""]).encode() + body)
    return connection


def _png(width: int, height: int, empty: bool = False) -> bytes:
    """A grey PNG; empty: whose pixels are not there."""
    rows = b"" if empty else b"".join(b"\0" + bytes((x ^ y) & 255 for x in range(width)) for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
