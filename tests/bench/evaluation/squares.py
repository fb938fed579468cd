"""Work for pools that needs no engine, in a module of its own, since new processes import it by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ddengine.errors import ModelError


@dataclass(frozen=True)
class Squares:
    """Answers n and n * n; 7 ends the process half way. broken: it cannot be loaded."""

    broken: bool = False

    def open(self):
        if self.broken:
            raise ModelError("no weights; fetch them")
        return squares


@dataclass(frozen=True)
class Scarce:
    """As Squares, but only the first so many that are opened, told by marks in a folder, can be: others say or die."""

    folder: str
    opens: int
    dies: bool = False

    def open(self):
        for number in range(1000):
            try:
                (Path(self.folder) / str(number)).touch(exist_ok=False)
                break
            except FileExistsError:
                continue
        if number >= self.opens:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ModelError("no memory; close something")
        return squares


def squares(number: int) -> Iterator[int]:
    yield number
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    yield number * number
