"""The command `bench load`."""

from __future__ import annotations

from pathlib import Path

import click

from ddengine.commands.options import FILE
from ddengine.terminal import Answer, answering


@click.command("load")
@click.option("--edits", type=click.IntRange(10, 10_000), default=200, show_default=True, help="Edits of --no-ray.")
@click.option("--ray/--no-ray", default=True, show_default=True, help="Ray, with one worker and with two, too.")
@click.option("--faults/--no-faults", default=True, show_default=True, help="Make every fault, too.")
@click.option("-o", "--output", type=FILE, default="out/service.json", show_default=True, help="JSON to write.")
@answering
def bench_load(edits: int, ray: bool, faults: bool, output: Path, progress: bool) -> Answer:
    """The service under load and faults: started here on loopback, a few minutes of two cores."""
    from ddengine.artifacts import check_writable, make_folder

    make_folder(output.parent)
    check_writable(output)

    from ddengine.bench import load

    def say(line: str) -> None:
        if progress:
            click.echo(line, err=True)

    facts = load.run(output, edits=edits, ray=ray, faults=faults, say=say)
    return facts, f"{load.text(facts)}\nwrote {output}"
