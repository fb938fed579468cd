"""What the report calls the pass before folding is the same pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddengine.backends.eager import EagerPasses
from ddengine.backends.graphs import PassShape, pass_graph
from ddengine.bench import export_report
from ddengine.export.to_onnx import needed_shape
from ddengine.models.load import load_model

SHAPE = PassShape((64, 48), readout_hw=(8, 6))


@pytest.mark.parametrize("name", ["predict", "reference", "denoise"])
def test_before_folding_it_is_the_same_pass(name: str) -> None:
    model = load_model("embedded", device="cpu", dtype="float32")
    shape = needed_shape(name, SHAPE)
    graph = pass_graph(name, model, EagerPasses(model).network, shape)
    inputs = graph.make_inputs(torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = export_report.Unfolded(name, model, shape.readout_hw)(*inputs), graph(*inputs)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_a_report_counts_times_and_writes(tmp_path: Path) -> None:
    model = load_model("embedded", device="cpu", dtype="float32")
    found = export_report.counts(model, SHAPE, ["encode"])
    assert found["encode"]["before"]["gflop"] == found["encode"]["after"]["gflop"] > 0.1
    assert found["encode"]["after"]["constant_nodes"] == 0
    facts = {"counts": found}
    assert json.loads(export_report.write(facts, tmp_path / "facts.json").read_text()) == facts
    assert "encode" in export_report.table(facts)
