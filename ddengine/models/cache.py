"""The user's cache folder, and digests of weight files remembered in it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from ddengine.artifacts import atomic_write, sha256_bytes, sha256_file

log = logging.getLogger(__name__)

_REMEMBER_ABOVE = 32 << 20  # bytes; smaller files hash in less than 0.1 s
_MAX_REMEMBERED = 256


def cache_dir() -> Path:
    """Where computed files are kept: `$DDENGINE_CACHE`, else `ddengine` in the user's cache folder."""
    explicit = os.environ.get("DDENGINE_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ddengine"


def write_to_cache(name: str, data: bytes) -> None:
    """Store bytes as `cache_dir()/name`; a read-only or full disk costs the next run time and is no error."""
    path = cache_dir() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except Exception as error:  # whatever the disk says, the edit can go on
        log.info("not cached: %s (%s)", path, error)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes in hex; for large files remembered by (path, size, modification time)."""
    stat = path.stat()
    if stat.st_size < _REMEMBER_ABOVE:
        return sha256_file(path)
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    known = _remembered()
    if key not in known:
        known[key] = sha256_file(path)
        newest = dict(list(known.items())[-_MAX_REMEMBERED:])
        write_to_cache("digests.json", json.dumps(newest).encode())
    return known[key]


def combined_digest(parts: Iterable[tuple[str, str]]) -> str:
    """One sha256 in hex over (role, digest) pairs; independent of their order and of where the files lie."""
    lines = sorted(f"{role}={digest}" for role, digest in parts)
    return sha256_bytes("\n".join(lines).encode())


def _remembered() -> dict[str, str]:
    try:
        known = json.loads((cache_dir() / "digests.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str) and len(value) == 64}
