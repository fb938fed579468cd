"""Commands that measure: the group `bench`."""

from __future__ import annotations

from pathlib import Path

import click

from ddengine.commands.options import FILE, POSITIVE
from ddengine.terminal import (
    Answer,
    SettingType,
    answering,
    device_option,
)


@click.group()
def bench() -> None:
    """Measure what the engine does."""


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
