"""What this installation has and can do: versions, devices, backends, the embedded model, the cache."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import ddengine
from ddengine.backends import available_backends
from ddengine.errors import ModelError
from ddengine.store import ArtefactStore, Entry

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "pillow",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def environment() -> dict[str, Any]:
    """Plain values ready for JSON; imports torch (seconds), loads no model, writes nothing."""
    return {
        "ddengine": ddengine.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "backends": {
            backend.name: {"works": backend.available, "why": backend.reason} for backend in available_backends()
        },
        "embedded_model": _embedded(),
        "cache": _cache(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"ddengine {facts['ddengine']}, Python {facts['python']}, {facts['platform']}", ""]
    lines += [f"  {name:<14}{version or 'missing'}" for name, version in facts["packages"].items()]
    lines += ["", "devices"]
    lines += [f"  {device['name']:<14}{device['what']}" for device in facts["devices"]]
    lines += ["", "backends"]
    lines += [
        f"  {name:<14}{'works' if state['works'] else 'not here'}: {state['why']}"
        for name, state in facts["backends"].items()
    ]
    model, cache = facts["embedded_model"], facts["cache"]
    lines += ["", f"embedded model  {model['folder'] or model['why']} ({model['bytes'] / 1e6:.1f} MB)"]
    lines += [f"cache           {cache['folder']} ({cache['files']} files, {cache['bytes'] / 1e6:.1f} MB)"]
    lines += [f"  {entry['kind']:<10}{entry['bytes'] / 1e6:9.1f} MB  {entry['what']}" for entry in cache["entries"]]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError as error:
        return [{"name": "none", "what": f"torch cannot be imported: {error}"}]
    found = [{"name": "cpu", "what": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"}]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        found.append(
            {
                "name": f"cuda:{index}",
                "what": f"{about.name}, {memory:.0f} GiB, sm_{about.major}{about.minor}",
            }
        )
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "what": "Apple GPU"})
    return found


def _embedded() -> dict[str, Any]:
    from ddengine.models.embedded import embedded_folder

    try:
        folder = embedded_folder()
    except ModelError as error:
        return {"folder": None, "bytes": 0, "why": str(error)}
    return {"folder": str(folder), "bytes": _usage(folder)[1], "why": ""}


def _cache() -> dict[str, Any]:
    from ddengine.models.cache import cache_dir

    folder = cache_dir()
    count, size = _usage(folder)
    entries = [
        {"kind": entry.kind, "key": entry.key, "bytes": entry.bytes, "problem": entry.problem, "what": _what(entry)}
        for entry in ArtefactStore(folder).entries()
    ]
    return {"folder": str(folder), "files": count, "bytes": size, "entries": entries}


def _what(entry: Entry) -> str:
    """An entry of the cache in a few words: of most kinds the pass, its picture's size and the model's digest."""
    if entry.problem:
        return entry.problem
    facts = entry.facts
    size = "{1} x {0}".format(*facts["image"]) if "image" in facts else ""
    name = facts.get("pass") or facts.get("function")
    readout = "with a readout map" if facts.get("readout") else ""
    words = (name, readout, size, facts.get("precision"), str(facts.get("weights", ""))[:12])
    return " ".join(str(word) for word in words if word) or entry.key


def _usage(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
