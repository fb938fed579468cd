"""The timer that benches share: what is compared takes turns, and a known duration is measured as such."""

from __future__ import annotations

import time

import pytest
import torch

from ddengine.bench import timer


class Clock:
    """Stands for the module time: a clock on the wall that calls move on, and one of the processor's that stays."""

    def __init__(self) -> None:
        self.wall = self.busy = 5.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.busy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """No other program on the machine lengthens what it shows."""
    clock = Clock()
    monkeypatch.setattr(timer, "time", clock)
    return clock


def test_calls_take_turns_and_their_time_is_measured(clock: Clock) -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float):
        def call() -> None:
            order.append(name)
            clock.wall += seconds * (1 + len(order) % 3)

        return call

    found = timer.measure({"short": sleeper("short", 0.002), "long": sleeper("long", 0.006)}, seconds=0, fewest=6)
    assert order[-4:] == ["short", "long", "short", "long"] and len(order) == 2 * 2 + 2 * 6
    for name, least in (("short", 0.002), ("long", 0.006)):
        timing = found[name]
        assert (timing.p20, timing.median, timing.p80) == pytest.approx((least, 2 * least, 3 * least), abs=1e-9)
        assert timing.samples == 6 and timing.clock == "host"


def test_quick_calls_are_repeated_until_the_clock_can_tell(clock: Clock) -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        clock.wall += 4e-6

    timing = timer.measure({"call": call}, seconds=0, fewest=3)["call"]
    # A call to warm up, one to tell how many there are to a millisecond, then as many for each sample.
    assert count - 2 in range(3 * 250, 3 * 251 + 1)
    assert timing.median == pytest.approx(4e-6, rel=1e-6)


def test_samples_fill_the_seconds_that_there_are(clock: Clock) -> None:
    def call() -> None:
        clock.wall += 0.01

    for seconds, samples in ((0.02, 5), (0.2, 20), (99.0, 30)):
        assert timer.measure({"call": call}, seconds=seconds, fewest=5, most=30)["call"].samples == pytest.approx(
            samples, abs=1
        )


def test_processor_time_leaves_out_what_others_do(clock: Clock) -> None:
    def call() -> None:
        clock.wall += 0.01
        clock.busy += 0.002

    timing = timer.measure({"waits": call}, seconds=0, fewest=3, processor=True)["waits"]
    assert timing.median == pytest.approx(0.002) and timing.clock == "processor time"


def test_the_clock_is_the_hosts() -> None:
    """The real one: what sleeps takes at least that long, and none of the processor's time to speak of."""
    calls = {"sleeps": lambda: time.sleep(0.02)}
    assert timer.measure(calls, seconds=0, fewest=3)["sleeps"].p20 >= 0.02
    assert timer.measure(calls, seconds=0, fewest=3, processor=True)["sleeps"].median < 0.02


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
