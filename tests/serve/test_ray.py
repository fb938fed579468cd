"""The service on a real Ray, started as a user would start it: half a minute of Ray, minutes on busy cores."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ray")

from ddengine.bench import faults
from ddengine.bench.load import EDIT, JOBS, picture
from ddengine.bench.service import running
from ddengine.client import Client, RemoteCancelled
from ddengine.config import DirectDragConfig
from ddengine.engine import Engine
from ddengine.serve.ray_app import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "serve" / "config.yaml"
FAR = ((60, 60), (240, 200))  # so far that the handle does not arrive in all the updates there are

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service():
    """Two workers."""
    with running("--concurrency", "2", "--progress-s", "0", ray=True) as found:
        yield found
        assert found.stop() == 0
        assert found.processes() == [found.process.pid]  # nothing of Ray is left


@pytest.fixture
def client(service):
    with service.client(retries=8) as found:
        yield found


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    config = DirectDragConfig.preset(EDIT["config"], **EDIT["settings"])
    return np.asarray(Engine.load().edit(picture(), [JOBS[0]], config=config).image)


def pixels(client: Client, image: Image.Image) -> np.ndarray:
    return np.asarray(client.edit(image, [JOBS[0]], **EDIT).image)


def numbers(client: Client) -> dict[str, float]:
    lines = [line.split() for line in client.metrics().splitlines() if not line.startswith("#")]
    return {line[0]: float(line[1]) for line in lines}


def come_to(client: Client, wanted: dict[str, float]) -> None:
    """Wait for metrics to be these: they are a moment old, and a busy worker's are left out."""
    ends = time.monotonic() + 60
    while (found := {name: numbers(client)[name] for name in wanted}) != wanted:
        assert time.monotonic() < ends, f"{found} is not {wanted}"
        time.sleep(0.1)


def test_an_edit_is_the_engine_s(client, expected):
    np.testing.assert_array_equal(pixels(client, picture()), expected)


def test_edits_of_a_source_go_where_it_is(service, client, expected):
    come_to(client, {"ddengine_workers": 2})
    before = numbers(client)
    sources = [client.prepare(picture(), **EDIT) for _ in range(6)]
    ids = [source.id for source in sources]
    for source in sources * 2:
        np.testing.assert_array_equal(pixels(client, source), expected)
    assert [source.id for source in sources] == ids, "a source was prepared again"
    after = {
        "ddengine_workers": 2,
        "ddengine_sources": before["ddengine_sources"] + 6,
        "ddengine_source_hits": before["ddengine_source_hits"] + 12,
        "ddengine_source_misses": before["ddengine_source_misses"],
    }
    come_to(client, after)
    client.forget(sources[0])
    come_to(client, {**after, "ddengine_sources": after["ddengine_sources"] - 1})
    np.testing.assert_array_equal(pixels(client, sources[0]), expected)  # 410, and it was sent again
    assert sources[0].id != ids[0]


def test_progress_arrives_and_cancelling_stops_it(client):
    edit = client.submit(picture(), [FAR], config="default", previews=True)
    stages, steps, total = [], 0, 0
    for at in edit.events():
        if at.stage not in stages:
            stages.append(at.stage)
        if at.stage == "drag":
            steps, total = steps + 1, at.total
        if steps == 3 and at.stage == "drag":
            assert at.points is not None
            assert edit.cancel()
    assert stages == ["encode", "invert", "reference", "warp", "drag"]
    assert total == 210 and steps < total / 2
    come_to(client, {"ddengine_running": 0, "ddengine_queued": 0})
    with pytest.raises(RemoteCancelled):
        edit.result()


def listening(pids: list[int]) -> list[tuple[str, int, int]]:
    """(address, port, process) of every TCP socket that these processes listen on."""
    owners = {}
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                owners[os.readlink(entry)] = pid
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and (owner := owners.get(f"socket:[{words[9]}]")):
                address, _, port = words[1].partition(":")
                raw = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
                found.append((socket.inet_ntop(family, raw), int(port, 16), owner))
    return found


def test_nothing_but_loopback_listens_without_a_token(service):
    """All of Ray is on loopback but the ports between replicas, which Serve opens everywhere: they want the token.

    So does the endpoint that takes jobs, on loopback.
    """
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    found = listening(service.processes())
    assert len(found) > 5
    mapped = [
        (getattr(ip := ipaddress.ip_address(one), "ipv4_mapped", None) or ip, port, pid) for one, port, pid in found
    ]
    outside = [(port, pid) for address, port, pid in mapped if not address.is_loopback]
    for port, pid in outside:
        assert "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for metadata in (None, [("authorization", "Bearer guess")]):
                with pytest.raises(grpc.RpcError) as refused:
                    stub = serve_pb2_grpc.ASGIServiceStub(channel)
                    stub.HandleRequest(serve_pb2.ASGIRequest(), metadata=metadata, timeout=30)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED

    agents = [port for _, port, pid in mapped if "DashboardA" in Path(f"/proc/{pid}/cmdline").read_text()]
    answers = []
    for port in agents:
        with suppress(httpx.TransportError):  # not all of them speak HTTP/1
            job = {"entrypoint": "true"}
            answers.append(httpx.post(f"http://127.0.0.1:{port}/api/job_agent/jobs/", json=job, timeout=30).status_code)
    assert 401 in answers and 200 not in answers


def test_faults_are_survived():
    found = faults.measure(ray=True)
    assert set(found["cancelled"]["codes"].values()) == {"cancelled"}
    assert found["deadline"]["code"] == "504 deadline" and found["queue full"]["code"] == "429 busy"
    killed = found["worker killed"]
    assert killed["code"] == "503 unavailable" and killed["retry_after_s"]
    assert all(one["next_equal"] for one in found.values() if "next_equal" in one)
    assert found["half a request"]["ready"] == 200
    assert found["stopped"]["running_edit"] == "200 ok"
    assert found["stopped late"]["running_edit"] == "503 unavailable"
    for stopped in (found["stopped"], found["stopped late"]):  # answered: a connection refused has no status
        assert (stopped["ready"], stopped["new_edit"], stopped["exit_code"]) == (503, "503 unavailable", 0)


def test_the_shipped_configuration_file_serves(tmp_path, expected):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.read_text(encoding="utf-8").replace("port: 8000", f"port: {port}"))
    program = Path(sys.executable).with_name("serve")
    environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_TOKEN": "t" * 64, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen([program, "run", config], stderr=file, stdout=file, env=environment) as it,
    ):
        try:
            with Client(f"http://127.0.0.1:{port}", retries=8) as client:
                ends = time.monotonic() + 300
                while not client.ready():
                    assert it.poll() is None and time.monotonic() < ends, log.read_text()
                    time.sleep(0.5)
                np.testing.assert_array_equal(pixels(client, picture()), expected)
        finally:
            it.terminate()  # not SIGINT, which a background job of a shell ignores, and all that it starts
            try:
                it.wait(120)
            except subprocess.TimeoutExpired:
                it.kill()
                raise
