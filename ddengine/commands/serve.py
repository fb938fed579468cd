"""The command `serve`: the edit service over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ddengine.commands.options import FILE, size_option, weights_options
from ddengine.errors import BackendUnavailable
from ddengine.serve.limits import Limits
from ddengine.terminal import Answer, answering, engine_options


def limit_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every limit, named as its field; Limits knows what is allowed."""
    for item in reversed(fields(Limits)):
        name = f"--{item.name.replace('_', '-')}"
        kind = int if isinstance(item.default, int) else float
        shown = {"type": kind, "default": item.default, "show_default": True}
        text = item.metadata["doc"]
        function = click.option(name, help=f"{text[:1].upper()}{text[1:]}.", **shown)(function)
    return function


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--key-file", type=FILE, help="API keys, one a line. [default: DDENGINE_API_KEY, if set]")
@click.option(
    "--name", "names", multiple=True, help="Further name that Host headers may have where no key is set. Repeatable."
)
@weights_options
@size_option
@engine_options
@click.option("--ray/--no-ray", default=True, show_default=True, help="Workers as Ray Serve replicas, or one in here.")
@limit_options
@answering
def serve(
    host: str,
    port: int,
    key_file: Path | None,
    names: tuple[str, ...],
    model: str,
    readout: Path | None,
    lora: Path | None,
    vae: Path | None,
    working_size: int | None,
    backend: str,
    device: str,
    dtype: str,
    ray: bool,
    **limits: Any,
) -> Answer:
    """Serve edits over HTTP until SIGTERM or Ctrl-C, then finish what runs.

    Listens on this machine alone; any other address needs an API key.
    """
    try:
        from ddengine.serve.logs import log_json
        from ddengine.serve.options import EngineOptions, ServeOptions, read_keys

        if ray:
            from ddengine.serve.ray_app import run
        else:
            from ddengine.serve.process import run
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "ddengine"):
            raise
        raise BackendUnavailable(f"{missing} is not installed; pip install 'ddengine[serve]'") from error
    paths = {name: None if value is None else str(value) for name, value in
             {"readout": readout, "lora": lora, "vae": vae}.items()}  # fmt: skip
    options = ServeOptions(
        EngineOptions(model, backend, device, dtype, size=working_size, **paths),
        Limits(**limits),
        host,
        port,
        read_keys(key_file, os.environ.get("DDENGINE_API_KEY")),
        names,
    )
    log_json()
    run(options, lambda url: click.echo(f"listening on {url}", err=True))
    return {"stopped": True}, "stopped"
