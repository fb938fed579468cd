"""The `ddengine` command: it reads options, calls the library and says what came of it.

Torch is imported by the commands that need it, and only once all that the user can have got wrong has been checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
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
MINUTES = POSITIVE = click.FloatRange(min=0, min_open=True)


build_option = click.option(
    "--build", is_flag=True, help="First build what the backend lacks for this picture's size; takes minutes."
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that take a picture to a model: which model, and under what prompt."""
    options = (
        click.option("--prompt", default="", help="What the picture shows; never needed."),
        click.option(
            "--model", default="embedded", show_default=True, help="embedded, a diffusers folder, or a hub id."
        ),
        click.option("--readout", type=FILE, help="Readout head (.safetensors) for the model."),
        click.option("--lora", type=FILE, help="LoRA file or folder, fused into the weights."),
        click.option("--vae", type=FILE, help="Folder of another VAE."),
        click.option(
            "--size", "working_size", type=int, help="Long side of the working picture. [default: the model's]"
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


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
@model_options
@click.option("--identity", is_flag=True, help="First fit a LoRA to IMAGE, so that the model knows what it shows.")
@click.option("--save-identity", type=FILE, help="Write that LoRA to this .safetensors file, for --lora.")
@click.option("--method", type=click.Choice(["directdrag"]), default="directdrag", show_default=True)
@engine_options
@build_option
@click.option(
    "--config",
    "preset",
    metavar="PRESET",
    help="Named configuration; see below. [default: default, or that of a prepared IMAGE]",
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
    working_size: int | None,
    identity: bool,
    save_identity: Path | None,
    method: str,
    backend: str,
    device: str,
    dtype: str,
    build: bool,
    preset: str | None,
    settings: tuple[tuple[str, str], ...],
    seed: int,
    progress: bool,
) -> Answer:
    """Edit IMAGE, a picture or what `ddengine prepare` made of one, by one or more drags."""
    from ddengine.artifacts import check_picture_path, check_tensors_path
    from ddengine.config import DirectDragConfig
    from ddengine.drags import parse_drags
    from ddengine.image import read_image
    from ddengine.request import ANY_SIZE, checked_mask, spaces_for
    from ddengine.source_reader import SUFFIX, read_header

    # All that the user can have got wrong is found before the seconds that torch and the weights take.
    for given in (image, mask):
        if given is not None and _same_file(given, output):
            raise InputError(f"{output} is the input itself; name another file with -o")
    check_picture_path(output)
    if save_identity is not None:
        if not identity:
            raise InputError(f"--save-identity {save_identity} has nothing to save; add --identity")
        check_tensors_path(save_identity)
    made = read_header(image) if image.suffix == SUFFIX else None
    if made is not None and identity:
        raise InputError(
            f"--identity is fitted before a picture is prepared, and {image} is prepared; give the picture"
        )
    picture: Any = None if made else read_image(image)
    size = made.image_size if made else picture.size
    checked = parse_drags(drags, *size)
    area = checked_mask(mask, size)
    base = made.config if made and preset is None else DirectDragConfig.preset(preset or "default")
    config = base.changed_from_strings(dict(settings))
    if picture is not None:
        spaces_for(picture, ANY_SIZE, config)

    from ddengine.engine import Engine
    from ddengine.source import Source

    started = time.perf_counter()
    where: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "build": build}
    engine = Engine.load(model=model, readout=readout, lora=lora, vae=vae, size=working_size, **where)
    loading = time.perf_counter() - started
    fitted, fitting = None, 0.0
    if identity:
        started = time.perf_counter()
        fitted = engine.fit_identity(picture, prompt=prompt, seed=seed, progress=progress)
        fitting = time.perf_counter() - started
        if save_identity is not None:
            fitted.save(save_identity)
    result = engine.edit(
        Source.load(image, device=engine.model.device) if made else picture,
        checked,
        method=method,
        mask=area,
        prompt=prompt,
        config=config,
        identity=fitted,
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
        "timings": {
            **result.timings,
            **({"identity": fitting} if identity else {}),
            "load": result.timings["load"] + loading,
            "total": result.timings["total"] + loading + fitting,
        },
        "passes": result.passes,
        "history": result.history,
        "notes": result.notes,
    }
    return facts, _edit_text(facts)


@main.command()
@click.argument("image", type=FILE)
@click.option("-o", "--output", metavar="FILE.safetensors", type=FILE, required=True)
@model_options
@engine_options
@build_option
@click.option(
    "--config",
    "preset",
    default="default",
    show_default=True,
    metavar="PRESET",
    help="Named configuration, as of edit.",
)
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@click.option(
    "--kv/--no-kv", default=True, show_default=True, help="Keep keys and values: most of the file, faster edits."
)
@answering
def prepare(
    image: Path,
    output: Path,
    prompt: str,
    model: str,
    readout: Path | None,
    lora: Path | None,
    vae: Path | None,
    working_size: int | None,
    backend: str,
    device: str,
    dtype: str,
    build: bool,
    preset: str,
    settings: tuple[tuple[str, str], ...],
    kv: bool,
    progress: bool,
) -> Answer:
    """Do for IMAGE all that no drag changes; `ddengine edit FILE.safetensors` then pays only for its drags."""
    from ddengine.artifacts import check_tensors_path
    from ddengine.config import DirectDragConfig
    from ddengine.image import read_image
    from ddengine.request import ANY_SIZE, spaces_for

    check_tensors_path(output)
    picture = read_image(image)
    config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))
    spaces_for(picture, ANY_SIZE, config)

    from ddengine.engine import Engine

    started = time.perf_counter()
    where: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "build": build}
    engine = Engine.load(model=model, readout=readout, lora=lora, vae=vae, size=working_size, **where)
    loading = time.perf_counter() - started
    source = engine.prepare(picture, prompt=prompt, config=config, progress=progress)
    source.save(output, kv=kv)
    written = output.stat().st_size
    facts = {
        "output": str(output),
        "size": list(picture.size),
        "bytes": {**source.nbytes._asdict(), "file": written},
        "model": model,
        "config": config.to_dict(),
        "timings": {**source.timings, "load": loading, "total": time.perf_counter() - started},
        "passes": source.passes,
    }
    width, height = picture.size
    return facts, f"wrote {output} ({width} x {height}, {written / 2**20:.1f} MiB)"


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
@click.option("--model", default="embedded", show_default=True, help="embedded, a diffusers folder, or a hub id.")
@click.option("--readout", type=FILE, help="Readout head (.safetensors) for the model.")
@click.option("--lora", type=FILE, help="LoRA file or folder, fused into the weights.")
@click.option("--vae", type=FILE, help="Folder of another VAE.")
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


