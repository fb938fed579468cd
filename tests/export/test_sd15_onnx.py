"""Stable Diffusion 1.5's full shape with random weights: every pass exported, free of constants, and checked once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddengine.backends.eager import EagerPasses
from ddengine.backends.engines import wanted_passes
from ddengine.backends.graphs import PASSES
from ddengine.backends.ort import OnnxRuntimePrograms
from ddengine.bench.shapes import sd15
from ddengine.export.count import count_graph
from ddengine.export.to_onnx import GRAPH, WEIGHTS
from ddengine.store import ArtefactStore


@pytest.mark.slow
def test_every_pass_at_the_full_shape(tmp_path: Path) -> None:
    """Minutes, 14 GB of disk and as much memory; an exporter folds small models where it leaves this one alone."""
    torch.manual_seed(0)
    model = sd15("cpu", torch.float32)
    programs = OnnxRuntimePrograms(ArtefactStore(tmp_path), model, EagerPasses(model).network)
    seen = []
    for name, shape in wanted_passes((512, 512), readout_hw=(64, 64)):
        made = programs.build(name, shape)  # runs it beside PyTorch, and refuses it if they differ
        assert made.about["error"] <= 1e-4
        assert WEIGHTS in made.files
        count = count_graph(made.path(GRAPH))
        assert count.constant_nodes == 0
        if name in ("predict", "reference", "denoise"):
            assert 7.5e11 < count.flops < 8.5e11
            assert count.by_op["MatMul"] >= 2 * 32  # two products an attention at least
        seen.append(name)
        print(name, shape.readout_hw, count.nodes, f"{count.flops / 1e9:.3f} GFLOP", made.about["error"])
    assert set(seen) == set(PASSES)
