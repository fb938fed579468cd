"""The `ddengine` command, put together from its commands."""

from __future__ import annotations

import click

import ddengine
from ddengine.commands import (
    bench,
    bench_latency,
    bench_load,
    bench_peers,
    editing,
    evaluate,
    serve,
    ui,
    upkeep,
    weights,
)
from ddengine.terminal import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ddengine.__version__, prog_name="ddengine")
def main() -> None:
    """Drag-based image editing: a picture and an arrow in, an edited picture out.

    \b
    ddengine demo                                            look at three edits
    ddengine edit cat.png --drag 153,445:210,443 -o out.png  make one
    """


for command in (
    editing.edit,
    editing.prepare,
    editing.demo,
    upkeep.build,
    upkeep.cache,
    upkeep.info,
    weights.convert_readout,
    weights.train_embedded,
    weights.train_readout,
    bench.bench,
    serve.serve,
    ui.ui,
    evaluate.evaluate,
):
    main.add_command(command)
for command in (bench_latency.bench_latency, bench_load.bench_load, bench_peers.bench_peers):
    bench.bench.add_command(command)
