"""Workers on a Ray cluster: one actor for each CPU or GPU asked for, each loading its own, one job at a time."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ddengine.bench.evaluation.pool import Died, Specification
from ddengine.errors import BackendUnavailable

HERE = "local"  # a cluster of this machine alone, for the time of the run


def on_ray(
    what: Specification, jobs: Iterable[Any], count: int | None, address: str, *, gpus: float = 0.0
) -> Iterator[tuple[Any, Any]]:
    """(job, answer) as `pool.in_processes`, from `count` actors (None: as many as the cluster has room for).

    address: "local", "auto", or where a cluster listens. gpus: what each actor claims. ddengine and the folders of
    weights must be at the same place on every node; pictures travel with their jobs. A job is answered as a whole, so
    what a dying actor had done of it is lost. Raises BackendUnavailable.
    """
    _check_listens(address)
    ray = _ray()
    from ray.exceptions import RayError

    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        total = ray.cluster_resources()
    except (RayError, OSError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(f"no Ray cluster at {address!r} ({error}); start one, or use --ray {HERE}") from error
    room = int(total.get("GPU", 0) / gpus) if gpus else int(total.get("CPU", 1))
    kind = ray.remote(num_cpus=1, num_gpus=gpus)(_Actor)
    waiting = iter(jobs)
    running: dict[Any, tuple[Any, Any]] = {}
    idle: list[tuple[Any, Any]] = []
    try:
        idle = [(kind.remote(what), job) for job in islice(waiting, max(1, count or room))]
        while idle or running:
            for actor, job in idle:
                running[actor.work.remote(job)] = (actor, job)
            idle = []
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            actor, job = running.pop(done)
            try:
                for answer in ray.get(done):
                    yield job, answer
            except RayError as error:
                ray.kill(actor)
                yield job, Died(job, f"its actor failed ({' '.join(str(error).split())[:300]})")
                actor = kind.remote(what)
            if (job := next(waiting, None)) is not None:
                idle.append((actor, job))
            else:
                ray.kill(actor)
    finally:
        for actor, _ in [*running.values(), *idle]:
            ray.kill(actor)
        if ours:
            ray.shutdown()


class _Actor:
    def __init__(self, what: Specification) -> None:
        self._do = what.open()

    def work(self, job: Any) -> list[Any]:
        return list(self._do(job))


def _check_listens(address: str) -> None:
    """BackendUnavailable if nobody listens at HOST:PORT: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise BackendUnavailable(f"no Ray cluster at {address!r} ({error}); start one, or use --ray {HERE}") from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable('--ray needs Ray, which is not installed; run: pip install "ray>=2.50,<3"') from error
    return ray
