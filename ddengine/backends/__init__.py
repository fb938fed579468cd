"""Backends: each runs the same named passes (`passes.Passes`); a backend is imported on use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ddengine.errors import BackendUnavailable, InputError

if TYPE_CHECKING:
    import torch

    from ddengine.backends.engines import Reporter, Wanted
    from ddengine.backends.passes import Passes
    from ddengine.models.load import Model
    from ddengine.store import ArtefactStore

NAMES = ("eager", "compile", "onnxruntime", "tensorrt")  # the fastest last


@dataclass(frozen=True)
class Backend:
    """A backend's name, whether it works here, and why (or why not, with what to do)."""

    name: str
    available: bool
    reason: str


def available_backends() -> tuple[Backend, ...]:
    """Every known backend, the fastest last, with what stands in the way of those that cannot run."""
    return (Backend("eager", True, "plain PyTorch, always available"), _compile(), _onnxruntime(), _tensorrt())


def select_backend(name: str = "auto") -> Backend:
    """The backend to run for a user's choice; its `reason` says why.

    "auto" stays "auto": what it takes depends on the model and on what is built. Errors: `InputError` for an unknown
    name, `BackendUnavailable` if it cannot run here.
    """
    if name == "auto":
        return Backend("auto", True, "for each stage the fastest that is built")
    if name not in NAMES:
        raise InputError(f"backend {name!r} is unknown; use one of auto, {', '.join(NAMES)}")
    known = {backend.name: backend for backend in available_backends()}
    if not known[name].available:
        raise BackendUnavailable(f"backend {name!r} cannot run: {known[name].reason}")
    return known[name]


def auto_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """What "auto" takes for a model's gradient-free passes where it is built (docs/backends.md has the reasons)."""
    faster = None
    if device.type == "cuda":
        faster = _tensorrt()
    elif device.type == "cpu" and str(dtype) == "torch.float32":
        faster = _onnxruntime()
    if faster is None:
        dtype_name = str(dtype).removeprefix("torch.")
        return Backend("eager", True, f"auto: nothing faster computes {dtype_name} on {device.type}")
    if not faster.available:
        return Backend("eager", True, f"auto: {faster.reason}")
    return Backend(faster.name, True, "auto: built for this size")


def create_passes(
    backend: str,
    model: Model,
    prompt: str = "",
    *,
    store: ArtefactStore | None = None,
    building: bool = False,
    remedy: Callable[[str, Any], str] | None = None,
) -> Passes:
    """A backend's passes over a loaded model and a prompt (the empty one needs no text encoder).

    store: where what is built lies, by default the user's cache. building: build what is missing when `make_ready` asks
    for it. remedy: what a user is to do where a backend has nothing for a shape. Raises BackendUnavailable where the
    backend cannot run this model.
    """
    select_backend(backend)
    from ddengine.backends.eager import EagerPasses, prompt_context

    context = prompt_context(model, prompt)
    chosen = auto_backend(model.device, model.dtype) if backend == "auto" else Backend(backend, True, "as asked")
    if backend == "eager":
        return EagerPasses(model, context)

    from ddengine.backends.compiled import CompiledPasses
    from ddengine.models.cache import cache_dir
    from ddengine.store import ArtefactStore

    store = store or ArtefactStore(cache_dir())
    if chosen.name == "compile":
        tell = partial(remedy, "compile") if remedy else None
        return CompiledPasses(model, context, store=store, building=building, remedy=tell)

    # What engines leave over, the drag above all, compiled packages do where they are built.
    base = CompiledPasses(model, context, store=store, strict=False)
    if chosen.name == "eager":
        return base

    from ddengine.backends.build import open_programs
    from ddengine.backends.engines import EnginePasses

    return EnginePasses(
        base,
        base.network,
        open_programs(chosen.name, store, model, base.network),
        prompted=bool(prompt),
        reason=chosen.reason,
        strict=backend != "auto",
        building=building,
        remedy=partial(remedy, chosen.name) if remedy else lambda _: "run `ddengine build`",
    )


def make_ready(passes: Passes, wanted: Iterable[Wanted], progress: Reporter | None = None) -> None:
    """Let a backend open, or build, all that an edit will run before it starts; most have nothing to do.

    Raises BackendUnavailable or EngineMismatch where the backend was named and has no program for a pass.
    """
    from ddengine.backends.engines import EnginePasses

    if isinstance(passes, EnginePasses):
        passes.ready(wanted, progress)


def what_ran(passes: Passes, backend: Backend, *, editing: bool) -> dict[str, str]:
    """What ran each stage of a preparation or of an edit since this was last asked, and why, in words."""
    from ddengine.backends.compiled import CompiledPasses
    from ddengine.backends.engines import EnginePasses

    stages = ("warp", "drag", "denoise", "decode") if editing else ("encode", "invert", "reference")
    if isinstance(passes, EnginePasses):
        return dict.fromkeys(stages, "eager (no network pass)") | passes.account(editing=editing)
    if isinstance(passes, CompiledPasses) and (backend.name == "compile" or passes.packaged):
        return dict.fromkeys(stages, passes.account())
    if backend.name == "auto":
        backend = auto_backend(passes.device, passes.dtype)
    return dict.fromkeys(stages, f"{backend.name} ({backend.reason})")


def _compile() -> Backend:
    return Backend("compile", True, "runs what `ddengine build --backend compile` has built")


def _onnxruntime() -> Backend:
    if importlib.util.find_spec("onnxruntime") is None:
        reason = "ONNX Runtime is not installed; pip install 'ddengine[onnx]', or use backend='eager'"
        return Backend("onnxruntime", False, reason)
    return Backend("onnxruntime", True, "runs what `ddengine build --backend onnxruntime` has built")


def _tensorrt() -> Backend:
    from ddengine.backends.gpu import find_gpu
    from ddengine.backends.tensorrt.flavour import load_flavour

    try:
        gpu = find_gpu()
        flavour = load_flavour("auto", gpu)
    except BackendUnavailable as error:
        remedy = "it takes an NVIDIA GPU and pip install 'ddengine[tensorrt]'; elsewhere use backend='eager' or 'auto'"
        return Backend("tensorrt", False, f"{error}; {remedy}")
    return Backend("tensorrt", True, f"{flavour.name} {flavour.version} runs what `ddengine build` has built")
