"""A Ray cluster of this machine alone gives what processes give; it takes a minute and a GB to start."""

from __future__ import annotations

import importlib
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ddengine.bench.evaluation.cluster import HERE, on_ray
from ddengine.bench.evaluation.plan import Plan
from ddengine.bench.evaluation.pool import Died
from ddengine.bench.evaluation.run import evaluate
from ddengine.errors import BackendUnavailable

FEW = {"n_inference_step": "4", "drag_end_step": "1", "track_per_step": "1", "max_drag_per_track": "1"}


@pytest.mark.slow
def test_a_local_cluster_answers_as_this_process(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    real = replace(plan, engine={"device": "cpu", "backend": "eager"})
    alone = evaluate(replace(real, folder=tmp_path / "alone"))
    shared = evaluate(replace(real, folder=tmp_path / "shared", ray=HERE, jobs=2))
    assert shared == alone and alone["failures"] == [] and len(alone["edits"]) == 3
    # Actors that die lose their job alone.
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder)
    work = importlib.import_module("squares")
    found = list(on_ray(work.Squares(), range(9), 2, HERE))
    (dead,) = [answer for _, answer in found if isinstance(answer, Died)]
    assert dead.job == 7 and "actor failed" in dead.error
    assert sorted(pair for pair in found if not isinstance(pair[1], Died)) == sorted(
        pair for n in range(9) if n != 7 for pair in ((n, n), (n, n * n))
    )


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
            with pytest.raises(BackendUnavailable, match="start one, or use --ray local"):
                next(on_ray(None, range(3), 1, address))


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailable, match="pip install"):
        next(on_ray(None, range(3), 1, "local"))
