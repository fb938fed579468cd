"""Workers on a Ray cluster: one actor for each CPU or GPU asked for, each loading its own, one job at a time."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ddengine.bench.evaluation.pool import Died, Jobs, Specification
from ddengine.errors import BackendUnavailable, DDEngineError

log = logging.getLogger(__name__)

HERE = "local"  # a cluster of this machine alone, for the time of the run
PATIENCE = 120.0  # seconds without a single actor that has a place: what others hold may come free, or never
PLACING, LOADING, WORKING = "answer", "load", "work"  # what an actor is at: its methods


def on_ray(
    what: Specification, jobs: Iterable[Any], count: int | None, address: str, *, gpus: float = 0.0
) -> Iterator[tuple[Any, Any]]:
    """(job, answer) as `pool.in_processes`, from `count` actors, at most as many as the cluster has room for (None).

    address: "local", "auto", or where a cluster listens. gpus: what each actor claims. ddengine and the folders of
    weights must be at the same place on every node; pictures travel with their jobs. A job is answered as a whole, so
    what a dying actor had done of it is lost. Raises BackendUnavailable where the cluster is not there, has no room for
    a single actor, or gives none a place within PATIENCE seconds; otherwise what an actor cannot load, when none is
    left that could.
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
    crew = _Crew(ray, ray.remote(num_cpus=1, num_gpus=gpus)(_Actor), what)
    try:
        room = int(total.get("CPU", 0))
        room = min(room, int(total.get("GPU", 0) / gpus)) if gpus else room
        asked = f"1 CPU and {gpus:g} GPU" if gpus else "1 CPU"
        if room < 1:
            raise BackendUnavailable(
                f"the Ray cluster at {address!r} has {_amounts(total)}, an actor needs {asked}; start nodes that have "
                f"it, or leave --ray out"
            )
        waiting = Jobs(jobs)
        crew.hire(min(count or room, room))
        while crew.busy or waiting:
            if not crew.members:
                raise crew.why or BackendUnavailable(f"no actor is left on the Ray cluster at {address!r}")
            done = crew.next(None if crew.placed else PATIENCE)
            if done is None:
                free = _amounts(ray.available_resources())
                raise BackendUnavailable(
                    f"the Ray cluster at {address!r} gave no actor a place within {PATIENCE:g} s: one needs {asked}, "
                    f"{free} are free of {_amounts(total)}; wait for what runs there, or leave --ray out"
                )
            member, content, failure = done
            if failure is not None:
                crew.dismiss(member, failure)
                if member.at == WORKING:
                    yield member.job, Died(member.job, f"its actor failed ({_line(failure)[:300]})")
                    if waiting:
                        crew.hire(1)
                continue
            for answer in content if member.at == WORKING else ():
                yield member.job, answer
            if member.at == PLACING:
                crew.ask(member, LOADING)
            elif waiting:
                crew.ask(member, WORKING, waiting.take())
            else:
                crew.dismiss(member)
    finally:
        for member in list(crew.members.values()):
            crew.dismiss(member)
        if ours:
            ray.shutdown()


@dataclass
class _Member:
    """An actor, what it is at, and, where it works, the job."""

    actor: Any
    at: str
    job: Any = None


class _Crew:
    """Actors by what they will answer next. why: what the last one that could not load said."""

    def __init__(self, ray: Any, kind: Any, what: Specification) -> None:
        self.ray, self.kind, self.what = ray, kind, what
        self.members: dict[Any, _Member] = {}
        self.why: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is out."""
        return any(member.at == WORKING for member in self.members.values())

    @property
    def placed(self) -> bool:
        """Whether any has a place, so that waiting has an end."""
        return any(member.at != PLACING for member in self.members.values())

    def hire(self, count: int) -> None:
        for _ in range(count):
            self.ask(_Member(self.kind.remote(self.what), PLACING), PLACING)

    def ask(self, member: _Member, at: str, job: Any = None) -> None:
        """Give a member its next task: to answer at all, to load, or a job."""
        member.at, member.job = at, job
        method = getattr(member.actor, at)
        self.members[method.remote(job) if at == WORKING else method.remote()] = member

    def next(self, seconds: float | None) -> tuple[_Member, Any, Exception | None] | None:
        """Who is first to answer, what, or with which error; None if nobody does within so many seconds."""
        from ray.exceptions import RayError

        ready, _ = self.ray.wait(list(self.members), num_returns=1, timeout=seconds)
        if not ready:
            return None
        member = self.members.pop(ready[0])
        try:
            return member, self.ray.get(ready[0]), None
        except RayError as error:
            return member, None, error

    def dismiss(self, member: _Member, error: Exception | None = None) -> None:
        """End an actor; with an error, one that could not load, or died."""
        self.members = {answer: each for answer, each in self.members.items() if each is not member}
        self.ray.kill(member.actor)
        if error is not None and member.at != WORKING:
            cause = getattr(error, "cause", None)
            known = isinstance(cause, DDEngineError)
            self.why = cause if known else DDEngineError(f"an actor could not start ({_line(error)[:500]})")
            log.warning("%s; those that are left go on: %d", self.why, len(self.members))


class _Actor:
    def __init__(self, what: Specification) -> None:
        self._what = what

    def answer(self) -> None:
        """Nothing, from where it was placed."""

    def load(self) -> None:
        self._do = self._what.open()

    def work(self, job: Any) -> list[Any]:
        return list(self._do(job))


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


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
