"""The whole service in one process: uvicorn, the application, one worker."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from ddengine.errors import InputError, ModelError
from ddengine.serve.app import create_app
from ddengine.serve.local import LocalWorkers
from ddengine.serve.options import ServeOptions
from ddengine.serve.service import Service


class _Server(uvicorn.Server):
    """Takes no more jobs from the moment a signal comes or the worker is lost; uvicorn then waits for what is open."""

    def __init__(self, config: uvicorn.Config, service: Service, lost: threading.Event) -> None:
        super().__init__(config)
        self._service, self._lost = service, lost

    async def on_tick(self, counter: int) -> bool:
        if self._lost.is_set():
            self._service.jobs.draining = self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.jobs.draining = True
        super().handle_exit(sig, frame)


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
        app = create_app(workers, limits, options.keys, hosts=options.hosts, name=options.model_name)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=int(limits.drain_s) + 1,
        )
        sock.listen(min(limits.connections, 128))  # who comes before the loop runs waits for it
        if listening is not None:
            host, port = sock.getsockname()[:2]
            listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        with _raised_again():
            _Server(config, app.state.service, lost).run([sock])
        if lost.is_set():
            raise ModelError(f"the worker was lost: {workers.worker.readiness().reason}; start the service again")
    finally:
        sock.close()


@contextmanager
def _raised_again() -> Iterator[None]:
    """Where uvicorn raises the signal that it stopped for once more, nothing happens: the service has ended well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
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
