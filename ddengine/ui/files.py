"""Files to download: in a folder of the editor's own that is gone when it closes."""

from __future__ import annotations

import secrets
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path, PurePath

from ddengine.artifacts import save_picture
from ddengine.ui.session import Done


@dataclass(frozen=True)
class Paths:
    """The files of one edit: the edited picture, the recipe, and the picture before as a lossless copy."""

    result: Path
    recipe: Path
    base: Path


class Files:
    """The last edit's files of every session, below `folder`, where no name can be guessed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._held: dict[str, Path] = {}

    def write(self, key: str, done: Done) -> Paths:
        """Write an edit's files; those of the session's edit before go."""
        place = self.folder / secrets.token_hex(16)
        place.mkdir(parents=True)
        stem = PurePath(done.edited.name).stem
        before = PurePath(done.base.name).stem
        paths = Paths(place / f"{stem}.png", place / f"{stem}.json", place / f"{before}.png")
        save_picture(done.edited.image, paths.result)
        save_picture(done.base.image, paths.base)
        done.recipe.save(paths.recipe)
        with self._lock:
            old = self._held.pop(key, None)
            self._held[key] = place
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return paths

    def drop(self, key: str) -> None:
        """Remove a session's files."""
        with self._lock:
            old = self._held.pop(key, None)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
