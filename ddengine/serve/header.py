"""What the first bytes of a picture say of it: format and size, read before any decoder sees them.

PNG: specification (third edition), 11.2.1. JPEG: ITU-T T.81, annex B. WebP: RFC 9649, sections 2.4 to 2.7.
"""

from __future__ import annotations

import struct

MAX_SCANS = 200  # of a JPEG; encoders write about ten. Each one is a walk over the whole picture for a few bytes.

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers that begin a frame
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length


def format_of(data: bytes) -> str | None:
    """PNG, JPEG or WEBP by the signature; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) as the header says; None where it says nothing."""
    kind = format_of(data)
    try:
        if kind == "PNG":
            return struct.unpack(">II", data[16:24]) if data[12:16] == b"IHDR" else None
        if kind == "JPEG":
            return _jpeg(data)
        return _webp(data) if kind == "WEBP" else None
    except (struct.error, IndexError):
        return None


def scans_of(data: bytes) -> int:
    """At most how many scans a JPEG has: its bytes that can begin one."""
    return data.count(b"\xff\xda")


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker in _FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        elif marker in (0xD9, 0xDA):
            return None
        else:
            at += 2 + int(struct.unpack(">H", data[at + 2 : at + 4])[0])
    return None


def _webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None
