"""A running editor, for the tests that ask it over HTTP and in a browser."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="package")
def served():
    """An editor of the embedded model on a free port: `.address`, `.editor`; skipped where Gradio is missing."""
    pytest.importorskip("gradio")
    from ddengine.engine import Engine
    from ddengine.ui.editor import Described, Editor
    from ddengine.ui.server import open_socket, running

    editor, bound = Editor(Engine.load(device="cpu"), Described(device="cpu")), open_socket(0)
    with running(editor, bound) as server:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield SimpleNamespace(address="http://{}:{}".format(*bound.getsockname()), editor=editor)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
