"""What took long to make (engines, exported graphs, compiled packages): made once, kept whole, read only if sound.

`<root>/<kind>/<key>/` holds an artefact's files and `manifest.json`: the facts it was made from (the key is their
digest), what its maker says about it, and the size and SHA-256 of every file. Engines are programs, so the folders
are the user's alone, and nothing is handed out that another user could have changed or whose bytes are not those
that were written.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from ddengine import __version__
from ddengine.artifacts import sha256_bytes, sha256_file
from ddengine.errors import EngineMismatch, InputError

log = logging.getLogger(__name__)

# Engines; the ONNX graphs they are made of; ahead-of-time compiled packages; and two things that only save time when
# an engine is built (how fast each kernel ran) or first run (the kernels compiled for it on this GPU).
KINDS = ("engines", "onnx", "packages", "timing", "kernels")
MANIFEST = "manifest.json"

_FORMAT = 1
_POLL_SECONDS = 0.2
_REMEDY = "run `ddengine cache clear`, then make it again (`ddengine build` for engines)"

Facts = Mapping[str, Any]  # plain JSON values


@dataclass(frozen=True)
class Artefact:
    """One sound entry of the store; `facts` is what it was made from, `about` what its maker recorded."""

    kind: str
    key: str
    folder: Path
    facts: dict[str, Any]
    about: dict[str, Any]
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(record["bytes"]) for record in self.files.values())

    def read(self, name: str) -> bytes:
        """A file's bytes, which are those whose digest was checked; `EngineMismatch` if they are not those written."""
        path = self._known(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
            with os.fdopen(descriptor, "rb") as file:
                _check_private(path, os.fstat(file.fileno()))
                data = file.read()
        except OSError as error:
            raise _refused(path, error.strerror or str(error)) from error
        self._check(name, len(data), sha256_bytes(data))
        return data

    def path(self, name: str) -> Path:
        """A file's checked path, for libraries that open files themselves; `EngineMismatch` as `read`."""
        path = self._known(name)
        try:
            _check_private(path, path.lstat())
            self._check(name, path.stat().st_size, sha256_file(path))
        except OSError as error:
            raise _refused(path, error.strerror or str(error)) from error
        return path

    def _known(self, name: str) -> Path:
        if name not in self.files:
            raise _refused(self.folder, f"it has no file {name!r}, only {', '.join(sorted(self.files))}")
        return self.folder / name

    def _check(self, name: str, size: int, digest: str) -> None:
        record = self.files[name]
        if size != record["bytes"]:
            raise _refused(self.folder / name, f"it has {size} bytes, {record['bytes']} were written")
        if digest != record["sha256"]:
            raise _refused(self.folder / name, "its content is not what was written")


@dataclass(frozen=True)
class Entry:
    """A line of the store's listing: `problem` says why an entry cannot be used, and is empty for a sound one."""

    kind: str
    key: str
    folder: Path
    bytes: int
    facts: dict[str, Any]
    about: dict[str, Any]
    problem: str


@dataclass(frozen=True)
class Cleared:
    """What `clear` did: entries and bytes removed, and entries left because they are being made just now."""

    entries: int
    bytes: int
    busy: int


def key_of(facts: Facts) -> str:
    """The key of some facts: 32 hexadecimal digits of the SHA-256 of their canonical JSON."""
    return sha256_bytes(_canonical(facts))[:32]


class ArtefactStore:
    """Artefacts under one folder; any number of threads and processes may use it at once."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """`root`: the user's cache folder; it is made when something is first kept."""
        self.root = Path(root)

    def get(self, kind: str, facts: Facts) -> Artefact | None:
        """The artefact made from these facts, None if there is none; `EngineMismatch` if what is there is not sound.

        The manifest is checked here, a file's content when it is read.
        """
        key = key_of(facts)
        folder = self._home(kind) / key
        if not os.path.lexists(folder):
            return None
        return _open(folder, kind, key)

    def make(
        self,
        kind: str,
        facts: Facts,
        write: Callable[[Path], Mapping[str, Any] | None],
        *,
        replace: bool = False,
        waiting: Callable[[], object] | None = None,
    ) -> Artefact:
        """The artefact made from these facts, made now by `write` if it is not there or not sound (or `replace`).

        `write(folder)` puts the files into an empty folder and returns what is worth recording. The folder gets its
        name once it is complete and on the disk, so whatever stops the making leaves the store as it was. Two makers
        of the same artefact make it once: the second one waits, calling `waiting` several times a second (raise
        `Cancelled` there to give up). Raises InputError where the folder or the disk does not take it.
        """
        key = key_of(facts)
        if not replace and (there := self._sound(kind, key)):
            return there
        home = self._home(kind)
        with _explained(home):
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(home, home.lstat())
            with self._lock(kind, key, waiting):
                if not replace and (there := self._sound(kind, key)):
                    return there
                self._sweep(kind, key)
                making = home / f".{key}.{secrets.token_hex(4)}.making"
                making.mkdir(mode=0o700)
                try:
                    about = write(making) or {}
                    _seal(making, kind, key, facts, about)
                    _take_place(making, home / key)
                except BaseException:
                    shutil.rmtree(making, ignore_errors=True)
                    raise
        return _open(home / key, kind, key)

    def entries(self) -> list[Entry]:
        """Every entry, sound or not, in a settled order; for listings."""
        found = []
        for kind in KINDS:
            for folder in _folders(self.root / kind):
                if folder.name.startswith("."):
                    continue
                problem, facts, about = "", {}, {}
                try:
                    artefact = _open(folder, kind, folder.name)
                    facts, about = artefact.facts, artefact.about
                except EngineMismatch as error:
                    problem = str(error)
                found.append(Entry(kind, folder.name, folder, _usage(folder), facts, about, problem))
        return found

    def clear(self, kinds: tuple[str, ...] = KINDS) -> Cleared:
        """Remove every entry of these kinds, and what killed makers left; never one that is being made just now."""
        entries = size = 0
        busy = set()
        for kind in kinds:
            for folder in _folders(self._home(kind)):
                key = folder.name.lstrip(".").partition(".")[0]
                try:
                    with _explained(folder), self._lock(kind, key, at_once=True):
                        used = _usage(folder)
                        shutil.rmtree(folder)
                except Timeout:
                    busy.add((kind, key))
                    continue
                entries += not folder.name.startswith(".")
                size += used
        return Cleared(entries, size, len(busy))

    def _home(self, kind: str) -> Path:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {KINDS}")
        return self.root / kind

    def _sound(self, kind: str, key: str) -> Artefact | None:
        """What is there if it can be used; what cannot is said in the log and made again."""
        folder = self._home(kind) / key
        if not os.path.lexists(folder):
            return None
        try:
            artefact = _open(folder, kind, key)
            for name in artefact.files:
                artefact.path(name)
        except EngineMismatch as error:
            log.warning("%s; it is made again", error)
            return None
        return artefact

    @contextmanager
    def _lock(
        self, kind: str, key: str, waiting: Callable[[], object] | None = None, at_once: bool = False
    ) -> Iterator[None]:
        # The file stays: were it removed, a process that waits on it and one that comes later would both go ahead.
        lock = FileLock(self._home(kind) / f".{key}.lock", mode=0o600)
        said = False
        while True:
            try:
                lock.acquire(timeout=0 if at_once or not said else _POLL_SECONDS)
                break
            except Timeout:
                if at_once:
                    raise
                if not said:
                    log.info("another process makes %s/%s; waiting for it", kind, key)
                said = True
                if waiting is not None:
                    waiting()
        try:
            yield
        finally:
            lock.release()

    def _sweep(self, kind: str, key: str) -> None:
        """Remove what killed makers left; `key` is locked by the caller."""
        for folder in _folders(self._home(kind)):
            if not folder.name.startswith("."):
                continue
            other = folder.name[1:].partition(".")[0]
            if other == key:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                with self._lock(kind, other, at_once=True):
                    shutil.rmtree(folder, ignore_errors=True)
            except Timeout:
                pass  # its maker lives


def _canonical(value: Facts) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _seal(folder: Path, kind: str, key: str, facts: Facts, about: Facts) -> None:
    """Take rights from others, push everything to the disk and write the manifest."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
            continue
        path.chmod(0o600)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        _flush(path)
    manifest: dict[str, Any] = {"format": _FORMAT, "ddengine": __version__, "kind": kind, "key": key}
    manifest |= {"facts": dict(facts), "about": dict(about), "files": files}
    manifest["digest"] = sha256_bytes(_canonical(manifest))
    with open(os.open(folder / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
    _flush(folder / MANIFEST)
    _flush(folder)


def _take_place(making: Path, final: Path) -> None:
    if os.path.lexists(final):
        old = making.with_suffix(".old")
        final.rename(old)
        making.rename(final)
        old.unlink() if old.is_symlink() or not old.is_dir() else shutil.rmtree(old, ignore_errors=True)
    else:
        making.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(folder: Path, kind: str, key: str) -> Artefact:
    """Read and check a manifest, and that its files are there with their sizes."""
    path = folder / MANIFEST
    try:
        for part in (folder, path):
            _check_private(part, part.lstat())
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _refused(path, f"it is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise _refused(path, f"it is not a manifest of format {_FORMAT}")
    said = manifest.pop("digest", None)
    if said != sha256_bytes(_canonical(manifest)):
        raise _refused(path, "its own digest does not fit")
    if (manifest["kind"], manifest["key"]) != (kind, key) or key_of(manifest["facts"]) != key:
        raise _refused(folder, f"it was made as {manifest['kind']}/{manifest['key']}")
    for name, record in manifest["files"].items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise _refused(path, f"it names a file outside its folder, {name!r}")
        try:
            status = (folder / name).lstat()
        except OSError as error:
            raise _refused(folder / name, error.strerror or str(error)) from error
        _check_private(folder / name, status)
        if status.st_size != record["bytes"]:
            raise _refused(folder / name, f"it has {status.st_size} bytes, {record['bytes']} were written")
    return Artefact(kind, key, folder, manifest["facts"], manifest["about"], manifest["files"])


def _check_private(path: Path, status: os.stat_result) -> None:
    """What another user may have changed is not used: it would run with this user's rights."""
    if stat.S_ISLNK(status.st_mode):
        raise _refused(path, "it is a link")
    if not hasattr(os, "getuid"):
        return
    if status.st_uid not in (os.getuid(), 0):
        raise _refused(path, f"it belongs to user {status.st_uid}, this process runs as {os.getuid()}")
    if status.st_mode & 0o022:
        raise _refused(path, f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})")


def _refused(path: Path, why: str) -> EngineMismatch:
    return EngineMismatch(f"{path} is not used: {why}; {_REMEDY}")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:  # an OSError too
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot keep files in {folder}: {reason}; make room there, or name another folder with DDENGINE_CACHE"
        ) from error


def _folders(home: Path) -> list[Path]:
    try:
        return sorted(path for path in home.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def _usage(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
