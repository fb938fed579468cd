"""The store of made things: made once, whole or not at all, and refused when anything about it is not as written."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import Cancelled, EngineMismatch, InputError
from ddengine.store import MANIFEST, ArtefactStore, Cleared, key_of

FACTS = {"pass": "denoise", "sizes": {"latent": [1, 4, 8, 8]}, "version": "10.16", "options": {"level": 3}}
POSIX = pytest.mark.skipif(not hasattr(os, "getuid"), reason="rights are told by modes and owners there")


def two_files(folder: Path) -> dict[str, object]:
    (folder / "engine.plan").write_bytes(b"plan" * 100)
    (folder / "more").mkdir()
    (folder / "more" / "data.bin").write_bytes(b"\0\1\2")
    return {"seconds": 1.5}


def never(folder: Path) -> None:
    raise AssertionError("made although it was there")


@pytest.fixture
def store(tmp_path) -> ArtefactStore:
    return ArtefactStore(tmp_path / "cache")


def leftovers(store: ArtefactStore) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.suffix in {".making", ".old", ".tmp"})


def test_what_was_made_comes_back_and_is_not_made_again(store):
    assert store.get("engines", FACTS) is None
    made = store.make("engines", FACTS, two_files)
    assert made.folder == store.root / "engines" / key_of(FACTS)
    again = store.make("engines", FACTS, never)
    for artefact in (made, again, store.get("engines", FACTS)):
        assert artefact.read("engine.plan") == b"plan" * 100
        assert artefact.path("more/data.bin").read_bytes() == b"\0\1\2"
        assert (artefact.facts, artefact.about, artefact.size) == (FACTS, {"seconds": 1.5}, 403)
    assert store.get("onnx", FACTS) is None
    assert leftovers(store) == []
    with pytest.raises(EngineMismatch, match="no file"):
        made.read("other")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4), st.randoms(use_true_random=False))
def test_keys_know_facts_and_not_their_order(facts, shuffle):
    items = list(facts.items())
    shuffle.shuffle(items)
    assert key_of(dict(items)) == key_of(facts) == key_of(json.loads(json.dumps(facts)))
    assert key_of({**facts, "one more": 1}) != key_of(facts)


def test_every_fact_changes_the_key():
    keys = {key_of(FACTS)}
    for name in FACTS:
        keys.add(key_of({**FACTS, name: "another"}))
    assert len(keys) == 1 + len(FACTS)


@POSIX
def test_only_the_user_can_read_it(store):
    umask = os.umask(0)
    try:
        artefact = store.make("engines", FACTS, two_files)
    finally:
        os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in artefact.folder.rglob("*") if path.is_file()}
    folders = {artefact.folder, artefact.folder.parent, artefact.folder / "more"}
    assert modes == {0o600} and {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def damages() -> dict[str, object]:
    """What can be wrong with an entry: a word of the refusal -> what does it."""

    def edit(**changes: object):
        def change(folder: Path) -> None:
            manifest = json.loads((folder / MANIFEST).read_text())
            (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))

        return change

    plan = "engine.plan"
    return {
        "bytes, 400 were": lambda folder: os.truncate(folder / plan, 399),
        "not what was written": lambda folder: (folder / plan).write_bytes(b"plam" * 100),
        "No such file": lambda folder: (folder / plan).unlink(),
        "No such file or directory": lambda folder: (folder / MANIFEST).unlink(),
        "not JSON": lambda folder: os.truncate(folder / MANIFEST, 100),
        "not JSON ": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe{"),
        "format": lambda folder: (folder / MANIFEST).write_text("[1]"),
        "format 1": edit(format=2),
        "digest": edit(about={"seconds": 0}),
        "own digest": edit(facts={**FACTS, "version": "11"}),
        "others may write": lambda folder: (folder / plan).chmod(0o666),
        r"others may write .*777": lambda folder: folder.chmod(0o777),
        "it is a link": lambda folder: ((folder / plan).unlink(), (folder / plan).symlink_to("/dev/zero")),
    }


@POSIX
@pytest.mark.parametrize("says", damages())
def test_what_is_not_as_it_was_written_is_refused_and_then_made_again(store, says, caplog):
    folder = store.make("engines", FACTS, two_files).folder
    damages()[says](folder)
    with pytest.raises(EngineMismatch, match=says) as refused:
        store.get("engines", FACTS).read("engine.plan")
    assert "ddengine cache clear" in str(refused.value)
    with pytest.raises(EngineMismatch):
        store.get("engines", FACTS).path("engine.plan")
    with caplog.at_level(logging.WARNING):
        assert store.make("engines", FACTS, two_files).read("engine.plan") == b"plan" * 100
    assert "made again" in caplog.text
    assert leftovers(store) == []


@POSIX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_another_users_engine_is_refused(store):
    folder = store.make("engines", FACTS, two_files).folder
    os.chown(folder / "engine.plan", 12345, -1)
    with pytest.raises(EngineMismatch, match="belongs to user 12345"):
        store.get("engines", FACTS).read("engine.plan")


def test_an_entry_moved_to_another_key_is_refused(store):
    """An engine of another GPU, copied to where this one's would be."""
    other = {**FACTS, "gpu": "another"}
    folder = store.make("engines", other, two_files).folder
    folder.rename(folder.with_name(key_of(FACTS)))
    with pytest.raises(EngineMismatch, match=key_of(other)):
        store.get("engines", FACTS)


