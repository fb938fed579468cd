"""`ddengine bench latency`: what an edit takes here, backend by backend."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ddengine.commands.options import FILE, weights_options
from ddengine.errors import InputError
from ddengine.terminal import Answer, SettingType, answering, device_option

POINTS = (1, 2, 4, 8, 16)


@click.command("latency")
@weights_options
@click.option("--shape", type=click.Choice(["sd15"]), help="In place of a model: this architecture, random weights.")
@click.option("--size", type=click.IntRange(64, 2048), help="Long side of the working picture. [default: the model's]")
@click.option(
    "--points",
    type=click.IntRange(1, 64),
    multiple=True,
    help="Drags of an edit. Repeatable. [default: 1, 2, 4, 8, 16]",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(["eager", "compile", "onnxruntime", "tensorrt", "auto"]),
    help="What runs the networks. Repeatable. [default: all that run here]",
)
@click.option("--batch", type=click.IntRange(1, 64), default=1, show_default=True, help="Edits at once.")
@click.option("--edits", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Samples of every row.")
@click.option(
    "--updates",
    type=click.IntRange(min=1),
    help="Every edit makes about so many latent updates, none ends early. [default: as many as its drags take]",
)
@click.option("--config", "preset", default="default", show_default=True, metavar="PRESET")
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@device_option
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option(
    "--build", is_flag=True, help="First build what a backend lacks; takes minutes for each number of points."
)
@click.option(
    "--resume", is_flag=True, help="Keep the finished rows of the output file, if of this plan, machine and commit."
)
@click.option("-o", "--output", type=FILE, default="out/latency.json", show_default=True, help="JSON to write.")
@click.option("--csv", type=FILE, help="The same rows as a table to write.")
@click.option("--plot", type=FILE, help="Picture to draw, .png or .svg; needs matplotlib.")
@answering
def bench_latency(
    model: str,
    shape: str | None,
    readout: Path | None,
    lora: Path | None,
    vae: Path | None,
    size: int | None,
    points: tuple[int, ...],
    backends: tuple[str, ...],
    batch: int,
    edits: int,
    updates: int | None,
    preset: str,
    settings: tuple[tuple[str, str], ...],
    device: str,
    dtype: str,
    build: bool,
    resume: bool,
    output: Path,
    csv: Path | None,
    plot: Path | None,
    progress: bool,
) -> Answer:
    """Milliseconds an edit, a point and a drag step, backend by backend; equal to eager first, or no time at all."""
    from ddengine.artifacts import check_writable, make_folder
    from ddengine.config import DirectDragConfig

    config = DirectDragConfig.preset(preset).changed_from_strings(dict(settings))
    for path in (csv, plot):
        if path is not None:
            make_folder(path.parent)
            check_writable(path)
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise InputError(f"cannot draw {plot}: its name must end in .png or .svg")

    from ddengine.bench import latency, latency_plot, latency_view
    from ddengine.bench.latency_work import make_model, shortened
    from ddengine.bench.waterfall_view import check_plot

    if plot is not None:
        check_plot(plot)
    began = time.perf_counter()
    loaded = make_model(model, shape, size=size, device=device, dtype=dtype, readout=readout, lora=lora, vae=vae)
    seconds = time.perf_counter() - began
    plan = latency.Plan(loaded, shortened(config, updates), points or POINTS, batch, edits, seconds)
    words = ["--model", model]
    for name, value in {"readout": readout, "lora": lora, "vae": vae, "device": device, "precision": dtype}.items():
        words += [f"--{name}", str(value)] if value not in (None, "auto") else []
    facts = latency.run(output, plan, backends, build=build, resume=resume, described=words, progress=progress)
    if csv is not None:
        latency_view.write_csv(facts, csv)
    if plot is not None and latency_view.timed(facts):
        latency_plot.plot(facts, plot)
    latency.refuse(facts)
    wrote = ", ".join(str(path) for path in (output, csv, plot) if path is not None)
    return facts, f"{latency_view.text(facts)}\n\nwrote {wrote}"
