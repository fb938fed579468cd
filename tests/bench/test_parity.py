"""The parity bench sees a difference where there is one, and the document says what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddengine.backends.eager import EagerPasses
from ddengine.bench import gradients, parity
from ddengine.config import DirectDragConfig
from ddengine.directdrag.drag import PlainUnit
from ddengine.models.load import load_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DirectDragConfig.preset("default", n_inference_step=8, drag_end_step=1, track_per_step=2, max_drag_per_track=2)


def test_equal_units_have_no_difference_and_a_nudged_one_has() -> None:
    model = load_model("embedded", device="cpu")
    passes = EagerPasses(model)
    recorder, shape = parity.recorded(passes, parity.drawn_task(parity.engine_of(passes), CONFIG), CONFIG)
    assert len(recorder.seen) == 5 and shape.pairs == 1  # four updates and a look
    same = parity.compare(PlainUnit(EagerPasses(model), recorder.rules), recorder.seen, torch.device("cpu"))
    assert same and all(found["worst"] < 1e-9 for found in same.values()), same
    nudged = parity.compare(PlainUnit(parity.NudgedPasses(model), recorder.rules), recorder.seen, torch.device("cpu"))
    assert 0 < nudged["drag loss"]["worst"] < 1e-4 and nudged["decisions"]["worst"] == 0


@pytest.mark.parametrize(("name", "text"), [("parity", parity.text), ("gradients", gradients.text)])
def test_the_document_says_what_was_measured(name: str, text: object) -> None:
    facts = json.loads((ROOT / "bench" / "results" / f"{name}-cpu.json").read_text())
    page = (ROOT / "docs" / "drag-step.md").read_text()
    told = page.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0].strip()
    assert told == text(facts)
