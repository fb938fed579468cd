"""What a peer's adapter is handed: the order, the clock, and the means to time, count and replace.

Runs in the peer's Python, loaded by path (bench/peers/process.py); imports torch and NumPy, nothing of this package.
This is the one clock of the comparison: this engine's edits are timed by it too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent


class Host:
    """An edit's order and its measures. `seconds` by stage and `counts` are of the edit that runs.

    load_file: a module from its path, under a name; the process has loaded this very file by it.
    """

    def __init__(self, job: dict[str, Any], load_file: Callable[[Path, str], ModuleType]) -> None:
        import torch

        self.job, self._load_file = job, load_file
        self.checkout = Path(job["checkout"]) if job["checkout"] else None
        self.device = torch.device(job["device"])
        self.alone = self.device.type == "cpu" and job["threads"] == 1
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.missing: list[str] = []
        self.redirected: list[str] = []
        self.settings: dict[str, Any] = {}
        self._stack: list[str] = []
        self._since = 0.0

    @property
    def clock(self) -> str:
        return "the process's own time" if self.alone else "host"

    def now(self) -> float:
        """Seconds; on CUDA after the device has finished, on a CPU with one thread those the process computed."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.process_time() if self.alone else time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside to a stage, and to no stage around it."""
        self._turn(name)
        try:
            yield
        finally:
            self._turn(None)

    def _turn(self, entered: str | None) -> None:
        at = self.now()
        if self._stack:
            self.seconds[self._stack[-1]] += at - self._since
        if entered is None:
            self._stack.pop()
        else:
            self._stack.append(entered)
        self._since = at

    def time(self, owner: Any, name: str, stage: str) -> None:
        """Let a function, method or class method of `owner` count to a stage from now on."""

        def timed(called: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            with self.stage(stage):
                return called(*arguments, **options)

        _wrap(owner, name, timed)

    def count(self, owner: Any, name: str, what: str) -> None:
        """Count the calls of a function or method of `owner` while an edit runs."""

        def counted(called: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            self.counts[what] += 1
            return called(*arguments, **options)

        _wrap(owner, name, counted)

    def count_passes(self, *kinds: type) -> None:
        """Count forwards of UNet classes (each picture of a batch by itself) and all backwards."""
        import torch

        def counted(called: Callable[..., Any], module: Any, sample: Any, *arguments: Any, **options: Any) -> Any:
            self.counts["forwards"] += 1
            self.counts["pictures"] += int(sample.shape[0])
            return called(module, sample, *arguments, **options)

        for kind in kinds:
            _wrap(kind, "__call__", counted)
        self.count(torch.Tensor, "backward", "backwards")

    def stand_in(self, *names: str, always: bool = False) -> None:
        """Give imports that are missing (bench/peers/stand_ins.py), and say so in the report."""
        for name in names:
            if self.sibling("stand_ins").install(name, always=always):
                self.missing.append(name)

    def try_import(self, name: str) -> None:
        """Import a module that an edit does not use; where this Python cannot, put a stand-in and say so."""
        try:
            importlib.import_module(name)
        except ImportError:
            self.sibling("stand_ins").replace(name)
            self.missing.append(name)

    def note(self, text: str) -> None:
        """Something that a reader of the numbers should know."""
        if text not in self.notes:
            self.notes.append(text)

    def sibling(self, name: str) -> ModuleType:
        """A module beside this file."""
        full = f"_peers_{name}"
        return sys.modules[full] if full in sys.modules else self._load_file(HERE / f"{name}.py", full)

    def load(self, path: str, name: str) -> ModuleType:
        """A module of the checkout by its file."""
        assert self.checkout is not None
        return self._load_file(self.checkout / path, name)

    def picture(self) -> Any:
        """The picture, uint8 [H, W, 3]."""
        return _read(self.job["picture"], "RGB")

    def mask(self) -> Any:
        """Where the picture may change, uint8 [H, W], 0 or 255."""
        self.note(self.job["mask_from"])
        return _read(self.job["mask"], "L")

    def points(self) -> list[list[int]]:
        """Handle, target, handle, target ... as whole (x, y) pixels."""
        return [[round(x), round(y)] for drag in self.job["drags"] for x, y in (drag[:2], drag[2:])]

    def updates(self, times: int, tracks: int, group: int) -> tuple[int, int, int]:
        """Times with drags, trackings at each, updates between trackings: the published ones, or as ordered."""
        wanted = self.job["updates"]
        return (times, tracks, group) if wanted is None else tuple(wanted)

    def publish(self, **settings: Any) -> dict[str, Any]:
        """The settings of an edit, kept for the report."""
        self.settings = settings
        return settings


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    called = getattr(owner, name)

    @functools.wraps(called)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        return around(called, *arguments, **options)

    bound = inspect.isclass(owner) and inspect.ismethod(called)
    setattr(owner, name, staticmethod(wrapper) if bound else wrapper)


def _read(path: str, mode: str) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        return np.array(picture.convert(mode))
