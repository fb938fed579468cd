"""The folder of a run: what it was asked, every edit with its record, every judgement; whole files or none.

DIR/run.json                                      what decides every edit, and the rows
DIR/results/<row>/<sample>/dragged_image.png      below each row the published scripts' own layout of results
DIR/results/<row>/<sample>/edit.json              how the edit came about, and the key of all it depends on
DIR/results/<row>/<sample>/judgement.json         its figures, and the key of picture and judges
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddengine.artifacts import atomic_write, make_folder, sha256_bytes
from ddengine.errors import InputError

FORMAT = 1
RUN, RESULTS, PICTURE, EDIT, JUDGEMENT = "run.json", "results", "dragged_image.png", "edit.json", "judgement.json"


class RunFolder:
    """The results of one run, never of two: opened for a setup and rows, it refuses what another setup left."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    @contextmanager
    def opened(self, setup: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
        """Held alone until the block ends. setup: what decides every edit; rows: what decides each row's, by name.

        Rows may be added to a run, and samples; a row with another configuration, or another setup, is an InputError
        that names the first difference.
        """
        from filelock import FileLock, Timeout

        make_folder(self.path)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError) as error:
            raise InputError(f"{self.path} is in use by another run; wait for it, or name another with -o") from error
        try:
            self._claim(plain(setup), plain(rows))
            yield
        finally:
            lock.release()

    def _claim(self, setup: dict[str, Any], rows: dict[str, Any]) -> None:
        path = self.path / RUN
        known: dict[str, Any] = {"rows": {}}
        if path.exists():
            found = _read(path)
            if found is None or found.get("format") != FORMAT:
                raise InputError(f"{path} is no record of a run that can be continued; name another folder with -o")
            known = found
            self._same("", found.get("setup"), setup)
            for name in rows.keys() & known["rows"].keys():
                self._same(f"row {name}: ", known["rows"][name], rows[name])
        elif any(self.path.joinpath(RESULTS).glob("*")):
            raise InputError(f"{self.path} holds results but no {RUN}; name another folder with -o")
        facts = {"format": FORMAT, "setup": setup, "rows": {**known["rows"], **rows}}
        if facts != known:
            write_json(path, facts)

    def _same(self, where: str, there: Any, here: Any) -> None:
        for name in sorted({*_flat(there), *_flat(here)}):
            a, b = _flat(there).get(name), _flat(here).get(name)
            if a != b:
                raise InputError(
                    f"{self.path} holds results of another run ({where}{name} was {a!r} there and is {b!r} here); "
                    f"name another folder with -o"
                )

    def result(self, slug: str, name: str) -> Path:
        """Where an edit's picture and records lie."""
        return self.path / RESULTS / slug / name

    def edit(self, slug: str, name: str, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """The picture and facts of a finished edit under this very key; None where it has to be made."""
        place = self.result(slug, name)
        found = _read(place / EDIT)
        if found is None or found.get("key") != key:
            return None
        try:
            picture = (place / PICTURE).read_bytes()
        except OSError:
            return None
        return (picture, found["facts"]) if sha256_bytes(picture) == found.get("picture") else None

    def keep_edit(self, slug: str, name: str, key: str, picture: bytes, facts: Mapping[str, Any]) -> None:
        """Write an edit, the record last: with it the edit is finished."""
        place = make_folder(self.result(slug, name))
        (place / EDIT).unlink(missing_ok=True)  # of an older one: it must not vouch for the new picture
        atomic_write(place / PICTURE, picture)
        write_json(place / EDIT, {"key": key, "picture": sha256_bytes(picture), "facts": facts})

    def judgement(self, slug: str, name: str, key: str) -> dict[str, Any] | None:
        """The facts of a judgement under this very key."""
        found = _read(self.result(slug, name) / JUDGEMENT)
        return found["facts"] if found is not None and found.get("key") == key else None

    def keep_judgement(self, slug: str, name: str, key: str, facts: Mapping[str, Any]) -> None:
        write_json(make_folder(self.result(slug, name)) / JUDGEMENT, {"key": key, "facts": facts})


def key_of(*parts: Any) -> str:
    """sha256 of plain values."""
    return sha256_bytes(json.dumps(plain(parts), sort_keys=True).encode())


def plain(facts: Any) -> Any:
    """What JSON makes of facts: tuples lists, keys text."""
    return json.loads(json.dumps(facts))


def write_json(path: Path, facts: Any) -> None:
    atomic_write(path, (json.dumps(facts, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or none that can be read: then the work is done again."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _flat(facts: Any, at: str = "") -> dict[str, Any]:
    """Nested facts by dotted names."""
    if not isinstance(facts, dict):
        return {at or "it": facts}
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _flat(value, f"{at}.{name}" if at else str(name))
    return found
