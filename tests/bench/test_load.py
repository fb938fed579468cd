"""The service bench: its arithmetic, its faults on a real `ddengine serve --no-ray`, and the document that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from ddengine.bench import faults, load
from ddengine.bench.service import running
from ddengine.errors import DDEngineError

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCUMENT = ROOT / "bench" / "results" / "service-cpu.json", ROOT / "docs" / "service.md"


def test_memory_that_grows_is_seen():
    def slope(sizes) -> float:
        left = iter(sizes)
        memory = load._Memory(SimpleNamespace(rss=lambda: next(left)))
        for _ in sizes:
            memory.look()
        return memory.facts()["slope_bytes_an_edit"]

    warm = [1000 * number for number in range(load.WARM)]  # caches fill
    assert abs(slope(warm + [50_000] * 100)) < 1e-6
    assert abs(slope(warm + [50_000 + 10 * number for number in range(100)]) - 10) < 1e-6


def test_results_that_differ_are_seen():
    digests = load._Digests()
    for job, pixels in ((0, b"a"), (1, b"b"), (0, b"a")):
        digests.add(job, pixels)
    assert digests.equal
    digests.add(1, b"c")
    digests.add(1, b"b")
    assert not digests.equal


def test_a_service_that_does_not_start_says_why():
    with pytest.raises(DDEngineError, match="queue is -1"), running("--queue", "-1"):
        pass


def check(found: dict, code_after_kill: str | None) -> None:
    """What every service owes, however fast the machine."""
    assert set(found["cancelled"]["codes"].values()) == {"cancelled"}
    assert found["deadline"]["code"] == "504 deadline" and found["deadline"]["seconds"] < 30
    assert found["queue full"]["code"] == "429 busy" and found["queue full"]["retry_after_s"] >= 1
    assert list(found["hostile"]["answers"].values()) == [
        "422 invalid", "413 too_large", "415 unsupported_media", "413 too_large", "422 invalid", "400 bad_request",
        "422 invalid", "400 bad_request",
    ]  # fmt: skip
    assert found["stopped"]["running_edit"] == "200 ok"
    assert found["stopped late"]["running_edit"] == "503 unavailable"
    for stopped in (found["stopped"], found["stopped late"]):  # answered: a connection refused has no status
        assert (stopped["ready"], stopped["new_edit"], stopped["exit_code"]) == (503, "503 unavailable", 0)
        assert stopped["retry_after_s"] >= 1
    assert found["half a request"]["ready"] == 200
    assert all(one["next_equal"] for one in found.values() if "next_equal" in one)
    assert found.get("worker killed", {}).get("code") == code_after_kill


def test_faults_are_survived_by_a_process():
    found = faults.measure()
    check(found, None)
    half, late = found["half a request"], found["stopped late"]
    assert half["closed"] == half["connections"]
    assert late["drain_s"] - 0.5 < late["running_s"] < late["drain_s"] + 20 and late["exit_s"] < late["drain_s"] + 40


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_document_s_numbers_are_these(results):
    document = DOCUMENT.read_text(encoding="utf-8")
    for table in load.text(results).split("\n\n"):
        assert table in document, f"docs/service.md lacks\n{table}"


def test_what_is_claimed_was_measured(results):
    """The promises of the document: results equal, memory flat, faults answered; whatever the seconds were."""
    assert results["process"]["memory"]["edits"] == 200
    for key in ("process", "ray", "ray of two"):
        assert results[key]["equal"] and results[key]["exit_code"] == 0
        assert results[key]["burst"]["answers"] == {"busy": 5 + (key == "ray of two"), "ok": 5 + (key == "ray of two")}
    memory = results["process"]["memory"]
    assert memory["slope_bytes_an_edit"] * memory["edits"] < 0.05 * memory["first_bytes"]
    check(results["faults"]["process"], None)
    check(results["faults"]["ray"], "503 unavailable")
    assert results["machine"]["commit"]
