"""Stands in for an engine (steps that can be held up) and for a client (requests message by message)."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from io import BytesIO
from types import SimpleNamespace

import httpx
import numpy as np
from PIL import Image

from ddengine.config import DirectDragConfig
from ddengine.drags import Drag, fit
from ddengine.progress import Progress
from ddengine.result import EditResult
from ddengine.serve.app import create_app
from ddengine.serve.limits import Limits
from ddengine.serve.local import LocalWorkers

STAGES = ("encode", "invert", "reference", "warp", "drag", "denoise", "decode")
DRAG = {"handle": [20, 30], "target": [40, 30]}
EDIT = {"drags": [DRAG]}


def picture_bytes(form: str = "PNG", size: tuple[int, int] = (80, 64), seed: int = 0, **options) -> bytes:
    """A picture file: a ramp with a little noise."""
    ramp = np.linspace(0, 200, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    noise = np.random.default_rng(seed).integers(0, 50, ramp.shape)
    file = BytesIO()
    Image.fromarray((ramp + noise).astype(np.uint8)).save(file, form, **options)
    return file.getvalue()


PICTURE = picture_bytes()


class FakeEngine:
    """What a worker asks of an Engine; every edit takes `steps` steps a stage and waits where `hold` says so."""

    def __init__(self, steps: int = 2, nbytes: int = 1000) -> None:
        self.steps, self.nbytes = steps, nbytes
        self.model = SimpleNamespace(
            name="fake", digest="0" * 64, device=SimpleNamespace(type="cpu"), dtype="torch.float32", size=128
        )
        self.backend, self.any_batch = SimpleNamespace(name="eager"), True
        self.hold: str | None = None  # the stage at whose first step an edit stays until `go`
        self.held, self.go = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.edits: list[int] = []  # sizes of the batches run
        self.seen: list[tuple] = []
        self.stopped = 0

    def load(self) -> FakeEngine:
        return self

    def passes(self, prompt):
        return SimpleNamespace(any_batch=self.any_batch)

    def _walk(self, stages, progress, pictures=True) -> None:
        for stage in stages:
            for step in range(1, self.steps + 1):
                preview = (lambda: Image.new("RGB", (64, 64), "red")) if pictures and stage == "denoise" else None
                points = np.array([[20.0 + step, 30.0]]) if pictures and stage == "drag" else None
                at = Progress(stage, step, self.steps, points, preview)
                try:
                    progress(at)
                    while stage == self.hold and not self.go.wait(0.005):
                        self.held.set()
                        progress(at)
                except BaseException:
                    self.stopped += 1
                    raise

    def edit(self, image, drags, *, prompt="", config=None, seed=0, progress=None):
        self.edits.append(1)
        prepared = not isinstance(image, Image.Image)
        self._walk(STAGES[3:] if prepared else STAGES, progress or (lambda at: None))
        return self._result(image, drags, config, seed)

    def edit_batch(self, edits, *, prompt="", config=None, seed=0, progress=None):
        self.edits.append(len(edits))
        self._walk(STAGES, progress, pictures=False)
        return [self._result(image, drags, config, seed) for image, drags in edits]

    def prepare(self, image, *, prompt="", config=None, budget=None, progress=None):
        self._walk(STAGES[:3], progress)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(
            image=image,
            prompt=prompt,
            spaces=fit(*image.size, 128),
            prepared=SimpleNamespace(config=config),
            nbytes=SimpleNamespace(total=self.nbytes),
            timings={"encode": 0.1},
            passes={"invert": {"forward": 2, "backward": 0}},
        )

    def _result(self, image, drags, config: DirectDragConfig, seed: int) -> EditResult:
        if self.error is not None:
            raise self.error
        drags = tuple(drag if isinstance(drag, Drag) else Drag(*drag) for drag in drags)
        self.seen.append((image, drags, config, seed))
        picture = image if isinstance(image, Image.Image) else image.image
        pixels = np.asarray(picture).copy()
        for number, drag in enumerate(drags):
            x, y = map(int, drag.target)
            pixels[y, x] = (255, number, seed % 256)
        return EditResult(
            Image.fromarray(pixels), tuple(drag.target for drag in drags), np.zeros(pixels.shape[:2], np.float32),
            {"drag": 0.5, "total": 0.7}, {"drag": {"forward": 3, "backward": 3}}, (), {"drag": "fake"},
        )  # fmt: skip


@asynccontextmanager
async def serving(engine=None, intake=None, key=None, *, hosts=("localhost",), self_test=False, **limits):
    """An application over a worker with a fake (or given) engine, and a client; both end with the block."""
    bounds = Limits(**{"progress_s": 0.0, "drain_s": 0.5, **limits})
    engine = engine or FakeEngine()
    workers = LocalWorkers.start(engine.load if isinstance(engine, FakeEngine) else (lambda: engine), bounds,
                                 self_test=self_test)  # fmt: skip
    app = create_app(workers, bounds, key, hosts=hosts)
    service = app.state.service
    if intake is not None:
        service.intake.close()
        service.intake = intake
    headers = {"Authorization": f"Bearer {key}"} if isinstance(key, str) else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers, timeout=60) as http:
        while (await workers.ready()).state in ("loading", "testing"):
            await asyncio.sleep(0.005)
        try:
            yield SimpleNamespace(http=http, app=app, service=service, workers=workers, engine=engine)
        finally:
            if isinstance(engine, FakeEngine):
                engine.go.set()
            await workers.close(0)
            if intake is None:
                service.intake.close()


def form(edit=None, picture=PICTURE, part="edit", **more):
    """Arguments of a multipart request."""
    text = edit if isinstance(edit, (str, bytes)) else json.dumps({**EDIT, **(edit or {})})
    files = {} if picture is None else {"picture": ("a.png", picture, "image/png")}
    return {"files": {**files, part: (None, text), **more}}


class Call:
    """One request to an ASGI application, as a server would pass it on; `disconnect` hangs up."""

    def __init__(self, app, method, path, *, headers=None, body=b"", more=False) -> None:
        self.status, self.headers, self.body = 0, {}, b""
        self.inbox: asyncio.Queue = asyncio.Queue()
        self.sent: asyncio.Queue = asyncio.Queue()
        path, _, query = path.partition("?")
        lines = {"host": "localhost", **(headers or {})}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
            "headers": [(name.lower().encode(), value.encode()) for name, value in lines.items()],
            "server": ("localhost", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self.feed(body, more)
        self.task = asyncio.ensure_future(app(scope, self.inbox.get, self._send))

    def feed(self, body: bytes, more: bool = False) -> None:
        self.inbox.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def disconnect(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    async def _send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.sent.put_nowait(message.get("body", b""))

    async def done(self) -> Call:
        await self.task
        return self

    @property
    def json(self):
        return json.loads(self.body)


def multipart(**kwargs) -> tuple[dict[str, str], bytes]:
    """Headers and body of a multipart request, for `Call`."""
    request = httpx.Request("POST", "http://localhost/", **form(**kwargs))
    body = request.read()
    return {"content-type": request.headers["content-type"]}, body


async def until(condition, seconds: float = 60.0) -> None:
    """Wait for something to become true."""
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")
