"""A Ray cluster of this machine alone gives what processes give; it takes a minute and a GB to start."""

from __future__ import annotations

import importlib
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddengine.bench.evaluation.cluster import HERE, on_ray
from ddengine.bench.evaluation.plan import Plan
from ddengine.bench.evaluation.pool import Died
from ddengine.bench.evaluation.run import evaluate
from ddengine.errors import BackendUnavailable, ModelError

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
    # Nobody replaces the one that met 7; the other goes on, and alone it has what it could not load to say.
    found = list(on_ray(work.Scarce(str(tmp_path / "alone"), 2), range(9), 2, HERE))
    assert sum(not isinstance(answer, Died) for _, answer in found) == 16
    with pytest.raises(ModelError, match="no memory; close something"):
        list(on_ray(work.Scarce(str(tmp_path / "alone"), 0), range(9), 2, HERE))
    with pytest.raises(BackendUnavailable, match=r"0 GPU, an actor needs 1 CPU and 1000 GPU"):
        next(on_ray(work.Squares(), range(9), 2, HERE, gpus=1000.0))


class Cluster:
    """Stands for the module ray: actors in this process. places: how many there are; held: those others have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cpus: float, gpus: float, held: int = 0) -> None:
        self.total = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self.held, self.alive, self.most, self.answers = held, [], 0, {}
        self.exceptions = SimpleNamespace(RayError=RuntimeError)
        monkeypatch.setitem(sys.modules, "ray", self)
        monkeypatch.setitem(sys.modules, "ray.exceptions", self.exceptions)

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self):
        return self.total

    def available_resources(self):
        return {"CPU": self.total["CPU"] - self.held}

    def remote(self, num_cpus, num_gpus):
        return lambda kind: SimpleNamespace(remote=lambda what: self.actor(kind(what)))

    def actor(self, real):
        actor = SimpleNamespace()
        for name in ("answer", "load", "work"):
            ask = partial(self.ask, actor, getattr(real, name))
            setattr(actor, name, SimpleNamespace(remote=ask))
        self.alive.append(actor)
        self.most = max(self.most, len(self.alive))
        return actor

    def ask(self, actor, method, *given):
        answer = object()
        self.answers[answer] = (actor, method, given)
        return answer

    def wait(self, answers, num_returns, timeout):
        placed = self.alive[: int(self.total["CPU"]) - self.held]  # the others when these are gone
        ready = [each for each in answers if self.answers[each][0] in placed]
        assert ready or timeout is not None, "this would wait for ever"
        return ready[-1:], []

    def get(self, answer):
        _, method, given = self.answers.pop(answer)
        try:
            return method(*given)
        except Exception as error:
            failed = RuntimeError(f"a task\nfailed: {error}")
            failed.cause = error
            raise failed from error

    def kill(self, actor) -> None:
        self.alive.remove(actor)


class Doubles:
    """Work that fails on 7; opens: how many can load it."""

    def __init__(self, opens: int = 1000) -> None:
        self.opens = opens

    def open(self):
        self.opens -= 1
        if self.opens < 0:
            raise ModelError("no memory; close something")
        return lambda job: [2 * job // (job != 7)]


def test_a_cluster_without_room_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, gpus, wanted, words in (
        (8, 0, 1.0, "has 8 CPU and 0 GPU, an actor needs 1 CPU and 1 GPU; start nodes that have it"),
        (0, 4, 1.0, "has 0 CPU and 4 GPU, an actor needs 1 CPU and 1 GPU"),
        (0, 0, 0.0, "has 0 CPU and 0 GPU, an actor needs 1 CPU; start"),
    ):
        cluster = Cluster(monkeypatch, cpus, gpus)
        with pytest.raises(BackendUnavailable, match=words):
            next(on_ray(Doubles(), range(3), 2, "auto", gpus=wanted))
        assert cluster.most == 0


def test_a_cluster_that_others_fill_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 2, 0, held=2)
    with pytest.raises(
        BackendUnavailable, match=r"no actor a place within 120 s: .* 0 CPU and 0 GPU are free of 2 CPU"
    ):
        next(on_ray(Doubles(), range(3), 2, "auto"))
    assert cluster.alive == []


@pytest.mark.parametrize(
    ("cpus", "gpus", "wanted", "asked", "most"), [(3, 2, 1.0, 9, 2), (3, 0, 0.0, None, 3), (9, 9, 0.5, 4, 4)]
)
def test_no_more_actors_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, cpus, gpus, wanted, asked, most
) -> None:
    cluster = Cluster(monkeypatch, cpus, gpus)
    assert sorted(on_ray(Doubles(), range(7), asked, "auto", gpus=wanted)) == [(n, 2 * n) for n in range(7)]
    assert (cluster.most, cluster.alive) == (most, [])


@pytest.mark.parametrize(("cpus", "held"), [(2, 0), (3, 2)])
def test_actors_without_a_place_or_a_successor_cost_nothing(monkeypatch: pytest.MonkeyPatch, cpus, held) -> None:
    """Two actors, one of which is not replaced; and three of which only one is ever placed, and replaced."""
    cluster = Cluster(monkeypatch, cpus, 0, held)
    found = list(on_ray(Doubles(opens=2), range(10), None, "auto"))
    (dead,) = [answer for _, answer in found if isinstance(answer, Died)]
    assert dead.job == 7 and "actor failed (a task failed: " in dead.error
    assert sorted(pair for pair in found if pair[0] != 7) == [(n, 2 * n) for n in range(10) if n != 7]
    assert cluster.alive == []
    with pytest.raises(ModelError, match="no memory; close something"):
        list(on_ray(Doubles(opens=1), range(5, 10), 1, "auto"))
    assert cluster.alive == []


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
