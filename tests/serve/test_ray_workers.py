"""Replicas as workers, without a Ray cluster: a handle that is made up, and the router's choice."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray")

from ray.exceptions import ActorDiedError  # noqa: E402
from ray.serve.exceptions import BackPressureError, RequestCancelledError  # noqa: E402

from ddengine.errors import InputError  # noqa: E402
from ddengine.serve import ray_workers  # noqa: E402
from ddengine.serve.contract import (  # noqa: E402
    Edited,
    EditJob,
    Failed,
    Picture,
    Prepared,
    PrepareJob,
    Queued,
    Readiness,
    Stats,
)  # fmt: skip
from ddengine.serve.ray_app import share  # noqa: E402
from ddengine.serve.ray_deploy import EngineReplica, LoopbackOnly, build  # noqa: E402
from ddengine.serve.ray_router import HomeRouter  # noqa: E402
from ddengine.serve.ray_workers import RayWorkers  # noqa: E402
from ddengine.serve.waiting import within  # noqa: E402

EDITED = Edited(Picture(1, 1, b"abc"), (), {}, {}, {})


REQUEST = ContextVar("request", default=None)  # what Serve knows a call's request by


class Call:
    """What a handle returns: events, an error, or a wait that only cancelling ends."""

    def __init__(self, *events) -> None:
        self.events, self.cancelled = list(events), False
        self.stop = asyncio.Event()

    def cancel(self) -> None:
        self.cancelled = True
        self.stop.set()

    async def __anext__(self):
        if not self.events:
            raise StopAsyncIteration
        event = self.events.pop(0)
        if event is None:
            await self.stop.wait()
            raise RequestCancelledError("1")
        if isinstance(event, Exception):
            raise event
        return "replica-1", event

    def __await__(self):
        return self._value().__await__()

    async def _value(self):
        return (await self.__anext__())[1]


class Handle:
    deployment_name = "Engines"

    def __init__(self, *calls: Call) -> None:
        self.calls, self.asked = list(calls), []

    def options(self, stream: bool) -> Handle:
        return self

    def __getattr__(self, method):
        def remote(*args, home=None):
            assert REQUEST.get() is None, "the call is made as a part of the request"
            self.asked.append((method, home))
            return self.calls.pop(0)

        return SimpleNamespace(remote=remote)


def edit(**more) -> EditJob:
    return EditJob("edt_1", (((1, 2), (3, 4)),), **{"picture": Picture(1, 1, b"abc"), **more})


async def events(stream) -> list:
    return [event async for event in stream]


@pytest.fixture(autouse=True)
def replicas(monkeypatch):
    found = {"Engines": ("replica-1", "replica-2")}
    monkeypatch.setattr(ray_workers, "_present", found)
    return found


async def test_events_come_through_and_a_source_has_a_home(replicas):
    REQUEST.set("1")
    made = Prepared("src_1", 1, 1, 10, 900, {}, {})
    handle = Handle(Call(Queued(0), made), Call(Queued(0), EDITED), Call(True))
    workers = RayWorkers(handle)
    assert await events(workers.prepare(PrepareJob("job_1", "src_1", Picture(1, 1, b"abc")))) == [Queued(0), made]
    assert (await events(workers.edit(edit(source="src_1", picture=None))))[-1] == EDITED
    assert handle.asked == [("prepare", None), ("edit", "replica-1")]
    assert await workers.forget("src_1") and handle.asked[-1] == ("forget", "replica-1")
    (gone,) = await events(workers.edit(edit(source="src_1", picture=None)))
    assert gone.code == "gone" and not await workers.forget("src_1")

    handle.calls = [Call(made)]
    await events(workers.prepare(PrepareJob("job_1", "src_1", Picture(1, 1, b"abc"))))
    replicas["Engines"] = ("replica-2",)  # its home is lost
    (gone,) = await events(workers.edit(edit(source="src_1", picture=None)))
    assert gone.code == "gone"


@pytest.mark.parametrize(
    ("what", "code", "retry"),
    [
        (ActorDiedError(), "unavailable", True),
        (BackPressureError(3, 3), "busy", True),
        (RequestCancelledError("1"), "cancelled", False),
        (ray.exceptions.RayTaskError("f", "traceback", ValueError()), "internal", False),
    ],
)
async def test_what_goes_wrong_on_the_way_is_a_failure(what, code, retry):
    first, final = await events(RayWorkers(Handle(Call(Queued(0), what))).edit(edit()))
    assert first == Queued(0) and isinstance(final, Failed)
    assert final.code == code and (final.retry_s is not None) == retry


async def test_a_stream_that_ends_early_is_a_failure():
    (final,) = await events(RayWorkers(Handle(Call())).edit(edit()))
    assert final.code == "unavailable" and final.retry_s


async def test_whoever_stops_reading_cancels():
    for stop in ("close", "cancel", "all"):
        call = Call(Queued(0), None)
        workers = RayWorkers(Handle(call))
        stream = workers.edit(edit())
        assert await stream.__anext__() == Queued(0)
        if stop == "close":
            await stream.aclose()
        elif stop == "cancel":
            task = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            reading = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.01)
            await workers.close()
            assert (await reading).code == "cancelled"
        assert call.cancelled


async def test_a_deadline_holds_even_where_the_replica_says_nothing(monkeypatch):
    monkeypatch.setattr(ray_workers, "LATE_S", 0.0)
    call = Call(Queued(0), None)
    final = (await events(RayWorkers(Handle(call)).edit(edit(deadline_s=0.05))))[-1]
    assert final.code == "deadline" and call.cancelled


async def test_readiness_and_stats_are_those_of_all_replicas(replicas, monkeypatch):
    monkeypatch.setattr(ray_workers, "KNOWN_S", -1.0)
    monkeypatch.setattr(ray_workers, "ASK_S", 0.05)
    REQUEST.set("1")
    bad, good = Readiness(False, "poisoned", "CUDA error"), Readiness(True, "ready")
    handle = Handle(Call(bad), Call(good))
    assert (await RayWorkers(handle).ready()).ready
    assert handle.asked == [("ready", "replica-1"), ("ready", "replica-2")]
    assert (await RayWorkers(Handle(Call(bad), Call(ActorDiedError()))).ready()).state == "poisoned"
    silent = Call(None)
    assert await RayWorkers(Handle(Call(Stats(sources=2)), silent)).stats() == Stats(sources=2)
    replicas["Engines"] = ()
    assert (await RayWorkers(Handle(Call(None))).ready()).state == "loading"
    workers = RayWorkers(Handle())
    await workers.close(0)
    assert (await workers.ready()).state == "draining"
    assert [event.code for event in await events(workers.edit(edit()))] == ["unavailable"]


async def test_the_router_sends_a_call_home():
    candidates = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"replica-{number}")) for number in range(4)]

    async def chosen(**kwargs) -> list[str]:
        (rank,) = await HomeRouter.choose_replicas(None, candidates, SimpleNamespace(kwargs=kwargs))
        return [one.replica_id.unique_id for one in rank]

    assert await chosen(home="replica-2") == ["replica-2"]
    assert len(set(await chosen(home=None))) == 2
    assert len(await chosen(home="lost")) == 2  # whoever gets it says that the source is gone
    seen = {name for _ in range(50) for name in await chosen()}
    assert len(seen) == 4
    assert await HomeRouter.choose_replicas(None, []) == [[]]


async def test_without_a_key_only_loopback_addresses_are_answered():
    served = []

    async def app(scope, receive, send) -> None:
        served.append(scope)

    async def status(server) -> int:
        sent = []

        async def send(message) -> None:
            sent.append(message)

        await LoopbackOnly(app)({"type": "http", "path": "/v1/edits", "server": server}, None, send)
        return sent[0]["status"] if sent else 200

    assert [await status(one) for one in (("127.0.0.1", 80), ("::1", 80))] == [200, 200]
    assert [await status(one) for one in (("192.0.2.7", 80), None, ("", 0))] == [401, 401, 401]
    await LoopbackOnly(app)({"type": "lifespan"}, None, None)
    assert len(served) == 3


@pytest.mark.parametrize(("gpus", "workers", "part"), [(0, 2, 0), (2, 2, 1), (1, 3, 0.3333), (2, 3, 0.5), (8, 2, 1)])
def test_workers_share_the_gpus(gpus, workers, part):
    assert share(gpus, workers) == part
    assert sum(int(1 / part + 1e-9) for _ in range(gpus)) >= workers if part else gpus == 0


async def test_serve_replaces_a_replica_whose_device_failed():
    replica = object.__new__(EngineReplica)
    states = iter(
        [Readiness(True, "ready"), Readiness(False, "draining"), Readiness(False, "poisoned", "CUDA error: 719")]
    )

    async def ready() -> Readiness:
        return next(states)

    replica._workers = SimpleNamespace(ready=ready)
    await replica.check_health()
    await replica.check_health()
    with pytest.raises(RuntimeError, match="719"):
        await replica.check_health()


def test_a_configuration_file_s_arguments_are_checked():
    app = build({"engine": {"device": "cuda"}, "limits": {"queue": 3}, "replicas": [1, 4], "gpus": 0.5})
    assert app._bound_deployment.name == "Front"
    for args in ({"host2": "x"}, {"engine": {"modle": "x"}}, {"limits": {"queue": -1}}, {"limits": {"drain": 1}}):
        with pytest.raises(InputError):
            build(args)


def test_a_cancellation_that_comes_with_an_event_is_not_lost():
    """Else an edit whose client hangs up at that moment runs on to its end."""

    async def both_at_once() -> asyncio.Task:
        event = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(within(event, 5.0))
        await asyncio.sleep(0)
        event.set_result("an event")
        task.cancel()
        await asyncio.wait({task})
        return task

    assert asyncio.run(both_at_once()).cancelled()


def test_what_takes_too_long_is_a_time_out_and_is_cancelled():
    async def late() -> asyncio.Future:
        event = asyncio.get_running_loop().create_future()
        with pytest.raises(asyncio.TimeoutError):
            await within(event, 0.01)
        return event

    assert asyncio.run(late()).cancelled()
