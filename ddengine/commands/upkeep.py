"""Commands that build, list and remove what edits run on: build, cache, info."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ddengine.commands.options import FILE, weights_options
from ddengine.terminal import (
    Answer,
    SettingType,
    answering,
    device_option,
)


@click.command()
@weights_options
@click.option(
    "--size",
    "sizes",
    multiple=True,
    help="Working size in pixels: a side, or WIDTHxHEIGHT. Repeatable. [default: the model's, square]",
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt", "compile"]),
    default="onnxruntime",
    show_default=True,
    help="What will run them.",
)
@click.option(
    "--precision", default="auto", show_default=True, help="auto (what edits use), float32, bfloat16 or float16."
)
@device_option
@click.option("--batch", type=click.IntRange(1, 64), default=1, show_default=True, help="Edits at once.")
@click.option(
    "--points",
    type=click.IntRange(1, 64),
    multiple=True,
    help="compile: drags of an edit, rounded up to 1, 2, 4, ... Repeatable. [default: 1]",
)
@click.option(
    "--config", "preset", default="default", show_default=True, metavar="PRESET", help="compile: of the edits."
)
@click.option("--set", "settings", type=SettingType(), multiple=True, help="compile: one setting of it. Repeatable.")
@click.option("--prompt", is_flag=True, help="For edits with a prompt.")
@click.option("--readout-grid", type=click.IntRange(1, 4096), help="Side of the readout maps, where rg_grid is set.")
@click.option("--cache", type=FILE, help="Folder to keep them in; edits find them there with DDENGINE_CACHE=FOLDER.")
@answering
def build(
    model: str,
    readout: Path | None,
    lora: Path | None,
    vae: Path | None,
    sizes: tuple[str, ...],
    backend: str,
    precision: str,
    device: str,
    batch: int,
    points: tuple[int, ...],
    preset: str,
    settings: tuple[tuple[str, str], ...],
    prompt: bool,
    readout_grid: int | None,
    cache: Path | None,
    progress: bool,
) -> Answer:
    """Build the network passes of edits, or compile their drag step, ahead of time; what is built stays as it is."""
    from ddengine.backends.sizes import parse_size

    checked = tuple(parse_size(size) for size in sizes)
    if backend == "compile":
        from ddengine.config import DirectDragConfig

        config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))

        from ddengine.directdrag.packages import compile_model

        packages = compile_model(
            model,
            checked,
            config,
            edits=batch,
            pairs=points or (1,),
            readout=readout,
            lora=lora,
            vae=vae,
            device=device,
            dtype=precision,
            cache=cache,
            progress=progress,
        )
        lines = [f"there  {one.name:<16}{one.shape}" for one in packages]
        facts = [{"name": one.name, "shape": one.shape} for one in packages]
        return {"backend": backend, "model": model, "programs": facts}, "\n".join(
            [*lines, "edits like these can run with --backend compile"]
        )

    from ddengine.backends.build import build_model, built_text

    parts: dict[str, Any] = {"readout": readout, "lora": lora, "vae": vae, "precision": precision, "device": device}
    built = build_model(
        model,
        backend,
        checked,
        **parts,
        batch=batch,
        prompt=prompt,
        readout_grid=readout_grid,
        cache=cache,
        progress=progress,
    )
    return {"backend": backend, "model": model, "programs": built}, built_text(built, backend)


@click.group()
def cache() -> None:
    """What is kept in the cache folder; `ddengine info` lists it."""


@cache.command("clear")
@click.option("--cache", type=FILE, help="Folder that `ddengine build --cache` was given.")
@answering
def clear_cache(cache: Path | None) -> Answer:
    """Remove everything that was built: graphs, engines, compiled packages."""
    from ddengine.models.cache import cache_dir
    from ddengine.store import ArtefactStore

    folder = cache or cache_dir()
    cleared = ArtefactStore(folder).clear()
    text = f"removed {cleared.entries} entries ({cleared.bytes / 1e6:.1f} MB) from {folder}"
    busy = f"; left {cleared.busy} that another process is making" if cleared.busy else ""
    return {
        "folder": str(folder),
        "entries": cleared.entries,
        "bytes": cleared.bytes,
        "busy": cleared.busy,
    }, text + busy


@click.command()
@answering
def info() -> Answer:
    """Versions, devices, backends and why others do not work, embedded model, cache."""
    from ddengine.environment import as_text, environment

    facts = environment()
    return facts, as_text(facts)
