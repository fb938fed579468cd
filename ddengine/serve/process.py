"""The whole service in one process: uvicorn, the application, one worker."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from ddengine.errors import InputError, ModelError
from ddengine.serve.app import create_app
from ddengine.serve.connections import bounded as bounded_connections
from ddengine.serve.local import LocalWorkers
from ddengine.serve.options import ServeOptions
from ddengine.serve.service import Service

ANSWERED_S = 3  # that clients get to take their answers in once no job is left


class _Server(uvicorn.Server):
    """Goes on listening, and refusing new jobs, while those there end; only then it stops as uvicorn's do.

    That is so from the first signal on, or once the worker is lost. A second signal ends it at once: jobs that still
    run are cancelled, and whoever waits for one is told so.
    """

    def __init__(self, config: uvicorn.Config, service: Service, lost: threading.Event) -> None:
        super().__init__(config)
        self._service, self._lost = service, lost
        self._told = False
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told:
            super().handle_exit(sig, frame)
        self._told = self._service.jobs.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._lost.is_set():
            self._service.jobs.draining = True
        if self._service.jobs.draining:
            self._drain = self._drain or asyncio.get_running_loop().create_task(self._service.drain())
            self.should_exit = self.should_exit or self._drain.done()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._drain is not None:
            self._drain.cancel()
        await self._service.jobs.drain(0)
        await super().shutdown(sockets)


def run(options: ServeOptions, listening: Callable[[str], object] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain; InputError for an address that cannot be had.

    A worker that cannot go on (its model cannot be used, its device failed) ends the process with a ModelError, so that
    whoever watches over it starts it again.

    listening: told the URL once the socket is open (port 0 takes a free one); `/v2/health/ready` says when edits are.
    """
    limits = options.limits
    sock = bound(options.host, options.port)
    try:
        lost = threading.Event()
        workers = LocalWorkers.start(options.engine.load, limits, lost=lost.set)
        app = create_app(workers, limits, options.keys, hosts=options.hosts)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            http=bounded_connections(limits),
            backlog=max(1, limits.connections // 2),  # taken at once: fewer than may wait, so that each is heard first
            timeout_graceful_shutdown=ANSWERED_S,
        )
        server = _Server(config, app.state.service, lost)
        sock.listen(config.backlog)  # who comes before the loop runs waits for it
        if listening is not None:
            host, port = sock.getsockname()[:2]
            listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        with _signals(server):
            server.run([sock])
        if lost.is_set():
            raise ModelError(f"the worker was lost: {workers.worker.readiness().reason}; start the service again")
    finally:
        sock.close()


@contextmanager
def _signals(server: _Server) -> Iterator[None]:
    """Signals are the server's before uvicorn takes them over, and when it raises them once more at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there once it is told to; InputError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror or error}; name another --port") from error
    return sock
