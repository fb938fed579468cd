"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from ddengine.artifacts import (
    PICTURE_FORMATS,
    atomic_write,
    check_picture_path,
    check_writable,
    save_picture,
    sha256_bytes,
    sha256_file,
)
from ddengine.errors import InputError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_bytes_and_writers_replace_what_was_there(tmp_path):
    target = tmp_path / "a.bin"
    assert atomic_write(target, b"one") == target
    atomic_write(target, lambda file: file.write(b"two"))
    assert target.read_bytes() == b"two"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def writer(file):
        file.write(b"half")
        raise failure("disk full")

    with pytest.raises(InputError if failure is OSError else failure, match="disk full"):
        atomic_write(target, writer)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes and links")
def test_mode_follows_the_umask_and_links_are_followed(tmp_path):
    real, link = tmp_path / "real.bin", tmp_path / "link.bin"
    real.write_bytes(b"old")
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        atomic_write(link, b"new")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640


def bad_outputs(folder):
    (folder / "file").write_bytes(b"")
    (folder / "folder.png").mkdir()
    return {
        "there is no folder": folder / "missing" / "out.png",
        "folder": folder / "file" / "out.png",
        "is a folder": folder / "folder.png",
        "too long": folder / ("x" * 300 + ".png"),
        "null|zero": str(folder / "a\0.png"),
    }


def test_paths_that_cannot_be_written_are_refused_before_and_while_writing(tmp_path):
    for says, path in bad_outputs(tmp_path).items():
        with pytest.raises(InputError, match=says):
            check_picture_path(path)
        with pytest.raises(InputError):
            save_picture(PICTURE, path)
    assert names(tmp_path) == ["file", "folder.png"]
    assert names(tmp_path / "folder.png") == []


def test_special_files_are_refused(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="regular"):
        check_writable(tmp_path / "pipe.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_protected_folders_and_files_are_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    protected = tmp_path / "a.png"
    protected.write_bytes(b"mine")
    protected.chmod(0o444)
    for path in (folder / "out.png", protected):
        with pytest.raises(InputError, match=r"cannot write|protected"):
            check_writable(path)


def test_the_check_leaves_nothing_and_touches_nothing(tmp_path):
    (tmp_path / "old.png").write_bytes(b"old")
    assert check_picture_path(tmp_path / "old.png") == tmp_path / "old.png"
    check_picture_path(tmp_path / "new.png")
    assert names(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.parametrize("suffix", sorted(PICTURE_FORMATS))
def test_the_suffix_is_the_format_and_lossless_ones_keep_every_pixel(tmp_path, suffix):
    path = save_picture(PICTURE, tmp_path / f"out{suffix.upper()}")
    with Image.open(path) as read:
        assert read.format == PICTURE_FORMATS[suffix][0]
        difference = np.abs(np.asarray(read.convert("RGB")).astype(int) - np.asarray(PICTURE)).max()
    assert difference == 0 or (read.format == "JPEG" and difference < 40)


@pytest.mark.parametrize("name", ["out", "out.gif", "out.png.txt", "out.safetensors"])
def test_unknown_suffixes_are_refused(tmp_path, name):
    for write in (check_picture_path, lambda path: save_picture(PICTURE, path)):
        with pytest.raises(InputError, match=r"\.png"):
            write(tmp_path / name)
    assert names(tmp_path) == []


def test_a_side_the_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match="16383"):
        save_picture(Image.new("RGB", (16384, 1)), tmp_path / "out.webp")
    assert names(tmp_path) == []


def test_the_colour_profile_is_kept_and_bytes_are_the_same_each_time(tmp_path):
    picture = PICTURE.copy()
    picture.info["icc_profile"] = b"\0" * 128
    for name in ("a.png", "b.png"):
        save_picture(picture, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as read:
        assert read.info["icc_profile"] == b"\0" * 128


def test_digests(tmp_path):
    data = os.urandom((1 << 20) + 3)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()
