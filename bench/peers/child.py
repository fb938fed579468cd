"""One system's process as its parent sees it: orders in, answers out, an end after too long a silence."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

PROCESS = Path(__file__).with_name("process.py")


class Failed(Exception):
    """A system that is out of the comparison, in one line."""


@dataclass
class Child:
    """A process that runs process.py with an adapter; close it when the run ends.

    own: it is this engine's, in this Python, and keeps the variables that this Python was started with.
    """

    python: Path
    adapter: Path
    job: Path
    log: Path
    threads: int
    own: bool = False
    _process: subprocess.Popen[str] | None = None
    _answers: queue.Queue[str | None] = field(default_factory=queue.Queue)
    _log: IO[str] | None = None

    def start(self) -> None:
        """Start the process in the folder of its job; Failed if there is no such Python."""
        self._log = open(self.log, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 - until `close`
        try:
            self._process = subprocess.Popen(
                [str(self.python), str(PROCESS), str(self.adapter), str(self.job)],
                cwd=self.job.parent, env=environment(self.threads, own=self.own), text=True, encoding="utf-8",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise Failed(f"{self.python.name} does not start: {error.strerror}") from error
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def ask(self, order: str, *, within: float, save: Path | None = None) -> dict[str, Any]:
        """What the process answers to an order; Failed if it says why not, ends, or is silent for `within` seconds."""
        process = self._process
        assert process is not None and process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: that shows below
            process.stdin.write(json.dumps({"do": order, "save": save and str(save)}) + "\n")
            process.stdin.flush()
        try:
            line = self._answers.get(timeout=within)
        except queue.Empty:
            self.close()
            raise Failed(f"no end of {order} within {within:g} s") from None
        if line is None:
            code = process.wait()
            raise Failed(f"the process ended with {code}: {plain(last_line(self.log))}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(plain(answer["error"]))
        return answer

    def close(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
        if self._log is not None:
            self._log.close()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed by `close`
            for line in process.stdout:
                self._answers.put(line)
        self._answers.put(None)


def environment(threads: int, *, own: bool) -> dict[str, str]:
    """The variables of a system's process: a peer's Python is not to find what this one was pointed to."""
    kept = {name: value for name, value in os.environ.items() if own or not name.startswith("PYTHON")}
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")  # the weights are here
    # A checkout stays as it is: no bytecode beside it.
    return {**kept, **limits, **offline, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}


def last_line(log: Path) -> str:
    """The last line of a log that holds anything."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


_PATHS = re.compile(
    r"(?P<address>\b(?!file:)[A-Za-z][\w+.-]*://[^\s'\"]+)"  # stays whole: its slashes are no folders of this machine
    r"|(?:\bfile://)?(?<![\w.])/(?:[^/\s'\"]+/)+"
)


def plain(text: str) -> str:
    """A message with the folders of this machine cut out of its paths; addresses stay as they are."""
    return _PATHS.sub(lambda found: found["address"] or "", text)
