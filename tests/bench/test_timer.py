"""The timer that benches share: what is compared takes turns, and a known duration is measured as such."""

from __future__ import annotations

import time

import pytest
import torch

from ddengine.bench import timer


def test_calls_take_turns_and_sleep_is_measured() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    found = timer.measure({"short": sleeper("short", 0.002), "long": sleeper("long", 0.006)}, seconds=0, fewest=5)
    assert order[-4:] == ["short", "long", "short", "long"]
    for name, least in (("short", 0.002), ("long", 0.006)):
        timing = found[name]
        assert least <= timing.p20 <= timing.median <= timing.p80 and timing.samples == 5 and timing.clock == "host"
    assert found["short"].median < found["long"].median


def test_quick_calls_are_repeated_until_the_clock_can_tell() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    timing = timer.measure({"call": call}, seconds=0, fewest=3)["call"]
    assert count > 100 and timing.median < 1e-4


def test_processor_time_leaves_out_what_others_do() -> None:
    timing = timer.measure({"waits": lambda: time.sleep(0.01)}, seconds=0, fewest=3, processor=True)["waits"]
    assert timing.median < 0.005 and timing.clock == "processor time"


def test_the_summary_is_by_percentiles() -> None:
    found = timer.summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0], "x")
    assert (found.median, found.p20, found.p80, found.samples) == (3.5, 2.0, 5.0, 6)
    assert str(timer.Timing(1.5e-5, 2e-9, 2.0, 3, "x")) == "15 µs (2 ns to 2 s)"


def test_a_cpu_replays_no_graph() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        timer.measure({"x": lambda: None}, "cpu", replay=True)


def test_the_machine_names_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(timer.COMMIT, "abc")
    facts = timer.machine()
    assert (facts["commit"], facts["dirty"], facts["torch"]) == ("abc", None, torch.__version__)
    monkeypatch.delenv(timer.COMMIT)
    commit = timer.machine()["commit"]
    assert commit is None or len(commit) == 40


@pytest.mark.gpu
def test_events_see_the_work_and_not_the_launch() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    calls = {"one": lambda: x @ x, "two": lambda: (x @ x) @ x, "tiny": lambda: x[:1, :1] + 1}
    for replay in (False, True):
        found = timer.measure(calls, "cuda", replay=replay, seconds=0.5)
        assert found["two"].median == pytest.approx(2 * found["one"].median, rel=0.25)
        assert found["tiny"].median < 1e-4 < found["one"].median
        assert ("replay" in found["one"].clock) == replay
