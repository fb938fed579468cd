"""`ddengine bench peers`: other drag editors beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddengine.commands.options import FILE, POSITIVE
from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.terminal import Answer, DragType, answering, device_option


class PathOf(click.ParamType):
    """NAME=PATH -> (name, path)."""

    name = "NAME=PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if not (equals and name.strip() and path.strip()):
            self.fail(f"{value!r} is not NAME=PATH, for example gooddrag=../GoodDrag", param, ctx)
        return name.strip().lower(), Path(path.strip()).expanduser()


class ConfigType(click.ParamType):
    """PRESET[,FIELD=VALUE...] -> (preset, changes)."""

    name = "PRESET[,FIELD=VALUE...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, str]]:
        if isinstance(value, tuple):
            return value
        preset, *settings = value.split(",")
        pairs = [setting.partition("=") for setting in settings]
        if any(not (field and equals) for field, equals, _ in pairs):
            self.fail(f"{value!r} is not PRESET,FIELD=VALUE, for example authors,amp_skip=none", param, ctx)
        return preset, {field: text for field, _, text in pairs}


@click.command("peers")
@click.argument("image", required=False, type=FILE)
@click.option("--drag", "drags", type=DragType(), multiple=True, help="In pixels of IMAGE. Repeatable.")
@click.option("--mask", type=FILE, help="White where IMAGE may change. [default: derived from the drags]")
@click.option(
    "--repo", "repos", type=PathOf(), multiple=True, required=True,
    help="A checkout you have: directdrag, gooddrag, dragdiffusion, fastdrag. Repeatable.",
)  # fmt: skip
@click.option("--python", "pythons", type=PathOf(), multiple=True, help="The peer's own Python. [default: this one]")
@click.option("--adapter", "adapters", type=PathOf(), multiple=True, help="Your adapter file for another peer.")
@click.option("--model", required=True, help="A diffusers folder, or sd15: that architecture, random weights.")
@click.option("--readout", type=FILE, help="Readout head (.safetensors) for the model.")
@click.option("--prompt", default="", help="What the picture shows, for peers that want it.")
@click.option("--size", type=click.IntRange(64, 2048), help="Long side of the picture. [default: the model's]")
@click.option("--updates", type=click.IntRange(min=1), help="About so many an edit. [default: each system's own]")
@click.option(
    "--train-lora", is_flag=True, help="Train the LoRA that a peer publishes results with, once, and time it."
)
@click.option("--lora-steps", type=click.IntRange(min=1), help="So many steps of it. [default: as published]")
@click.option(
    "--config", "configs", type=ConfigType(), multiple=True, default=["default"], show_default=True,
    help="Of this engine; a row each. Repeatable.",
)  # fmt: skip
@click.option("--backend", default="auto", show_default=True, help="Of this engine.")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="Of this engine; peers choose their own.")
@click.option("--threads", type=click.IntRange(min=1), help="Of every system. [default: 1 on a CPU, torch's on a GPU]")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Edits of each system.")
@click.option("--no-warm-up", is_flag=True, help="Let the first edit of each system count.")
@click.option("--timeout", type=POSITIVE, default=3600.0, show_default=True, help="Seconds that an edit may take.")
@click.option("-o", "--output", type=FILE, default="out/peers.json", show_default=True, help="JSON to write.")
@answering
def bench_peers(
    image: Path | None,
    drags: tuple[Drag, ...],
    mask: Path | None,
    repos: tuple[tuple[str, Path], ...],
    pythons: tuple[tuple[str, Path], ...],
    adapters: tuple[tuple[str, Path], ...],
    model: str,
    readout: Path | None,
    prompt: str,
    size: int | None,
    updates: int | None,
    train_lora: bool,
    lora_steps: int | None,
    configs: tuple[tuple[str, dict[str, str]], ...],
    backend: str,
    device: str,
    dtype: str,
    threads: int | None,
    rounds: int,
    no_warm_up: bool,
    timeout: float,
    output: Path,
    progress: bool,
) -> Answer:
    """Other drag editors from checkouts you have, beside this one: same picture, drags, weights, device and timer.

    Pictures, a contact sheet and each system's log go to a folder named like the output.
    """
    from ddengine.config import DirectDragConfig

    for preset, changes in configs:
        DirectDragConfig.preset(preset).changed_from_strings(changes)
    if readout is not None and not readout.is_file():
        raise InputError(f"readout {readout}: not found; give a .safetensors file")

    import torch

    from ddengine.bench.peers import random_weights
    from ddengine.bench.peers.order import make_order, spread
    from ddengine.bench.peers.run import make_systems, run
    from ddengine.bench.peers.view import contact_sheet, text
    from ddengine.models.cache import cache_dir
    from ddengine.models.place import resolve_device

    systems = make_systems(dict(repos), adapters=dict(adapters), pythons=dict(pythons), configs=configs)
    on = resolve_device(device)
    folder = Path(model)
    if model == "sd15":
        folder, head = random_weights.write(cache_dir() / "random-sd15")
        readout = readout or head
    order = make_order(
        folder,
        image=image,
        drags=drags,
        mask=mask,
        size=size,
        readout=readout,
        prompt=prompt,
        device=str(on),
        dtype=dtype,
        backend=backend,
        threads=threads or (1 if on.type == "cpu" else torch.get_num_threads()),
        updates=spread(updates) if updates else None,
        lora_steps=(lora_steps or 0) if train_lora or lora_steps else None,
    )
    facts = run(systems, order, output, rounds=rounds, warm_up=not no_warm_up, timeout=timeout, progress=progress)
    sheet = contact_sheet(facts, order, output.with_suffix(""))
    return facts, f"{text(facts)}\nwrote {output} and {sheet}"
