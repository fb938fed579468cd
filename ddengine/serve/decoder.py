"""The program that decodes pictures for the service (`python -m ddengine.serve.decoder`), one after the other.

A process of its own, with little memory: a decoder that hangs is killed, one that crashes takes nothing with it. On
stdin and stdout: lengths of a JSON object and of bytes (two big-endian uint32), then both. Out, once it can decode:
{"ready"}. Then for each picture, in: the limit of pixels, and the file's bytes; out: {"size"} with pixels and colour
profile, or {"error"}.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
import warnings
from io import BytesIO
from typing import Any, BinaryIO

from PIL import Image

from ddengine.errors import InputError
from ddengine.image import read_image

FORMATS = ("PNG", "JPEG", "WEBP")
HEAD = struct.Struct(">II")
MAX_PROFILE = 1 << 20

_BYTES_A_PIXEL = 32  # what decoding, turning and converting takes at most, with room to spare
_BYTES = 512 << 20


def write(to: BinaryIO, facts: dict[str, Any], data: bytes = b"") -> None:
    """Send an object and bytes."""
    text = json.dumps(facts).encode()
    to.write(HEAD.pack(len(text), len(data)) + text)
    to.write(data)
    to.flush()


def read(file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """What `write` sent; EOFError where the other side has ended."""
    text, data = HEAD.unpack(_exactly(file, HEAD.size))
    return json.loads(_exactly(file, text)), _exactly(file, data)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if data is None or len(data) < count:
        raise EOFError
    return data


def decoded(data: bytes, pixels: int) -> Image.Image:
    """An upright RGB picture without metadata but its colour profile; InputError for what is none, or too large."""
    Image.MAX_IMAGE_PIXELS = pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            opened = Image.open(BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(f"the picture has more than {pixels} pixels; scale it down") from error
        except Exception as error:  # whatever a decoder makes of hostile bytes
            raise InputError("the picture is damaged; save it again") from error
        with opened:
            if opened.width * opened.height > pixels:
                raise InputError(f"the picture is {opened.width} x {opened.height}, more than {pixels} pixels")
            return read_image(opened)


def _little_memory(pixels: int) -> None:
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return  # no such limit here; the checks of the header remain
    room = now + _BYTES + pixels * _BYTES_A_PIXEL
    resource.setrlimit(resource.RLIMIT_AS, (room, room))


def main(pixels: int) -> None:
    """Serve stdin until it ends."""
    _little_memory(pixels)
    file, to = sys.stdin.buffer, sys.stdout.buffer
    write(to, {"ready": True})
    while True:
        try:
            facts, data = read(file)
        except EOFError:
            return
        try:
            picture = decoded(data, min(int(facts["pixels"]), pixels))
            profile = picture.info.get("icc_profile", b"")
            profile = profile if len(profile) <= MAX_PROFILE else b""
            write(to, {"size": picture.size, "profile": base64.b64encode(profile).decode()}, picture.tobytes())
        except InputError as error:
            write(to, {"error": str(error)[:500]})
        except MemoryError:
            write(to, {"error": "the picture takes too much memory to decode; scale it down"})
        except Exception:  # of a decoder, on hostile bytes: whatever it is, the picture is not usable
            write(to, {"error": "the picture is damaged; save it again"})


if __name__ == "__main__":
    main(int(sys.argv[1]))
