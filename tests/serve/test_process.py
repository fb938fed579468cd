"""The whole service as a process of its own: one command, one worker, a signal in the middle of an edit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from serve_fakes import form

SETTINGS = {"settings": {"n_inference_step": 8, "drag_end_step": 2, "track_per_step": 4}}


@contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """`ddengine serve --no-ray` on a free port, and the lines it writes as they come."""
    command = [sys.executable, "-m", "ddengine", "serve", "--no-ray", "--port", "0", "--backend", "eager", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines: list[str] = []

    def read() -> None:
        lines.extend(map(str.rstrip, process.stderr))

    reading = threading.Thread(target=read)
    reading.start()
    try:
        yield process, lines
    finally:
        process.kill()
        process.wait()
        reading.join()
        process.stderr.close()


def wait(condition, seconds: float = 180.0):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


@pytest.mark.slow
def test_a_service_is_started_used_and_stopped_in_the_middle_of_an_edit():
    with served("--drain-s", "120") as (process, lines):
        wait(lambda: lines and lines[0].startswith("listening on http://127.0.0.1:"))
        with httpx.Client(base_url=lines[0].split()[-1], timeout=120) as http:
            wait(lambda: http.get("/v2/health/ready").status_code == 200)
            assert http.post("/v1/edits", **form(SETTINGS)).headers["content-type"] == "image/png"
            assert http.get("/v2", headers={"Host": "evil.example"}).status_code == 421
            found = []
            editing = threading.Thread(target=lambda: found.append(http.post("/v1/edits", **form(SETTINGS))))
            editing.start()
            wait(lambda: "ddengine_running 1.0" in http.get("/metrics").text)
            process.send_signal(signal.SIGTERM)
            editing.join(120)
        assert [answer.status_code for answer in found] == [200]
        assert process.wait(60) == 0
        logged = [json.loads(line) for line in lines[1:]]
        ends = [line for line in logged if line["message"] == "job"]
        assert [line["outcome"] for line in ends] == ["ok", "ok"] and all(line["request"] for line in ends)
        assert not [line for line in logged if line["level"] in ("error", "critical")]


@pytest.mark.slow
def test_a_service_whose_model_cannot_be_used_ends(tmp_path):
    with served("--model", str(tmp_path)) as (process, lines):
        assert process.wait(120) != 0
        assert any(str(tmp_path) in line for line in lines if not line.startswith("{"))
