"""The editor on a port of this machine and nowhere else: no sharing, no telemetry, no request to any other host."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddengine.errors import BackendUnavailable, InputError
from ddengine.ui.editor import Editor
from ddengine.ui.files import Files, sweep

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
FIRST_PORT, TRIED_PORTS = 7860, 20
MAX_UPLOAD = "64mb"
PURGE_SECONDS = 30.0  # between two looks for what is too old
UPLOAD_SECONDS = 120.0  # that an upload stays on disk: it is read at once, and never again
# The page may load nothing but from here; scripts are Gradio's own, which makes some of them from text.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'"
)
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def check_installed() -> None:
    """BackendUnavailable, naming the remedy, where Gradio is not installed."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise BackendUnavailable('the editor needs Gradio, which is not installed; run pip install "ddengine[ui]"')


def open_socket(port: int | None) -> socket.socket:
    """A socket bound to the port on the loopback address; None: the first free one from 7860, 0: any free one.

    Raises InputError where the port is taken.
    """
    tried = range(FIRST_PORT, FIRST_PORT + TRIED_PORTS) if port is None else (port,)
    for number in tried:
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if os.name == "posix":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((HOST, number))
            bound.listen(128)  # so that a second editor finds it taken now
        except OSError:
            bound.close()
        else:
            return bound
    which = f"port {port} is" if port is not None else f"ports {tried[0]} to {tried[-1]} are all"
    raise InputError(f"{which} taken; choose another with --port, or --port 0 for any free one")


class Guard:
    """Lets in only what a browser on this machine asks of this page itself, and forbids pages to look elsewhere.

    A foreign name in `Host` is how another site's script would reach a local port; a foreign `Origin` is its page.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if not allowed(dict(scope["headers"])) or fetches(scope["path"]):
            if scope["type"] == "http":
                body = b"This editor answers only its own page on this machine.\n"
                head = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
                await send({"type": "http.response.start", "status": 403, "headers": head})
                await send({"type": "http.response.body", "body": body})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self._app(scope, receive, guarded)


def allowed(headers: dict[bytes, bytes]) -> bool:
    """Whether a request's Host is this machine's and its Origin, if any, is the page at just that name and port."""
    host = _name_and_port("http://" + headers.get(b"host", b"").decode("latin-1"))
    origin = headers.get(b"origin")
    return host is not None and (origin is None or _name_and_port(origin.decode("latin-1")) == host)


def _name_and_port(address: str) -> tuple[str, int] | None:
    """Where an http address of this machine leads; None for any other address."""
    try:
        parts = urlsplit(address)
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if name not in NAMES or f"{parts.scheme}://{parts.netloc}" != address or parts.username is not None:
        return None
    return (name, 80 if port is None else port) if parts.scheme == "http" else None


def fetches(path: str) -> bool:
    """Whether Gradio would answer a path with what it gets from another host: `file=` and `proxy=` with an address."""
    return "://" in path or "/proxy=" in path


@contextmanager
def running(editor: Editor, bound: socket.socket) -> Iterator[Any]:
    """A uvicorn server for an editor on a bound socket, to be run; its files are gone at the end, its edits stopped."""
    os.environ.update(_QUIET)  # before Gradio is imported
    with tempfile.TemporaryDirectory(prefix="ddengine-ui-", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        uploads = Path(folder).resolve() / "gradio"
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        stopped = threading.Event()
        try:
            server = _server(editor, Path(folder).resolve())
            threading.Thread(target=_purge, args=(editor, uploads, stopped), daemon=True).start()
            yield server
        finally:
            stopped.set()
            editor.close()
            bound.close()
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _server(editor: Editor, folder: Path) -> Any:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from ddengine.ui.layout import style
    from ddengine.ui.page import Page

    keep = Files(folder / "edits", editor.shelf.holds)
    editor.shelf.on_drop(lambda session: keep.drop(session.key))
    gr.set_static_paths(keep.folder)  # Gradio hands out these files themselves, not copies that outlive them
    plain = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def mounted() -> App:  # in a loop, because else Gradio opens several and closes none
        page = Page(editor, keep)
        return gr.mount_gradio_app(
            plain, page.blocks, path="/", server_name=HOST, footer_links=[], run_history=False, show_error=False,
            max_file_size=MAX_UPLOAD, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
            theme=theme(), css=style(),
        )  # fmt: skip

    config = uvicorn.Config(
        Guard(asyncio.run(mounted())),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        server_header=False,
        ws="none",
    )

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Ctrl-C and SIGTERM end the serving, and nothing else: what follows still has to be cleaned up."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for name, handler in before.items():
                    signal.signal(name, handler)

    return Server(config)


def theme() -> Any:
    """Gradio's plain theme in the machine's own fonts, so that none is fetched."""
    import gradio as gr

    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    plain = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    # Grey that is still read easily: 4.8 times the contrast of white, where Gradio's own has 2.6; rings that are seen.
    return plain.set(
        body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500",
        checkbox_border_color="*neutral_400", checkbox_border_color_dark="*neutral_500",
    )  # fmt: skip


def _purge(editor: Editor, uploads: Path, stopped: threading.Event) -> None:
    while not stopped.wait(PURGE_SECONDS):
        editor.shelf.purge()
        sweep(uploads, UPLOAD_SECONDS)
