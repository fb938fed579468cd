"""Files that are written whole or not at all, and the digests that name them."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ddengine.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

StrPath = str | os.PathLike[str]

# Suffix -> (Pillow's format, options, longest side the format can hold). All but JPEG keep every pixel.
PICTURE_FORMATS: dict[str, tuple[str, dict[str, Any], int]] = {
    ".png": ("PNG", {}, 2**31 - 1),
    ".webp": ("WEBP", {"lossless": True}, 16383),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}, 65500),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}, 65500),
    ".bmp": ("BMP", {}, 2**31 - 1),
    ".tif": ("TIFF", {"compression": "tiff_lzw"}, 2**31 - 1),
    ".tiff": ("TIFF", {"compression": "tiff_lzw"}, 2**31 - 1),
}


def atomic_write(path: StrPath, data: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write a file so that `path` holds either all of the new content or what it held before; return the path.

    `data`: the bytes, or a callable that writes them to the open binary file it is given. The content goes to a
    temporary file in the same folder, is flushed to the disk, and then takes the name; on any failure (an interrupt
    too) the temporary file is removed. A link is followed, its destination replaced. Raises InputError if the folder or
    the disk does not take the file.
    """
    path = Path(path)
    real, temporary, descriptor = _open_beside(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                data(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise
    return path


def make_folder(path: StrPath) -> Path:
    """The folder, made with its parents if it is not there; InputError if that cannot be done."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; name another with -o") from error
    return folder


def check_writable(path: StrPath) -> Path:
    """Raise InputError unless a file can be written at `path` now, for a check before long work; leaves nothing."""
    path = Path(path)
    # Trying is the only sure test: access bits say nothing of full or read-only disks, quotas or names too long.
    real, temporary, descriptor = _open_beside(path)
    os.close(descriptor)
    temporary.unlink(missing_ok=True)
    try:
        mode = real.lstat().st_mode
    except FileNotFoundError:
        return path
    except OSError as error:  # a name too long, for one
        raise _unwritable(path, error) from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; name a file in it, for example {path / 'out.png'}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is not a regular file; name another file")
    if not os.access(real, os.W_OK):
        raise InputError(f"{path} exists and is write-protected; name another file or change its mode")
    return path


def check_picture_path(path: StrPath) -> Path:
    """`check_writable`, and the suffix must be one of PICTURE_FORMATS; InputError otherwise."""
    _picture_format(Path(path))
    return check_writable(path)


def check_tensors_path(path: StrPath) -> Path:
    """`check_writable`, and the suffix must be .safetensors; InputError otherwise."""
    if Path(path).suffix != ".safetensors":
        raise InputError(f"cannot write {path}: it is no .safetensors name; end it in .safetensors")
    return check_writable(path)


def save_picture(image: Image.Image, path: StrPath) -> Path:
    """Write a picture atomically in the format its suffix names (PICTURE_FORMATS) and return the path.

    The picture's colour profile goes with it, its other metadata does not. Raises InputError for an unknown
    suffix, a picture too large for the format, or a path that cannot be written.
    """
    path = Path(path)
    kind, options, longest = _picture_format(path)
    if max(image.size) > longest:
        raise InputError(
            f"{path}: {kind} holds at most {longest} pixels a side, the picture is {image.width} "
            f"x {image.height}; save as .png"
        )
    profile = image.info.get("icc_profile")
    if profile and kind != "BMP":
        options = {**options, "icc_profile": profile}
    return atomic_write(path, lambda file: image.save(file, format=kind, **options))


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: StrPath) -> str:
    """SHA-256 of a file's content, in hexadecimal, read piecewise."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _picture_format(path: Path) -> tuple[str, dict[str, Any], int]:
    known = PICTURE_FORMATS.get(path.suffix.lower())
    if known is None:
        what = f"the suffix {path.suffix!r} is not" if path.suffix else "without a suffix the format is not"
        raise InputError(f"cannot write {path}: {what} known; end the name in one of {', '.join(PICTURE_FORMATS)}")
    return known


def _open_beside(path: Path) -> tuple[Path, Path, int]:
    """Open a new temporary file beside `path`: (the path with links followed, the temporary path, descriptor)."""
    try:
        real = Path(os.path.realpath(path))
        if not real.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}; create it first")
        temporary = real.with_name(f".ddengine-{secrets.token_hex(8)}.tmp")
        # Opened without `tempfile`, whose 0600 mode would outlive the renaming: here the user's umask decides.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return real, temporary, os.open(temporary, flags, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from error
    except ValueError as error:  # a zero byte in the path; a name that is no name
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot write {str(path)!r}: {error}; name a file") from error


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(f"cannot write {path}: {reason}; name a file in a folder that exists and that you may write to")
