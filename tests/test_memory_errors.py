"""Out of memory: an error that says what would fit, and an engine that goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddengine
from ddengine.backends.eager import EagerPasses
from ddengine.errors import InputError
from ddengine.memory_errors import memory_errors, remedy

GIB = 1 << 30


@given(st.integers(8, 512), st.integers(1, 16), st.integers(0, 80), st.integers(0, 80), st.integers(0, 80))
def test_the_remedy_is_smaller_than_what_failed(cells: int, edits: int, held: int, needed: int, total: int) -> None:
    side = 8 * cells
    text = remedy((side, side // 2), edits, held * GIB, needed * GIB, total * GIB)
    size = int(text.partition("size=")[2].partition(" ")[0])
    assert size % 8 == 0 and size >= 64 and (size < side or side == 64)
    if edits > 1:
        assert 1 <= int(text.split()[1]) < edits


def test_the_size_follows_the_memory() -> None:
    """2 GiB of weights, 10 GiB wanted beyond them, 5 to be had: four tenths of the area, with the margin."""
    assert "size=640 " in remedy((1024, 768), 1, 2 * GIB, 12 * GIB, 7 * GIB)
    assert remedy((512, 512), 4, 2 * GIB, 12 * GIB, 7 * GIB).startswith("Edit 1 at once, or load the engine with size=")


def test_other_errors_pass() -> None:
    for error in (ValueError("no"), RuntimeError("shapes differ"), ddengine.Cancelled("enough")):
        with pytest.raises(type(error), match=str(error)), memory_errors(torch.device("cpu"), (64, 64)):
            raise error


def test_the_engine_works_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, drag = ddengine.Engine.load(), [((64, 50), (64, 40))]
    config = ddengine.DirectDragConfig.preset("preview", drag_end_step=1, track_per_step=1)
    picture = torch.randint(0, 255, (128, 96, 3), dtype=torch.uint8).numpy()
    before = engine.edit(picture, drag, config=config)
    source = engine.prepare(picture, config=config)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(EagerPasses, "supervise", full)
        with pytest.raises(InputError, match=r"96 x 128 pixels: CUDA out of memory.*size=88.*float16"):
            engine.edit(source, drag, config=config)
        with pytest.raises(InputError, match=r"96 x 128 pixels, 2 at once: .*Edit 1 at once"):
            engine.edit_batch([(source, drag), (source, drag)], config=config)
    after = engine.edit(picture, drag, config=config)
    assert after.image.tobytes() == before.image.tobytes()
