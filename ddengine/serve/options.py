"""How a service is started: which engine, which limits, where it listens. Records that pickle and turn into JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ddengine.errors import InputError
from ddengine.serve.keys import LOOPBACK, check_bind, check_keys
from ddengine.serve.limits import Limits

if TYPE_CHECKING:
    from ddengine.engine import Engine


@dataclass(frozen=True)
class EngineOptions:
    """What `Engine.load` takes; nothing is built while serving."""

    model: str = "embedded"
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    readout: str | None = None
    lora: str | None = None
    vae: str | None = None
    size: int | None = None

    def load(self) -> Engine:
        """The engine."""
        from ddengine.engine import Engine

        return Engine.load(
            self.model,
            backend=self.backend,
            device=self.device,
            dtype=self.dtype,
            readout=self.readout,
            lora=self.lora,
            vae=self.vae,
            size=self.size,
        )


@dataclass(frozen=True)
class ServeOptions:
    """A whole service. InputError for an address that others can reach where there is no key."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # further names that Host headers may have where there is no key

    def __post_init__(self) -> None:
        check_keys(self.keys)
        check_bind(self.host, self.keys)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that Host headers may have where there is no key."""
        return (*LOOPBACK, self.host.lower(), *(name.lower() for name in self.names))


def read_keys(path: Path | None, environment: str | None) -> tuple[str, ...]:
    """API keys of a file, one a line (# begins a comment), or of the environment; InputError."""
    if path is None:
        return (environment,) if environment else ()
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"--key-file {path} cannot be read: {error}; write one key a line into it") from error
    found = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not found:
        raise InputError(f"--key-file {path} holds no key; write one a line into it")
    return found
