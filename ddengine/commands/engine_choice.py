"""The engine that a command line asks for: the options of model and place in one record, and the way to load it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddengine.engine import Engine


@dataclass(frozen=True)
class EngineChoice:
    """What `weights_options`, `size_option`, `engine_options` and `build_option` were given."""

    model: str
    readout: Path | str | None
    lora: Path | str | None
    vae: Path | str | None
    working_size: int | None
    backend: str
    device: str
    dtype: str
    build: bool

    def load(self) -> Engine:
        """The engine, loaded."""
        from ddengine.engine import Engine

        return Engine.load(build=self.build, **self.named())

    def named(self) -> dict[str, Any]:
        """All but `build` as edits in files name it, which is as `Engine.load` does; paths as texts."""
        parts = {name: getattr(self, name) for name in ("readout", "lora", "vae")}
        return {
            "model": self.model,
            **{name: None if part is None else str(part) for name, part in parts.items()},
            "size": self.working_size,
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
        }


def choosing_engine(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command those options as one parameter, `choice`."""

    @functools.wraps(function)
    def command(**options: Any) -> Any:
        choice = EngineChoice(**{item.name: options.pop(item.name) for item in fields(EngineChoice)})
        return function(choice=choice, **options)

    return command
