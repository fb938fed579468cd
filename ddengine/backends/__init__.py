"""Backends: each runs the same named passes (`passes.Passes`); a backend is imported on use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddengine.errors import BackendUnavailable, InputError

if TYPE_CHECKING:
    from ddengine.backends.passes import Passes
    from ddengine.models.load import Model


@dataclass(frozen=True)
class Backend:
    """A backend's name, whether it works here, and why (or why not, with what to do)."""

    name: str
    available: bool
    reason: str


_EAGER = Backend("eager", True, "plain PyTorch, always available")
_LATER = "this version of ddengine runs only backend='eager'; use 'eager' or 'auto'"


def available_backends() -> tuple[Backend, ...]:
    """Every known backend, the fastest last, with what stands in the way of those that cannot run."""
    return (_EAGER, *(Backend(name, False, _LATER) for name in ("compile", "onnxruntime", "tensorrt")))


def select_backend(name: str = "auto") -> Backend:
    """The backend to run for a user's choice; its `reason` says why.

    Only "auto" chooses. Errors: `InputError` for an unknown name, `BackendUnavailable` if it cannot run here.
    """
    known = {backend.name: backend for backend in available_backends()}
    if name == "auto":
        return Backend("eager", True, "auto: the only backend of this version")
    if name not in known:
        raise InputError(f"backend {name!r} is unknown; use one of auto, {', '.join(known)}")
    if not known[name].available:
        raise BackendUnavailable(f"backend {name!r} cannot run: {known[name].reason}")
    return known[name]


def create_passes(backend: str, model: Model, prompt: str = "") -> Passes:
    """A backend's passes over a loaded model and a prompt (the empty one needs no text encoder)."""
    select_backend(backend)
    from ddengine.backends.eager import EagerPasses, prompt_context

    return EagerPasses(model, prompt_context(model, prompt))
