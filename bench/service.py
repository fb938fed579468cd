"""A service of our own to measure: `ddengine serve` in its own process on a free loopback port, and what it uses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ddengine.client import Client
from ddengine.errors import DDEngineError

START_S = 300.0  # Ray takes half a minute on an idle machine and minutes on a busy one


@dataclass
class Running:
    """A service that takes edits. started_s: seconds from its start to that."""

    process: subprocess.Popen[bytes]
    url: str
    started_s: float
    log: IO[bytes] = field(repr=False)

    def client(self, retries: int = 0) -> Client:
        """A client that by default tries nothing twice."""
        return Client(self.url, timeout=300, retries=retries)

    def processes(self) -> list[int]:
        """The service's process and all it has started."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and (words := _read(entry / "stat").rpartition(")")[2].split()):
                parents.setdefault(int(words[1]), []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:
            found += parents.get(pid, [])
        return found

    def workers(self) -> list[int]:
        """The processes that hold an engine: Ray names them after their deployment, else it is the service's own."""
        named = [
            pid for pid in self.processes() if "ServeReplica:ddengine:Engines" in _read(Path(f"/proc/{pid}/cmdline"))
        ]
        return named or [self.process.pid]

    def rss(self) -> int:
        """Bytes resident in the workers' processes."""
        return sum(_kilobytes(pid, "status", "VmRSS") for pid in self.workers())

    def pss(self) -> int:
        """Bytes of all its processes, shared ones counted in parts."""
        return sum(_kilobytes(pid, "smaps_rollup", "Pss") for pid in self.processes())

    def processor_s(self) -> float:
        """Seconds on the processor of all its processes so far."""
        ticks = 0
        for pid in self.processes():
            words = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12]) if words else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_S)

    def said(self) -> str:
        """Its log so far."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


@contextmanager
def running(*options: str, ray: bool = False) -> Iterator[Running]:
    """Start `ddengine serve` with options on a free port and wait until it takes edits; stopped with the block."""
    words = [sys.executable, "-m", "ddengine", "serve", "--port", "0", "--ray" if ray else "--no-ray", *options]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("DDENGINE_API_KEY", None)
    began = time.monotonic()
    with tempfile.TemporaryFile() as log, subprocess.Popen(words, stderr=log, stdout=log, env=environment) as process:
        found = Running(process, "", 0.0, log)
        try:
            while not (said := re.search(r"listening on (http://\S+)", found.said())):
                _check(found, began)
            found.url = said[1]
            with found.client() as client:
                while not client.ready():
                    _check(found, began)
            found.started_s = time.monotonic() - began
            yield found
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()


def _check(service: Running, began: float) -> None:
    if service.process.poll() is not None or time.monotonic() - began > START_S:
        raise DDEngineError(f"the service did not start; it said:\n{service.said()[-2000:]}")
    time.sleep(0.05)


def _kilobytes(pid: int, file: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(Path(f"/proc/{pid}/{file}")), re.M)
    return int(found[1]) * 1024 if found else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended meanwhile
        return ""