@main.group("cache")
def cache_group() -> None:
    """What is kept in the cache folder; `ddengine info` lists it."""


@cache_group.command("clear")
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
    from ddengine.artifacts import check_tensors_path

    check_tensors_path(output)

    from ddengine.models.readout_io import convert_readout as convert

    shape = convert(source, output)
    facts = {"output": str(output), "dims": list(shape.dims), "projection": shape.projection}
    return facts, f"wrote {output}: {len(shape.dims)} layers, projection {shape.projection}"


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
    from ddengine.artifacts import check_tensors_path

    check_tensors_path(output)

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


@bench.command("limit")
@click.option(
    "--gpu", "gpus", multiple=True, help="h200, h100, a100, 4090, ...; all that are known if none. Repeatable."
)
@click.option("--size", type=click.IntRange(64, 2048), default=512, show_default=True, help="Side of a square picture.")
@click.option("--config", "preset", default="default", show_default=True, metavar="PRESET")
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@click.option("--savings", is_flag=True, help="What each saving removes from the published structure, too.")
@click.option("--step-ms", type=POSITIVE, help="Measured on the one GPU: a drag step, for our share of the limit.")
@click.option("--edit-ms", type=POSITIVE, help="Measured on the one GPU: a first edit.")
@answering
def bench_limit(
    gpus: tuple[str, ...],
    size: int,
    preset: str,
    settings: tuple[tuple[str, str], ...],
    savings: bool,
    step_ms: float | None,
    edit_ms: float | None,
) -> Answer:
    """The least time an edit takes on a GPU, counted at the Stable Diffusion 1.5 shape; needs no GPU."""
    from ddengine.bench.devices import devices
    from ddengine.config import DirectDragConfig

    chosen = devices(gpus, measured=step_ms is not None or edit_ms is not None)
    config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))

    from ddengine.bench import roofline

    facts = roofline.limit(chosen, size=size, config=config, savings=savings, step_ms=step_ms, edit_ms=edit_ms)
    return facts, roofline.text(facts)


