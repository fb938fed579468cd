"""Drag-based image editing: a picture and an arrow in, an edited picture out.

The public names, nothing else. They are imported on first use, so that `import ddengine` costs milliseconds
and torch and diffusers are paid for by the first edit.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddengine.config import DirectDragConfig
    from ddengine.drags import Drag
    from ddengine.engine import Engine, edit
    from ddengine.errors import (
        BackendUnavailable,
        Cancelled,
        DDEngineError,
        EngineMismatch,
        InputError,
        ModelError,
    )
    from ddengine.models.identity import LoRA
    from ddengine.progress import Progress
    from ddengine.result import EditResult
    from ddengine.source import Source

__version__ = "0.1.0"

__all__ = [
    "edit",
    "Engine",
    "Source",
    "LoRA",
    "EditResult",
    "Drag",
    "DirectDragConfig",
    "Progress",
    "DDEngineError",
    "InputError",
    "ModelError",
    "BackendUnavailable",
    "EngineMismatch",
    "Cancelled",
    "__version__",
]

_HOME = {
    "edit": "ddengine.engine",
    "Engine": "ddengine.engine",
    "Source": "ddengine.source",
    "LoRA": "ddengine.models.identity",
    "EditResult": "ddengine.result",
    "Drag": "ddengine.drags",
    "DirectDragConfig": "ddengine.config",
    "Progress": "ddengine.progress",
    "DDEngineError": "ddengine.errors",
    "InputError": "ddengine.errors",
    "ModelError": "ddengine.errors",
    "BackendUnavailable": "ddengine.errors",
    "EngineMismatch": "ddengine.errors",
    "Cancelled": "ddengine.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ddengine' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
