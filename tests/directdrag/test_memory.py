"""Keys and values: which place they get, that they come from it unchanged, and that the next are fetched in time."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddengine.directdrag import memory
from ddengine.directdrag.memory import KV_BUDGET, KeptKeyValues, Shelf, check_budget, place_kv
from ddengine.errors import InputError

GIB = 1 << 30
SIZES = st.integers(0, 64 * GIB)


@pytest.mark.parametrize(
    ("needed", "device_free", "host_free", "budget", "place"),
    [
        (KV_BUDGET, None, None, None, "device"),
        (KV_BUDGET + 1, None, None, None, "recompute"),
        (5 * GIB, None, None, 6 * GIB, "device"),
        (GIB, 4 * GIB, 0, None, "device"),
        (GIB + 1, 4 * GIB, 8 * GIB, None, "host"),
        (GIB + 1, 4 * GIB, 2 * GIB, None, "recompute"),
        (2 * GIB, 4 * GIB, 8 * GIB, 2 * GIB, "device"),  # a budget may take more than the default's share
        (2 * GIB, GIB, 8 * GIB, 2 * GIB, "host"),  # but never what is not there
        (GIB, 64 * GIB, 64 * GIB, 1, "host"),
        (GIB, 64 * GIB, 64 * GIB, 0, "recompute"),
    ],
)
def test_the_place(needed: int, device_free: int | None, host_free: int | None, budget: int | None, place: str) -> None:
    assert place_kv(needed, device_free, host_free, budget) == place


@given(SIZES, st.none() | SIZES, st.none() | SIZES, st.none() | SIZES)
def test_a_place_has_room_and_more_room_is_never_worse(
    needed: int, device_free: int | None, host_free: int | None, budget: int | None
) -> None:
    order = ["device", "host", "recompute"]
    place = place_kv(needed, device_free, host_free, budget)
    if place == "device":
        assert needed <= (needed if device_free is None else device_free) and (budget is None or needed <= budget)
    if place == "host":
        assert host_free is not None and 2 * needed <= host_free
    more = [None if room is None else 2 * room + 1 for room in (device_free, host_free, budget)]
    assert order.index(place_kv(needed, *more)) <= order.index(place)
    assert order.index(place_kv(needed // 2, device_free, host_free, budget)) <= order.index(place)


@pytest.mark.parametrize("budget", [-1, 1.0, True, "1 GiB"])
def test_a_budget_is_bytes(budget: Any) -> None:
    with pytest.raises(InputError, match=r"budget is .*None or a whole number of bytes"):
        check_budget(budget)


def step_pairs(step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [tuple(torch.randn(2, 1, tokens, 6, generator=generator)) for tokens in (4, 16)]


def test_the_host_keeps_all_steps_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "place_on", lambda *_: "host")
    monkeypatch.setattr(memory, "_pinned", lambda rows, columns, dtype: torch.full((rows, columns), torch.nan))
    shelf = Shelf(step_pairs(0), 3, torch.device("cuda:0"), None)
    for step in range(3):
        shelf.put(step_pairs(step))
    for step, row in enumerate(shelf.rows):
        for ours, theirs in zip(row, step_pairs(step), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert len({tensor.untyped_storage().data_ptr() for row in shelf.rows for pair in row for tensor in pair}) == 1


def test_a_driver_that_refuses_pinned_memory_costs_passes_not_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(memory, "place_on", lambda *_: "host")
    monkeypatch.setattr(memory, "_pinned", refuse)
    assert Shelf(step_pairs(0), 3, torch.device("cuda:0"), None).place == "recompute"


def test_keys_and_values_on_the_device_are_handed_out_as_they_are() -> None:
    rows = [tuple(step_pairs(step)) for step in range(3)]
    kept = KeptKeyValues(rows, torch.device("cpu"))
    assert all(kept[step] is rows[step] for step in (0, 2, 1, 1))


def test_without_streams_they_are_copied_when_asked_for() -> None:
    kept = KeptKeyValues([tuple(step_pairs(step)) for step in range(2)], torch.device("meta"))
    assert [key.shape for key, _ in kept[1]] == [key.shape for key, _ in step_pairs(1)]
    assert all(tensor.device.type == "meta" for pair in kept[1] for tensor in pair)


class FakeTensor:
    """Stands for a tensor on a GPU: knows what has to happen before it may be read."""

    def __init__(self, step: int, log: list[str]) -> None:
        self.step, self.log = step, log

    def record_stream(self, stream: str) -> None:
        self.log.append(f"{stream} holds {self.step}")


def test_the_next_step_is_fetched_beside_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, here a recorded one: one copy ahead, waited for by the computing stream before the tensors are used."""
    log: list[str] = []
    rows = [((torch.full((1,), float(step)), torch.zeros(1)),) for step in range(4)]

    class Copies:
        def record_event(self) -> str:
            return f"event {log[-1]}"

    class Computing(str):
        def wait_event(self, event: str) -> None:
            log.append(f"wait for {event}")

    @contextmanager
    def on(stream: Any) -> Any:
        assert isinstance(stream, Copies)
        yield

    def copied(row: Any, device: torch.device) -> Any:
        step = int(row[0][0])
        log.append(f"copy {step}")
        return ((FakeTensor(step, log),),)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Copies())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computing("computing"))
    monkeypatch.setattr(memory, "copied", copied)
    kept = KeptKeyValues(rows, torch.device("cuda:0"))
    for step in (1, 2, 3):  # an edit's first steps drag
        ((tensor,),) = kept[step]
        assert tensor.step == step
    assert log == [
        "copy 1", "wait for event copy 1", "computing holds 1", "copy 2",
        "wait for event copy 2", "computing holds 2", "copy 3",
        "wait for event copy 3", "computing holds 3",
    ]  # fmt: skip
    log.clear()
    assert kept[2][0][0].step == 2 and log[:2] == ["copy 2", "wait for event copy 2"]  # out of order works too


def test_a_pipeline_of_copies_is_started_before_the_step_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    kept = KeptKeyValues([tuple(step_pairs(step)) for step in range(3)], torch.device("meta"))
    fetch = kept._fetch
    monkeypatch.setattr(kept, "_fetch", lambda step: started.append(step) or fetch(step))
    seen = [kept[step] and list(started) for step in range(3)]
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2]]  # each once, the next one while a step is computed
