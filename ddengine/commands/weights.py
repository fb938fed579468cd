"""Commands that make weights: convert-readout, train-embedded, train-readout."""

from __future__ import annotations

from pathlib import Path

import click

from ddengine.commands.options import FILE, MINUTES
from ddengine.terminal import (
    Answer,
    answering,
    device_option,
    seed_option,
)


@click.command("convert-readout")
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


@click.command("train-embedded")
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


@click.command("train-readout")
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