@bench.command("export")
@click.option("--shape", type=click.Choice(["embedded", "sd15"]), default="embedded", show_default=True)
@click.option("--speed", is_flag=True, help="Time the passes in ONNX Runtime too.")
@click.option("-o", "--output", type=FILE, default="out/export.json", show_default=True, help="JSON to write.")
@answering
def bench_export(shape: str, speed: bool, output: Path, progress: bool) -> Answer:
    """Nodes and arithmetic of the exported passes before and after folding; sd15 takes minutes and 5 GB."""
    import torch

    from ddengine.artifacts import check_writable, make_folder
    from ddengine.backends.graphs import PassShape
    from ddengine.bench import export_report
    from ddengine.bench.shapes import sd15
    from ddengine.models.load import load_model

    make_folder(output.parent)
    check_writable(output)
    model = load_model("embedded", device="cpu") if shape == "embedded" else sd15("cpu", torch.float32)
    sizes = PassShape((model.size, model.size), readout_hw=(model.size // 8, model.size // 8))
    facts = {"shape": shape, "counts": export_report.counts(model, sizes)}
    if speed:
        facts["speed"] = export_report.speed(model, sizes)
    export_report.write(facts, output)
    return facts, f"{export_report.table(facts)}\nwrote {output}"


@bench.command("kernels")
@click.option("--compile", "compile_only", is_flag=True, help="Only compile, and report; needs no GPU.")
@click.option("--sm", "targets", type=int, multiple=True, help="Compile for this architecture (90) alone. Repeatable.")
@click.option("-o", "--output", type=FILE, default="out/kernels.json", show_default=True, help="JSON to write.")
@device_option
@answering
def bench_kernels(compile_only: bool, targets: tuple[int, ...], output: Path, device: str, progress: bool) -> Answer:
    """Speed of the method's own operators, and what their Triton kernels take of a GPU."""
    if compile_only:
        from ddengine.bench import compile_report

        reports = compile_report.compile_all(targets, progress=progress)
        return compile_report.facts(reports), compile_report.table(reports)

    from ddengine.bench import kernels
    from ddengine.models.place import resolve_device

    facts = kernels.run(resolve_device(device), output, progress=progress)
    return facts, kernels.table(facts)


@bench.command("parity")
@click.option("--count", type=click.IntRange(0, 1000), default=30, show_default=True, help="Whole edits to compare.")
@click.option("--config", "preset", default="default", show_default=True, metavar="PRESET")
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@click.option("-o", "--output", type=FILE, default="out/parity.json", show_default=True, help="JSON to write.")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@answering
def bench_parity(
    count: int,
    preset: str,
    settings: tuple[tuple[str, str], ...],
    output: Path,
    device: str,
    dtype: str,
    progress: bool,
) -> Answer:
    """The compiled drag step against the plain one, on the embedded model; what is not compiled yet takes minutes."""
    from ddengine.config import DirectDragConfig

    config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))

    from ddengine.bench import parity
    from ddengine.models.cache import cache_dir
    from ddengine.models.load import load_model
    from ddengine.store import ArtefactStore

    model, store = load_model("embedded", device=device, dtype=dtype), ArtefactStore(cache_dir())
    facts = parity.run(model, output, count=count, config=config, store=store, progress=progress)
    return facts, parity.text(facts)


@bench.command("gradients")
@click.option("--drags", type=click.IntRange(1, 100), default=4, show_default=True, help="Edits whose states are used.")
@click.option("-o", "--output", type=FILE, default="out/gradients.json", show_default=True, help="JSON to write.")
@click.option("--plot", type=FILE, help="Picture to draw; needs matplotlib.")
@device_option
@answering
def bench_gradients(drags: int, output: Path, plot: Path | None, device: str, progress: bool) -> Answer:
    """How large the drag step's gradients are, and what half precision makes of them, on the embedded model."""
    from ddengine.bench import gradients
    from ddengine.config import DirectDragConfig
    from ddengine.models.load import load_model

    names = ("float32", "bfloat16", "float16")
    models = {name: load_model("embedded", device=device, dtype=name) for name in names}
    config = DirectDragConfig.preset("default")
    facts = gradients.run(models, output, config=config, drags=drags, progress=progress)
    if plot is not None:
        gradients.picture(facts, plot)
    return facts, gradients.text(facts)


@bench.command("waterfall")
@click.option("--shape", type=click.Choice(["embedded", "sd15"]), default="embedded", show_default=True, help="Model.")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="Of the engine: auto, float32, bfloat16 or float16.")
@click.option("--config", "preset", default="default", show_default=True, metavar="PRESET")
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@click.option("--steps", type=click.IntRange(min=1), help="About so many updates an edit; all of them if not given.")
@click.option("--compile", is_flag=True, help="The compiled bars too; what is not built yet takes minutes to build.")
@click.option("--batch", type=click.IntRange(2, 64), default=4, show_default=True, help="Edits of the last bar.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Samples of every bar.")
@click.option("-o", "--output", type=FILE, default="out/waterfall.json", show_default=True, help="JSON to write.")
@click.option("--plot", type=FILE, help="Picture to draw, .png or .svg; needs matplotlib.")
@answering
def bench_waterfall(
    shape: str,
    device: str,
    dtype: str,
    preset: str,
    settings: tuple[tuple[str, str], ...],
    steps: int | None,
    compile: bool,
    batch: int,
    rounds: int,
    output: Path,
    plot: Path | None,
    progress: bool,
) -> Answer:
    """Where the time of an edit goes: the published structure, then one saving more a bar, in one process."""
    from ddengine.artifacts import check_writable
    from ddengine.config import DirectDragConfig

    config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))
    if plot is not None:
        check_writable(plot)

    import torch

    from ddengine.bench import waterfall, waterfall_view
    from ddengine.models.place import resolve_device, resolve_dtype

    if plot is not None:
        waterfall_view.check_plot(plot)
    on = resolve_device(device)
    computes = resolve_dtype(dtype, on)
    facts = waterfall.run(
        output,
        shape=shape,
        device=on,
        half=None if computes == torch.float32 else computes,
        config=config,
        updates=steps,
        compile=compile,
        batch=batch,
        rounds=rounds,
        progress=progress,
    )
    if plot is not None:
        waterfall_view.plot(facts, plot)
    return facts, waterfall_view.text(facts)
