"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path)
MINUTES = POSITIVE = click.FloatRange(min=0, min_open=True)

build_option = click.option(
    "--build", is_flag=True, help="First build what the backend lacks for this picture's size; takes minutes."
)
prompt_option = click.option("--prompt", default="", help="What the picture shows; never needed.")
size_option = click.option(
    "--size", "working_size", type=int, help="Long side of the working picture. [default: the model's]"
)


def weights_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that load a model: which one, and what is put into it."""
    options = (
        click.option(
            "--model", default="embedded", show_default=True, help="embedded, a diffusers folder, or a hub id."
        ),
        click.option("--readout", type=FILE, help="Readout head (.safetensors) for the model."),
        click.option("--lora", type=FILE, help="LoRA file or folder, fused into the weights."),
        click.option("--vae", type=FILE, help="Folder of another VAE."),
    )
    for option in reversed(options):
        function = option(function)
    return function
