"""The editor as a server: this machine alone, this page alone, nothing fetched from elsewhere, nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ddengine.cli import main
from ddengine.errors import InputError
from ddengine.ui import server
from ddengine.ui.server import HOST, allowed, open_socket, theme


@pytest.mark.parametrize(
    ("host", "origin", "let_in"),
    [
        ("127.0.0.1:7860", None, True),
        ("localhost:7860", "http://localhost:7860", True),
        ("127.0.0.1", "http://127.0.0.1:80", True),
        ("localhost:80", "http://localhost", True),
        ("LOCALHOST:7860", "http://localhost:7860", True),
        ("127.0.0.1:7860", "http://127.0.0.1:8000", False),  # another server of this machine
        ("127.0.0.1:7860", "http://127.0.0.1", False),
        ("127.0.0.1", "http://127.0.0.1:7860", False),
        ("127.0.0.1:7860", "http://localhost:7860", False),
        ("127.0.0.1:7860", "https://127.0.0.1:7860", False),
        ("127.0.0.1:443", "https://127.0.0.1", False),
        ("127.0.0.1:7860", "http://user@127.0.0.1:7860", False),
        ("127.0.0.1:99999", None, False),
        ("127.0.0.1:7860/page", None, False),
        ("127.0.0.1:7860", "", False),
        ("evil.example:7860", None, False),
        ("127.0.0.1.evil.example", None, False),
        ("127.0.0.1:7860", "https://evil.example", False),
        ("127.0.0.1:7860", "null", False),
        ("127.0.0.1@evil.example", None, False),
        ("[::1", None, False),
        ("", None, False),
    ],
)
def test_only_this_machines_own_page_is_let_in(host, origin, let_in):
    headers = {b"host": host.encode()}
    if origin is not None:
        headers[b"origin"] = origin.encode()
    assert allowed(headers) is let_in


@pytest.mark.parametrize(
    ("path", "does"),
    [
        ("/gradio_api/file=https://example.com/a.png", True),
        ("/gradio_api/file=HTTP://example.com/a.png", True),
        ("/gradio_api/proxy=x.hf.space/a.png", True),
        ("/gradio_api/file=/tmp/ddengine-ui-x/edits/0/cat-edit1.png", False),
        ("/gradio_api/upload", False),
        ("/", False),
    ],
)
def test_a_path_that_fetches_from_elsewhere_is_known(path, does):
    assert server.fetches(path) is does


def test_a_port_is_on_the_loopback_address_and_a_taken_one_is_named():
    bound = open_socket(0)
    try:
        assert bound.getsockname()[0] == HOST == "127.0.0.1"
        with pytest.raises(InputError, match=f"port {bound.getsockname()[1]} is taken; choose another with --port"):
            open_socket(bound.getsockname()[1])
    finally:
        bound.close()


def test_without_a_port_the_next_free_one_is_taken(monkeypatch):
    assert server.FIRST_PORT == 7860
    held = [open_socket(0)]
    try:
        first = held[0].getsockname()[1]
        monkeypatch.setattr(server, "FIRST_PORT", min(first, 65535 - server.TRIED_PORTS))
        tried = range(server.FIRST_PORT, server.FIRST_PORT + server.TRIED_PORTS)
        held += [open_socket(None), open_socket(None)]
        ports = [one.getsockname()[1] for one in held]
        assert len(set(ports)) == 3 and set(ports[1:]) <= set(tried)
        monkeypatch.setattr(server, "FIRST_PORT", first)
        monkeypatch.setattr(server, "TRIED_PORTS", 1)
        with pytest.raises(InputError, match=f"ports {first} to {first} are all taken; choose another with --port"):
            open_socket(None)
    finally:
        for one in held:
            one.close()


def test_what_the_command_needs_is_said_before_weights_are_read(monkeypatch):
    monkeypatch.setattr("ddengine.engine.Engine.load", lambda **options: pytest.fail("loaded"))
    bound = open_socket(0)
    try:
        done = CliRunner().invoke(main, ["ui", "--port", str(bound.getsockname()[1])])
    finally:
        bound.close()
    assert done.exit_code == 2 and "is taken; choose another with --port" in done.stderr
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    done = CliRunner().invoke(main, ["ui"])
    assert done.exit_code == 2 and 'pip install "ddengine[ui]"' in done.stderr
    assert "share" not in CliRunner().invoke(main, ["ui", "--help"]).output


def test_what_is_too_old_is_let_go_again_and_again(tmp_path):
    """The thread beside the server: pages and sources that nobody uses, uploads that were read."""
    old, purged, waited = tmp_path / "gradio" / "a" / "old.png", [], []
    old.parent.mkdir(parents=True)

    def wait(seconds):
        waited.append(seconds)
        old.write_bytes(b"x")
        os.utime(old, (time.time() - server.UPLOAD_SECONDS - 1,) * 2)
        return len(waited) > 2

    editor = SimpleNamespace(shelf=SimpleNamespace(purge=lambda: purged.append(old.exists())))
    server._purge(editor, tmp_path / "gradio", SimpleNamespace(wait=wait))
    assert purged == [True, True] and waited == [server.PURGE_SECONDS] * 3
    assert server.UPLOAD_SECONDS + server.PURGE_SECONDS < 180  # as docs/editor.md says


def test_the_theme_fetches_no_fonts():
    pytest.importorskip("gradio")
    made = theme()
    assert all(isinstance(font, str) for font in (*made._font, *made._font_mono))  # others bring a style sheet
    assert not made._stylesheets


def get(served, path="/", **headers):
    with urllib.request.urlopen(urllib.request.Request(served.address + path, headers=headers), timeout=30) as answer:
        return answer, answer.read().decode()


def test_the_page_may_load_nothing_from_elsewhere(served):
    answer, text = get(served)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    start = "window.gradio_config = "
    facts, _ = json.JSONDecoder().raw_decode(text, text.index(start) + len(start))
    assert not facts["analytics_enabled"] and not facts.get("space_id")
    assert all(one["api_visibility"] == "private" for one in facts["dependencies"])
    tags = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(https?:[^\"]*)\"", text)
    assert [tag for tag in tags if not tag.startswith(served.address)] == []


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "http://127.0.0.1:1"}],
)
def test_other_sites_are_refused(served, headers):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(served, **headers)
    with refused.value as answer:
        assert answer.code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=setup.py",
        "/gradio_api/file=../setup.py",
        "/gradio_api/file=http://192.0.2.1/a.png",
        "/gradio_api/file=HTTPS%3A//192.0.2.1/a.png",
        "/gradio_api/proxy=https://192.0.2.1/a.png",
        "/docs",
    ],
)
def test_no_file_of_the_machine_or_of_another_is_served(served, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(served, path)
    with refused.value as answer:
        assert answer.code in (403, 404)


def test_the_command_starts_says_where_and_ends_cleanly(tmp_path):
    pytest.importorskip("gradio")
    words = [sys.executable, "-m", "ddengine", "ui", "--port", "0", "--no-open", "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "GRADIO_SHARE": "True"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as editor:
        try:
            found = next(filter(None, (re.search(r"http://127\.0\.0\.1:(\d+)", line) for line in editor.stderr)), None)
            assert found, "it ended without an address"
            with urllib.request.urlopen(found[0], timeout=60) as answer:
                assert b"gradio_config" in answer.read()
            with pytest.raises(OSError, match=r"refused|timed out|assign|reach"):  # no other address of this machine
                socket.create_connection(("127.0.0.2", int(found[1])), timeout=2).close()
            assert list(tmp_path.iterdir())
            editor.send_signal(signal.SIGTERM)
            out, err = editor.communicate(timeout=60)
        finally:
            editor.kill()
    assert (editor.returncode, out) == (0, "the editor was stopped\n"), err
    assert "Traceback" not in err and not list(tmp_path.iterdir())