def test_a_manifest_cannot_lead_outside(store, tmp_path):
    from ddengine.store import _canonical, sha256_bytes

    folder = store.make("engines", FACTS, two_files).folder
    (tmp_path / "cache" / "engines" / "secret").write_bytes(b"x")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": sha256_bytes(b"x")}
    manifest["digest"] = sha256_bytes(_canonical(manifest))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(EngineMismatch, match="outside"):
        store.get("engines", FACTS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Cancelled, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_stopped_making_leaves_nothing_and_the_old_one_stands(store, error):
    old = store.make("engines", FACTS, two_files)

    def stopped(folder: Path) -> None:
        (folder / "engine.plan").write_bytes(b"half")
        raise error

    for facts in (FACTS, {**FACTS, "version": "11"}):
        with pytest.raises(InputError if isinstance(error, OSError) else error) as stop:
            store.make("engines", facts, stopped, replace=True)
    if isinstance(error, OSError):
        assert "No space left" in str(stop.value) and "DDENGINE_CACHE" in str(stop.value)
    assert leftovers(store) == []
    assert old.read("engine.plan") == b"plan" * 100
    assert [entry.key for entry in store.entries()] == [old.key]


def test_everything_is_on_the_disk_before_it_gets_its_name(store, monkeypatch):
    """A power cut after the renaming must not find an empty file under a good name."""
    steps, fsync, rename = [], os.fsync, Path.rename

    def flush(descriptor: int) -> None:
        steps.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def name(self: Path, target: Path) -> Path:
        steps.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", name)
    folder = store.make("engines", FACTS, two_files).folder
    before, after = set(steps[: steps.index("renamed")]), set(steps[steps.index("renamed") :])
    files = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    assert files | {folder.stat().st_ino} <= before and folder.parent.stat().st_ino in after


def test_a_disk_that_fills_up_while_the_files_are_sealed_leaves_nothing(store, monkeypatch):
    """The files were taken, and the disk says only when they are flushed that it is full."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        store.make("engines", FACTS, two_files)
    assert leftovers(store) == [] and store.entries() == []


@pytest.mark.parametrize("broken", ["engines", "."])
def test_a_folder_that_cannot_be_made_is_told_before_the_work(store, broken):
    store.root.parent.mkdir(exist_ok=True)
    place = store.root / broken if broken != "." else store.root
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"a file where the folder should be")
    with pytest.raises(InputError, match="DDENGINE_CACHE"):
        store.make("engines", FACTS, never)
    assert store.entries() == [] and store.clear() == Cleared(0, 0, 0)


def test_a_read_only_store_is_read_and_says_so_before_the_work(store, monkeypatch):
    made = store.make("engines", FACTS, two_files)
    really = os.open

    def read_only(path, flags, *more, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return really(path, flags, *more, **options)

    def no_folder(path, *more, **options):
        raise OSError(errno.EEXIST if os.path.isdir(path) else errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "mkdir", no_folder)
    assert store.make("engines", FACTS, never).read("engine.plan") == made.read("engine.plan")
    assert len(store.entries()) == 1
    with pytest.raises(InputError, match="Read-only file system"):
        store.make("engines", {**FACTS, "version": "11"}, never)


def child(code: str) -> subprocess.Popen[str]:
    start = "import os, signal, time, sys\nfrom pathlib import Path\nfrom ddengine.store import ArtefactStore\n"
    return subprocess.Popen([sys.executable, "-c", start + code], stdout=subprocess.PIPE, text=True)


def test_two_processes_make_it_once(store, tmp_path):
    code = (
        "def write(folder):\n"
        f"    open({str(tmp_path / 'made')!r}, 'a').write('x'); time.sleep(0.5)\n"
        "    (folder / 'engine.plan').write_bytes(b'1')\n"
        f"print(ArtefactStore({str(store.root)!r}).make('engines', {FACTS!r}, write).read('engine.plan'))\n"
    )
    children = [child(code) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0] for process in children]
    assert answers == ["b'1'\n"] * 3
    assert (tmp_path / "made").read_text() == "x"


def test_two_threads_make_it_once_and_who_waits_can_give_up(store):
    going, finish, made = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> None:
        going.set()
        finish.wait(20)
        made.append(1)
        two_files(folder)

    first = threading.Thread(target=store.make, args=("engines", FACTS, slow))
    first.start()
    going.wait(20)

    def give_up() -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        store.make("engines", FACTS, never, waiting=give_up)
    assert store.clear() == Cleared(0, 0, 1)  # what is being made stays
    threading.Timer(0.3, finish.set).start()
    store.make("engines", FACTS, never)
    first.join()
    assert made == [1]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such death there")
def test_what_a_killed_maker_left_is_swept(store):
    code = (
        "def write(folder):\n"
        "    (folder / 'engine.plan').write_bytes(b'x' * 1000); print('half', flush=True); time.sleep(60)\n"
        f"ArtefactStore({str(store.root)!r}).make('engines', {{'version': sys.argv[1]}}, write)\n"
    )
    for facts, swept_by in (({"version": "1"}, {"version": "1"}), ({"version": "2"}, FACTS)):
        process = child(code.replace("sys.argv[1]", repr(facts["version"])))
        assert process.stdout.readline() == "half\n"
        process.kill()
        process.communicate()
        assert len(leftovers(store)) == 1 and store.get("engines", facts) is None
        store.make("engines", swept_by, two_files)
        assert leftovers(store) == []
    assert sorted(entry.about == {"seconds": 1.5} for entry in store.entries()) == [True, True]


def test_listing_and_clearing(store):
    store.make("onnx", FACTS, two_files)
    engine = store.make("engines", FACTS, two_files)
    broken = store.make("engines", {**FACTS, "gpu": "other"}, two_files)
    os.truncate(broken.folder / "engine.plan", 10)
    (store.root / "digests.json").write_text("{}")  # another's file in the same folder
    entries = store.entries()
    assert [(entry.kind, bool(entry.problem)) for entry in entries] == [
        ("engines", entry.key == broken.key) for entry in entries[:2]
    ] + [("onnx", False)]
    sound = next(entry for entry in entries if entry.key == engine.key)
    assert sound.facts == FACTS and sound.bytes > 403
    assert store.clear(("engines",)).entries == 2
    assert [entry.kind for entry in store.entries()] == ["onnx"]
    assert store.clear().entries == 1 and store.entries() == []
    assert (store.root / "digests.json").exists()
    assert store.make("engines", FACTS, two_files).size == 403
