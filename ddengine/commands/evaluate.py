"""The command that evaluates on whole sets: eval."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddengine.commands.options import FILE, build_option, weights_options
from ddengine.errors import InputError
from ddengine.terminal import Answer, SettingType, answering, engine_options, seed_option

if TYPE_CHECKING:
    from ddengine.bench.evaluation.plan import Progress, Watch

FAILED = 1  # the exit code of a run that went to its end, but not for every sample
_CODE = f"{__name__}.code"


def _with_code(command: Callable[..., None]) -> Callable[..., int]:
    """The command's exit code is what it left in the context."""

    @functools.wraps(command)
    def coded(*args: Any, **options: Any) -> int:
        command(*args, **options)
        return int(click.get_current_context().meta.get(_CODE, 0))

    return coded


@click.command("eval")
@click.option("--data", type=FILE, help="Folder that DragBench or Drag100 was unpacked to.")
@click.option(
    "--suite",
    type=click.Choice(["dragbench", "drag100", "scenes"]),
    default="dragbench",
    show_default=True,
    help="What to evaluate on; scenes are drawn and need no --data.",
)
@click.option("-o", "--output", type=FILE, default="out/eval", show_default=True, help="Folder; a run in it goes on.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many samples.")
@click.option("--count", type=click.IntRange(1, 100_000), default=60, show_default=True, help="scenes: drags to draw.")
@click.option(
    "--config",
    "presets",
    multiple=True,
    default=("default",),
    show_default=True,
    metavar="PRESET",
    help="A row of the table. Repeatable.",
)
@click.option("--set", "settings", type=SettingType(), multiple=True, help="Change one setting of it. Repeatable.")
@click.option("--ablation", is_flag=True, help="In the first row's place the six rows of the paper's ablation.")
@click.option("--lpips", type=FILE, help="Folder with alexnet.safetensors and lpips_alex.safetensors, for IF.")
@click.option("--clip", type=FILE, help="Folder of CLIP ViT-B/32 in transformers' layout.")
@click.option("--dift", type=FILE, help="Folder of Stable Diffusion 2.1 in diffusers' layout, for MD.")
@weights_options
@click.option("--size", type=int, help="Long side of the working picture. [default: the model's]")
@click.option("--jobs", type=click.IntRange(1, 256), help="Processes, each with its own engine. [default: 1]")
@click.option(
    "--ray",
    metavar="ADDRESS",
    is_flag=False,
    flag_value="auto",
    help="Share the work over a Ray cluster: its address, auto, or local; --jobs are its actors.",
)
@engine_options
@build_option
@seed_option
@_with_code
@answering
def evaluate(
    data: Path | None,
    suite: str,
    output: Path,
    limit: int | None,
    count: int,
    presets: tuple[str, ...],
    settings: tuple[tuple[str, str], ...],
    ablation: bool,
    lpips: Path | None,
    clip: Path | None,
    dift: Path | None,
    model: str,
    readout: Path | None,
    lora: Path | None,
    vae: Path | None,
    size: int | None,
    jobs: int | None,
    ray: str | None,
    backend: str,
    device: str,
    dtype: str,
    build: bool,
    seed: int,
    progress: bool,
) -> Answer:
    """Edit a whole set and measure how good the edits are; writes evaluation.json and report.html.

    A run that was stopped goes on where it was. A sample that fails is listed and costs no other; the exit code is
    then 1. Folders of weights are local; a figure whose weights are not given stays empty.
    """
    from ddengine.artifacts import make_folder
    from ddengine.bench.evaluation.rows import plan_rows
    from ddengine.bench.evaluation.suites import read_suite

    # All that the user can have got wrong is found before the seconds that torch and the weights take.
    rows = plan_rows(presets, dict(settings), ablated=ablation)
    weights = {name: path for name, path in (("lpips", lpips), ("clip", clip), ("dift", dift)) if path is not None}
    for name, path in weights.items():
        if not path.expanduser().is_dir():
            raise InputError(f"--{name} {path} is no folder; name the one that holds its weights")
    make_folder(output)
    chosen = read_suite(suite, data, count=count, limit=limit)

    from ddengine.bench.evaluation import report, tables
    from ddengine.bench.evaluation.plan import Plan
    from ddengine.bench.evaluation.run import RESULT
    from ddengine.bench.evaluation.run import evaluate as carry_out

    engine = {"model": model, "readout": readout, "lora": lora, "vae": vae, "size": size, "build": build}
    engine |= {"backend": backend, "device": device, "dtype": dtype}
    many = jobs or (1 if ray is None else 0)
    plan = Plan(chosen, rows, output, engine, weights, jobs=many, ray=ray, seed=seed)
    with _watched(progress) as watch:
        facts = carry_out(plan, watch)
    page = report.write(facts, chosen, output)
    if facts["failures"]:
        click.get_current_context().meta[_CODE] = FAILED
    wrote = f"wrote {output / RESULT} and {page}"
    return {"output": str(output), "report": str(page), **facts}, f"{tables.terminal(facts)}\n{wrote}"


@contextmanager
def _watched(progress: bool) -> Iterator[Watch | None]:
    """A live bar for each phase, to someone who watches."""
    if not progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    layout = (TextColumn("{task.description:<6}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note = TextColumn("[dim]{task.fields[at]}", markup=True)
    with Bars(*layout, note, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def watch(at: Progress) -> None:
            from rich.markup import escape

            if at.phase not in tasks:
                tasks[at.phase] = bars.add_task(at.phase, at="")
            failed = f"  {at.failed} failed" if at.failed else ""
            bars.update(tasks[at.phase], completed=at.done, total=at.total, at=f"{escape(at.at)}{failed}")

        yield watch
