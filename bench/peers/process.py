"""A peer's process: does one adapter's edits when told to and answers with what they cost, in JSON.

Run by path, `python process.py ADAPTER.py JOB.json`, in the peer's own Python; imports torch and NumPy, nothing of this
package. Orders come one a line on stdin, answers one a line on what was stdout; whatever the peer prints goes to
stderr.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import platform
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "ddengine")
OTHER = "other"  # the stage of what no stage was named for


def load_file(path: Path, name: str) -> ModuleType:
    """A module from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class Memory:
    """The most memory of an edit: allocated on the CUDA device, resident in the process on a CPU."""

    def __init__(self, host: Any) -> None:
        self.cuda = host.device.type == "cuda"
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(host.device)
        else:
            with contextlib.suppress(OSError):  # only Linux can start anew; elsewhere it is the process's peak so far
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self, host: Any) -> int | None:
        if self.cuda:
            import torch

            return int(torch.cuda.max_memory_allocated(host.device))
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return None


def start(host: Any, adapter: ModuleType) -> dict[str, Any]:
    """Import the peer; on a CPU with CUDA redirected."""
    import torch

    torch.set_num_threads(host.job["threads"])
    torch.backends.cudnn.benchmark = False
    if host.device.type == "cpu" and host.checkout is not None:
        for name in getattr(adapter, "FIRST", ()):
            importlib.import_module(name)
        host.redirected = host.sibling("redirect").apply()
        host.sibling("redirect").libraries()
    if host.checkout is not None:
        sys.path.insert(0, str(host.checkout))
    adapter.prepare(host)
    return {
        "name": adapter.NAME,
        "needs": adapter.NEEDS,
        "published": adapter.PUBLISHED,
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "clock": host.clock,
        "can_train_lora": hasattr(adapter, "train_lora"),
        "can_edit_next": hasattr(adapter, "edit_next"),
        "loaded": dict(host.seconds),
    }


def work(host: Any, adapter: ModuleType, order: dict[str, Any]) -> dict[str, Any]:
    """One edit (or training) and what it cost."""
    import numpy as np
    from PIL import Image

    function = {"edit": "edit", "next": "edit_next", "lora": "train_lora"}[order["do"]]
    host.seconds.clear()
    host.counts.clear()
    gc.collect()
    memory = Memory(host)
    with host.stage(OTHER):
        made = getattr(adapter, function)(host)
    facts: dict[str, Any] = {
        "stages": dict(host.seconds),
        "seconds": sum(host.seconds.values()),
        "counts": dict(host.counts),
        "memory_bytes": memory.peak(host),
    }
    if order.get("save"):
        Image.fromarray(np.asarray(made)).save(order["save"])
    del made
    gc.collect()
    if host.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()  # the next system's turn
    return facts


def main() -> None:
    adapter_file, job_file = map(Path, sys.argv[1:3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the peer's own words belong to the log
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != HERE]

    def answer(facts: dict[str, Any]) -> None:
        sys.stdout.flush()
        answers.write(json.dumps(facts, default=str) + "\n")
        answers.flush()

    host: Any = None
    adapter: ModuleType | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if host is None or adapter is None:
                adapter = load_file(adapter_file, "_peer_adapter")
                job = json.loads(job_file.read_text(encoding="utf-8"))
                host = load_file(HERE / "host.py", "_peers_host").Host(job, load_file)
                facts = start(host, adapter)
            else:
                facts = work(host, adapter, order)
            facts |= {
                "notes": host.notes,
                "stand_ins": host.missing,
                "redirected": host.redirected,
                "settings": host.settings,
            }
        except BaseException as error:  # a peer may raise what it likes, SystemExit too; the run goes on without it
            traceback.print_exc()
            words = str(error).strip().splitlines()
            answer({"error": f"{type(error).__name__}: {words[-1] if words else ''}".strip(": ")})
            return
        answer(facts)


if __name__ == "__main__":
    main()
