"""All that edits of one size run under the `compile` backend, compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ddengine.backends.compiled import CompiledPasses
from ddengine.backends.graphs import PASSES, PassShape, pass_graph
from ddengine.config import DirectDragConfig
from ddengine.directdrag.drag import StepShape
from ddengine.directdrag.readout import uses_readout
from ddengine.directdrag.step import Rules
from ddengine.directdrag.unit import CompiledUnit
from ddengine.models.cache import cache_dir
from ddengine.models.load import load_model
from ddengine.progress import Progress, Reporter, reporter
from ddengine.store import ArtefactStore

Report = Callable[[str, int, int], None]  # what is being compiled, how many are done, of how many


@dataclass(frozen=True)
class Package:
    """What was compiled, or was there: a pass or the drag step, and for which shape."""

    name: str
    shape: str


def compile_packages(
    passes: CompiledPasses,
    image_hw: tuple[int, int],
    config: DirectDragConfig,
    *,
    edits: int = 1,
    pairs: Sequence[int] = (1, 2),
    report: Report = lambda _name, _done, _total: None,
) -> list[Package]:
    """Compile what edits of a working size (rows, columns) lack: the drag step for each number of pairs, rounded up to
    a power of two, and on CUDA the gradient-free passes.

    report may raise to stop: what is finished by then stays. Raises BackendUnavailable where something cannot be
    compiled, ModelError for readout guidance without a head.
    """
    latent_hw = (image_hw[0] // 8, image_hw[1] // 8)
    grid = None
    if uses_readout(config, passes):
        grid = (config.rg_grid, config.rg_grid) if config.rg_grid else latent_hw
    shape = PassShape(image_hw, readout_hw=grid)
    outputs = {one.name: one for one in pass_graph("reference", passes.model, passes.network, shape).spec.outputs}
    maps = outputs["appearance"].shape[1:] if grid else None
    unit = CompiledUnit(passes, Rules(config, (image_hw[0] // 2, image_hw[1] // 2), grid))
    work: list[tuple[Package, Callable[[], object]]] = []
    for count in sorted({1 << (most - 1).bit_length() for most in pairs}):
        triple = None if maps is None else (maps[0], maps[1], maps[2])
        step = StepShape(edits, count, latent_hw, outputs["feature"].shape[1], triple, passes.dtype)
        work.append((Package("drag step", f"{edits} x {count} points"), partial(unit.open, step, make=True)))
    for name in PASSES if passes.packaged else ():
        for one in dict.fromkeys([shape, PassShape(image_hw)]) if name == "reference" else [PassShape(image_hw)]:
            package = Package(name, f"{image_hw[1]} x {image_hw[0]}")
            work.append((package, partial(passes.open, name, one, make=True)))
    for number, (package, run) in enumerate(work):
        report(package.name, number, len(work))
        run()
    report("", len(work), len(work))
    return [package for package, _ in work]


def compile_model(
    model: str,
    sizes: Sequence[tuple[int, int]],
    config: DirectDragConfig,
    *,
    edits: int = 1,
    pairs: Sequence[int] = (1,),
    readout: Path | None = None,
    lora: Path | None = None,
    vae: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    cache: Path | None = None,
    progress: bool | Reporter | None = None,
) -> list[Package]:
    """Load a model and compile all that edits at some working sizes (rows, columns) lack; by default the model's own.

    cache: instead of the user's cache folder. The rest: options of `Engine.load`. Raises what that and
    `compile_packages` raise, and what `progress` raises.
    """
    loaded = load_model(model, device=device, dtype=dtype, readout=readout, lora=lora, vae=vae)
    passes = CompiledPasses(loaded, store=ArtefactStore(cache or cache_dir()))
    made: list[Package] = []
    with reporter(progress, {"build": 1}) as report:

        def tell(_: str, done: int, total: int) -> None:
            report(Progress("build", done, total))

        for size in sizes or [(loaded.size, loaded.size)]:
            made += compile_packages(passes, size, config, edits=edits, pairs=pairs, report=tell)
    return made
