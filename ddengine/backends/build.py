"""Programs made ahead of time: what `ddengine build` does, and the command that an edit names where one is missing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.backends.eager import EagerPasses
from ddengine.backends.engines import PARTS, Programs, Reporter, Wanted, part, wanted_passes
from ddengine.backends.graphs import PassShape
from ddengine.errors import InputError
from ddengine.models.cache import cache_dir
from ddengine.models.load import Model, load_model
from ddengine.progress import Progress, reporter
from ddengine.store import Artefact, ArtefactStore

if TYPE_CHECKING:
    from ddengine.models.network import Network

BUILDABLE = ("onnxruntime", "tensorrt")


@dataclass(frozen=True)
class Built:
    """A program in the store; `made`: now, or it was there. `about`: its maker's findings, plain values."""

    name: str
    shape: PassShape
    made: bool
    folder: Path
    bytes: int
    about: dict[str, Any]


def open_programs(
    backend: str, store: ArtefactStore, model: Model, network: Network, *, building: bool = False
) -> Programs:
    """The programs of a library for a model; BackendUnavailable where it cannot compute them.

    building: they shall only be built, which needs less than running them does.
    """
    if backend == "onnxruntime":
        from ddengine.backends.ort import OnnxRuntimePrograms

        return OnnxRuntimePrograms(store, model, network)
    if backend == "tensorrt":
        from ddengine.backends.tensorrt import programs

        return programs.open_programs(store, model, network, building=building)
    raise InputError(f"there is nothing to build for backend {backend!r}; use one of {', '.join(BUILDABLE)}")


def build_programs(
    model: Model,
    backend: str,
    wanted: Sequence[Wanted],
    store: ArtefactStore,
    *,
    progress: Reporter | None = None,
) -> list[Built]:
    """Build what is wanted of a model for a backend and is not in the store yet, in order.

    progress: told a `Progress` of stage "build"; what it raises stops the build, and what is finished by then stays.
    Raises InputError, ModelError and BackendUnavailable as the backend's `build`.
    """
    programs = open_programs(backend, store, model, EagerPasses(model).network, building=True)
    there = {(entry.kind, entry.key) for entry in store.entries() if not entry.problem}
    built = []
    for number, (name, shape) in enumerate(wanted):
        report = part(progress, number, len(wanted))
        made: Artefact = programs.build(name, shape, report)
        report(Progress("build", 1, 1))
        fresh = (made.kind, made.key) not in there
        built.append(Built(name, shape, fresh, made.folder, made.size, made.about))
    return built


def build_model(
    model: str,
    backend: str,
    sizes: Sequence[tuple[int, int]] = (),
    *,
    readout: Path | None = None,
    lora: Path | None = None,
    vae: Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    batch: int = 1,
    prompt: bool = False,
    readout_grid: int | None = None,
    cache: Path | None = None,
    progress: bool | Reporter | None = None,
) -> list[Built]:
    """Load a model and build all passes that edits at some working sizes (rows, columns) run; what is there stays.

    sizes: the model's own, square, where none is given. precision: "auto" is what edits with this backend use. cache:
    instead of the user's cache folder. The rest: options of `Engine.load` and fields of `PassShape`. Raises InputError,
    ModelError, BackendUnavailable and what `progress` raises.
    """
    if precision == "auto" and backend == "tensorrt":
        precision = "float16"
    loaded = load_model(model, device=device, dtype=precision, readout=readout, lora=lora, vae=vae)
    wanted: list[Wanted] = []
    for size in sizes or [(loaded.size, loaded.size)]:
        grid = (readout_grid, readout_grid) if readout_grid else PassShape(size).latent_hw
        tokens = loaded.empty_context.shape[1] if prompt else None
        wanted += wanted_passes(
            size, readout_hw=None if loaded.readout is None else grid, prompt_tokens=tokens, batch=batch
        )
    with reporter(progress, {"build": PARTS * len(wanted)}) as report:
        return build_programs(loaded, backend, wanted, ArtefactStore(cache or cache_dir()), progress=report)


def built_text(built: Sequence[Built], backend: str) -> str:
    """What was built and where it lies, for people."""
    lines = []
    for one in built:
        height, width = one.shape.image_hw
        grid = " with a readout map" if one.shape.readout_hw else ""
        state = "built" if one.made else "there"
        lines.append(f"{state}  {one.name + grid:<30}{width} x {height}  {one.bytes / 1e6:8.1f} MB  {one.folder}")
    return "\n".join([*lines, f"edits at these sizes can run with --backend {backend}"])


def build_command(model: Sequence[str], backend: str, shape: PassShape) -> str:
    """What to type so that programs for a shape are built; `model`: the words that name the model and its parts."""
    height, width = shape.image_hw
    words = ["ddengine", "build", *model, "--backend", backend]
    words += ["--size", str(width) if width == height else f"{width}x{height}"]
    words += ["--batch", str(shape.batch)] if shape.batch > 1 else []
    words += ["--prompt"] if shape.prompt_tokens is not None else []
    if shape.readout_hw not in (None, shape.latent_hw):
        assert shape.readout_hw is not None
        words += ["--readout-grid", str(shape.readout_hw[0])]
    return shlex.join(words)
