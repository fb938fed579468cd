"""Files on disk: those to download, and uploads; in a folder of the editor's own that is gone when it closes."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from ddengine.artifacts import save_picture
from ddengine.errors import InputError
from ddengine.ui.session import Done, Session


@dataclass(frozen=True)
class Paths:
    """The files of one edit: the edited picture, the recipe, and the picture before as a lossless copy.

    shown: before and after at the size that the page shows.
    """

    result: Path
    recipe: Path
    base: Path
    shown: tuple[Path, Path]


class Files:
    """The last edit's files of every session, below `folder`, where no name can be guessed."""

    def __init__(self, folder: Path, holds: Callable[[Session], bool]) -> None:
        """holds: whether a session is open still; of one that is not, nothing is kept."""
        self.folder, self._holds = folder, holds
        self._lock = threading.Lock()
        self._held: dict[str, Path] = {}

    def write(self, session: Session, done: Done) -> Paths:
        """Write the files of a session's last edit; those of the edit before go.

        InputError, and no file, for a closed page and for what is not its last edit any more.
        """
        place = self.folder / secrets.token_hex(16)
        (place / "shown").mkdir(parents=True)
        try:
            paths = self._written(place, done)
            with self._lock:
                # Looked at with the lock: who leaves, or opens a picture, after this look finds the files to drop.
                if not self._holds(session) or session.last is not done:
                    raise InputError("the page was closed, or another picture opened, as its edit ended; run it again")
                old = self._held.pop(session.key, None)
                self._held[session.key] = place
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return paths

    def _written(self, place: Path, done: Done) -> Paths:
        stem, before = PurePath(done.edited.name).stem, PurePath(done.base.name).stem
        shown = place / "shown" / "before.png", place / "shown" / "after.png"
        paths = Paths(place / f"{stem}.png", place / f"{stem}.json", place / f"{before}.png", shown)
        save_picture(done.edited.image, paths.result)
        save_picture(done.base.image, paths.base)
        for picture, path in zip((done.base, done.edited), shown, strict=True):
            save_picture(picture.shown, path)
        done.recipe.save(paths.recipe)
        return paths

    def drop(self, key: str) -> None:
        """Remove a session's files."""
        with self._lock:
            old = self._held.pop(key, None)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path, seconds: float) -> None:
    """Remove all files below a folder that nobody has written to for so long, then the folders that are empty."""
    latest = time.time() - seconds
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        with contextlib.suppress(OSError):  # gone already, a folder that is not empty, or not ours to remove
            if path.lstat().st_mtime < latest:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
