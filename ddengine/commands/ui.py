"""The browser editor: the command `ui`."""

from __future__ import annotations

import os
import sys

import click

from ddengine.commands.engine_choice import EngineChoice, choosing_engine
from ddengine.commands.options import build_option, size_option, weights_options
from ddengine.terminal import Answer, answering, engine_options


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port on this machine; 0: any. [default: the first free from 7860]"
)
@click.option("--open/--no-open", "opening", default=True, show_default=True, help="Open the page in a browser.")
@weights_options
@size_option
@engine_options
@build_option
@answering
@choosing_engine
def ui(port: int | None, opening: bool, choice: EngineChoice) -> Answer:
    """Edit pictures in a browser, on this machine: click what should move, then where it should go.

    The page is at an address of this machine that no other can reach; nothing is sent anywhere. Ctrl-C stops it.
    """
    from ddengine.ui.server import check_installed, open_socket, running

    check_installed()
    bound = open_socket(port)

    from ddengine.ui.editor import Described, Editor

    try:
        editor = Editor(choice.load(), Described(**choice.named()))
        address = "http://{}:{}".format(*bound.getsockname())
        with running(editor, bound) as server:
            click.echo(f"the editor is at {address} (Ctrl-C stops it)", err=True)
            if opening and _has_display():
                click.launch(address)
            server.run(sockets=[bound])  # until Ctrl-C or SIGTERM
    finally:
        bound.close()
    return {"address": address}, "the editor was stopped"


def _has_display() -> bool:
    """Whether there is a screen to open a browser on: without one, some systems open one in the terminal."""
    named = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return named or sys.platform in ("darwin", "win32")
