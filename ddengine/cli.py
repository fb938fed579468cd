"""The `ddengine` command: it reads options, calls the library and says what came of it.

Torch is imported by the commands that need it, and only once all that the user can have got wrong has been checked.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

import ddengine
from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.terminal import (
    Answer,
    Commands,
    DragType,
    EditCommand,
    SettingType,
    answering,
    device_option,
    engine_options,
    seed_option,
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ddengine.__version__, prog_name="ddengine")
def main() -> None:
    """Drag-based image editing: a picture and an arrow in, an edited picture out.

    \b
    ddengine demo                                            look at three edits
    ddengine edit cat.png --drag 153,445:210,443 -o out.png  make one
    """


FILE = click.Path(path_type=Path)
MINUTES = click.FloatRange(min=0, min_open=True)


@main.command(cls=EditCommand)
@click.argument("image", type=FILE)
@click.option(
    "--drag",
    "drags",
    type=DragType(),
    multiple=True,
    required=True,
    help="Move what is at the first point to the second; pixels, x right, y down. Repeatable.",
)
@click.option("-o", "--output", type=FILE, required=True, help="Picture to write; its suffix is its format.")
@click.option("--mask", type=FILE, help="Picture of the same size: white may change, black stays.")
@click.option("--prompt", default="", help="What the picture shows; never needed.")
@click.option("--model", default="embedded", show_default=True, help="embedded, a diffusers folder, or a hub id.")
@click.option("--readout", type=FILE, help="Readout head (.safetensors) for the model.")
@click.option("--lora", type=FILE, help="LoRA file or folder, fused into the weights.")
@click.option("--vae", type=FILE, help="Folder of another VAE.")
@click.option("--method", type=click.Choice(["directdrag"]), default="directdrag", show_default=True)
@engine_options
@click.option(
    "--config",
    "preset",
    default="default",
    show_default=True,
    metavar="PRESET",
    help="Named configuration; see below.",
)
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@seed_option
@answering
def edit(
    image: Path,
    drags: tuple[Drag, ...],
    output: Path,
    mask: Path | None,
    prompt: str,
    model: str,
    readout: Path | None,
    lora: Path | None,
    vae: Path | None,
    method: str,
    backend: str,
    device: str,
    dtype: str,
    preset: str,
    settings: tuple[tuple[str, str], ...],
    seed: int,
    progress: bool,
) -> Answer:
    """Edit IMAGE by one or more drags."""
    from ddengine.artifacts import check_picture_path
    from ddengine.config import DirectDragConfig
    from ddengine.drags import parse_drags
    from ddengine.image import read_image
    from ddengine.request import ANY_SIZE, checked_mask, spaces_for

    # All that the user can have got wrong is found before the seconds that torch and the weights take.
    for given in (image, mask):
        if given is not None and _same_file(given, output):
            raise InputError(f"{output} is the input itself; name another file with -o")
    check_picture_path(output)
    picture = read_image(image)
    checked = parse_drags(drags, *picture.size)
    area = checked_mask(mask, picture.size)
    config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))
    spaces_for(picture, ANY_SIZE, config)

    from ddengine.engine import Engine

    started = time.perf_counter()
    engine = Engine.load(model=model, backend=backend, device=device, dtype=dtype, readout=readout, lora=lora, vae=vae)
    loading = time.perf_counter() - started
    result = engine.edit(
        picture,
        checked,
        method=method,
        mask=area,
        prompt=prompt,
        config=config,
        seed=seed,
        progress=progress,
    )
    result.save(output)
    facts = {
        "output": str(output),
        "size": list(result.image.size),
        "drags": [
            {
                "handle": drag.handle,
                "target": drag.target,
                "arrived": point,
                "distance": _distance(point, drag.target),
            }
            for drag, point in zip(checked, result.handles, strict=True)
        ],
        "model": model,
        "method": method,
        "backend": result.backend,
        "config": config.to_dict(),
        "seed": seed,
        "timings": {**result.timings, "load": loading, "total": result.timings["total"] + loading},
        "passes": result.passes,
        "history": result.history,
        "notes": result.notes,
    }
    return facts, _edit_text(facts)


def _edit_text(facts: dict[str, Any]) -> str:
    width, height = facts["size"]
    lines = [f"wrote {facts['output']} ({width} x {height}) in {facts['timings']['total']:.1f} s"]
    lines += [
        "  ({:g}, {:g}) arrived at ({:.1f}, {:.1f}), ".format(*drag["handle"], *drag["arrived"])
        + "{:.1f} pixels from ({:g}, {:g})".format(drag["distance"], *drag["target"])
        for drag in facts["drags"]
    ]
    lines += [f"  note: {note}" for note in facts["notes"]]
    return "\n".join(lines)


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return float(((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5)


def _same_file(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


@main.command()
@click.option("-o", "--output", type=FILE, default="demo-out", show_default=True, help="Folder for the pictures.")
@engine_options
@answering
def demo(output: Path, backend: str, device: str, dtype: str, progress: bool) -> Answer:
    """Edit the bundled pictures with the embedded model: before, after, side by side.

    Needs no network, no GPU and no weights but those in the package.
    """
    from ddengine.demo import run

    shown = run(output, progress=progress, backend=backend, device=device, dtype=dtype)
    lines = [f"{item.name}: {item.side_by_side} ({item.seconds:.1f} s)" for item in shown]
    return {"examples": shown}, "\n".join([*lines, f"look at the pictures in {output.resolve()}"])


@main.command()
@answering
def info() -> Answer:
    """Versions, devices, backends and why others do not work, embedded model, cache."""
    from ddengine.environment import as_text, environment

    facts = environment()
    return facts, as_text(facts)


@main.command("convert-readout")
@click.argument("source", metavar="IN.pt", type=FILE)
@click.argument("output", metavar="OUT.safetensors", type=FILE)
@answering
def convert_readout(source: Path, output: Path) -> Answer:
    """Convert a published readout checkpoint to the safetensors file that --readout reads.

    No code in IN.pt is run: it is read as tensors and plain containers, or refused.
    """
    _check_head_path(output)

    from ddengine.models.readout_io import convert_readout as convert

    shape = convert(source, output)
    facts = {"output": str(output), "dims": list(shape.dims), "projection": shape.projection}
    return facts, f"wrote {output}: {len(shape.dims)} layers, projection {shape.projection}"


def _check_head_path(output: Path) -> None:
    from ddengine.artifacts import check_writable

    if output.suffix != ".safetensors":
        raise InputError(f"cannot write {output}: it is no .safetensors name; end it in .safetensors")
    check_writable(output)


@main.command("train-embedded")
@click.option(
    "-o",
    "--output",
    type=FILE,
    default="runs/embedded",
    show_default=True,
    help="Folder; an interrupted run in it is resumed.",
)
@device_option
@seed_option
@click.option(
    "--minutes",
    type=(MINUTES, MINUTES, MINUTES),
    default=(60, 110, 10),
    show_default=True,
    help="Longest time for the autoencoder, the UNet and the readout head.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Worker processes: one a CPU core; a GPU takes one.",
)
@answering
def train_embedded(
    output: Path, device: str, seed: int, minutes: tuple[float, float, float], processes: int, progress: bool
) -> Answer:
    """Train the embedded model on pictures that ddengine draws itself."""
    from ddengine.training.embedded import Budget, train

    model = train(output, device=device, seed=seed, budget=Budget(*minutes), processes=processes, progress=progress)
    return {"output": str(output), "model": str(model)}, f"the model is in {model}"


@main.command("train-readout")
@click.option("--model", default="embedded", show_default=True, help="embedded, a diffusers folder, or a hub id.")
@click.option("-o", "--output", metavar="OUT.safetensors", type=FILE, required=True)
@click.option("--minutes", type=MINUTES, default=10, show_default=True, help="Longest time for the training.")
@click.option(
    "--triplets", type=click.IntRange(min=1), default=768, show_default=True, help="Drawn scenes to learn from."
)
@seed_option
@device_option
@answering
def train_readout(
    model: str, output: Path, minutes: float, triplets: int, seed: int, device: str, progress: bool
) -> Answer:
    """Train a readout head for a model, on pictures that ddengine draws itself."""
    _check_head_path(output)

    from ddengine.models.load import load_model
    from ddengine.training.readout import make

    loaded = load_model(model, device=device, dtype="float32")
    last = make(loaded, output, minutes=minutes, count=triplets, seed=seed, progress=progress)
    facts = {"output": str(output), "model": model, **last}
    return facts, f"wrote {output}: {last['step']} steps, loss {last['hinge']:.3f}"


@main.group()
def bench() -> None:
    """Measure what the engine does."""


@bench.command("scenes")
@click.option("--count", type=click.IntRange(min=1), default=60, show_default=True, help="Held-out drags.")
@click.option("--ablation", is_flag=True, help="Every row of the ablation too, and the paper's settings.")
@click.option(
    "-o", "--output", type=FILE, default="out/scenes", show_default=True, help="Folder for JSON and pictures."
)
@click.option("--model", default="embedded", show_default=True, help="embedded, or a folder train-embedded made.")
@engine_options
@answering
def bench_scenes(
    count: int, ablation: bool, output: Path, model: str, backend: str, device: str, dtype: str, progress: bool
) -> Answer:
    """Quality on drawn scenes whose right answer is known."""
    from ddengine.bench import scenes
    from ddengine.engine import Engine

    engine = Engine.load(model, backend=backend, device=device, dtype=dtype)
    facts = scenes.measure(engine, count, output, rows=ablation, progress=progress)
    return facts, scenes.table(facts["summary"])
