"""Hostile pictures: whatever the bytes, a picture within the limits or a refusal; never a crash, never a hang."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from serve_fakes import PICTURE, form, picture_bytes, serving

from ddengine.serve import pictures
from ddengine.serve.faults import Fault
from ddengine.serve.header import format_of, scans_of, size_of
from ddengine.serve.limits import Limits
from ddengine.serve.pictures import Intake, decoded_png, encoded, to_pil

FILES = {form: picture_bytes(form) for form in ("PNG", "JPEG", "WEBP")}
FILES["lossless WEBP"] = picture_bytes("WEBP", lossless=True)
FILES["progressive JPEG"] = picture_bytes("JPEG", progressive=True)
FILES["grey PNG"] = (lambda file: (Image.new("L", (80, 64), 99).save(file, "PNG"), file.getvalue())[1])(BytesIO())

SECOND = Image.new("RGB", (80, 64))  # a frame


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of one colour: few bytes whatever its size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(min((width * 3 + 1) * height, 1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def refused(intake: Intake, data: bytes) -> str:
    with pytest.raises(Fault) as caught:
        intake.read(data)
    assert len(caught.value.message) < 600 and caught.value.status in (413, 415, 422)
    return caught.value.code


@pytest.mark.parametrize("name", FILES)
def test_good_pictures_are_read_as_they_are(intake, name):
    data = FILES[name]
    assert size_of(data) == (80, 64) and format_of(data) == name.split()[-1]
    picture = intake.read(data)
    expected = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(to_pil(picture)), expected)
    if "PNG" in name:
        assert decoded_png(encoded(picture, "image/png")) == picture


def test_metadata_goes_after_the_orientation_is_applied_and_the_colour_profile_stays(intake):
    from PIL import ImageCms

    exif = Image.Exif()
    exif[0x0112], exif[0x013B], exif[0x8825] = 6, "a name", {1: "N"}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "where it was taken")
    for data in (picture_bytes("JPEG", exif=exif, icc_profile=profile), picture_bytes("PNG", pnginfo=text, exif=exif)):
        picture = intake.read(data)
        assert (picture.width, picture.height) == (64, 80)  # upright
        assert picture.profile == (profile if b"JFIF" in data else None)
        back = encoded(picture, "image/png")
        assert b"name" not in back and b"taken" not in back and b"eXIf" not in back
        assert Image.open(BytesIO(back)).info.get("icc_profile") == picture.profile


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("nothing", b"", "unsupported_media"),
        ("text", b"hello" * 100, "unsupported_media"),
        ("SVG", b"<svg><image href='file:///etc/passwd'/></svg>", "unsupported_media"),
        ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 64\n", "unsupported_media"),
        ("GIF", picture_bytes("GIF"), "unsupported_media"),
        ("TIFF in PNG's clothes", b"\x89PNG\r\n\x1a\n" + picture_bytes("TIFF"), "invalid"),
        ("a signature alone", b"\x89PNG\r\n\x1a\n", "invalid"),
        ("a JPEG's beginning alone", b"\xff\xd8\xff\xe0", "invalid"),
        ("bomb", png(30_000, 30_000), "too_large"),
        ("bomb of the largest sides", png(2**31 - 1, 2**31 - 1), "too_large"),
        ("above Pillow's warning, below its error", png(10_000, 10_000), "too_large"),
        ("sides of zero", png(0, 64), "invalid"),
        ("rows missing", png(640, 4000), "invalid"),
        ("a text bomb", png(80, 64, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20 << 20)))), "invalid"),
        ("two frames", picture_bytes("WEBP", save_all=True, append_images=[SECOND]), "invalid"),
        ("two frames as PNG", picture_bytes("PNG", save_all=True, append_images=[SECOND]), "invalid"),
        ("many scans", FILES["progressive JPEG"][:-2] + b"\xff\xda\0\x02" * 300 + b"\xff\xd9", "invalid"),
        ("a large JPEG header", FILES["JPEG"].replace(b"\0\x40\0\x50", b"\xff\xff\xff\xff", 1), "too_large"),
        ("a large WebP header", b"RIFF\x22\0\0\0WEBPVP8X\x0a" + bytes(7) + b"\xff" * 6 + bytes(8), "too_large"),
        ("too small", png(63, 64), "invalid"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
def test_pictures_that_are_none(intake, name, data, code):
    assert refused(intake, data) == code, name


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=25)
@given(data=st.data())
def test_cut_and_damaged_files(intake, name, data):
    """Of every format: cut anywhere, bytes changed anywhere, bytes put in."""
    whole = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(0, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    hostile = bytes(whole[:cut]) + data.draw(st.binary(max_size=20))
    began = time.monotonic()
    status, picture = 200, None
    try:
        picture = intake.read(hostile)
    except Fault as fault:
        status = fault.status
    assert status in (200, 413, 415, 422)
    if picture is not None:
        assert len(picture.rgb) == picture.width * picture.height * 3 <= intake.limits.pixels * 3
    assert time.monotonic() - began < 20


@given(st.binary(max_size=300), st.sampled_from(["", "PNG", "JPEG", "WEBP", "lossless WEBP"]))
def test_headers_of_any_bytes(data, name):
    """The header's reader answers whatever comes, and never reads past the end."""
    data = FILES[name][:30] + data if name else data
    size = size_of(data)
    assert size is None or (len(size) == 2 and min(size) >= 0)
    assert scans_of(data) >= 0


@pytest.fixture
def own():
    """An intake of the test's own, one decoder at a time."""
    found = Intake(Limits(decode_s=60.0, decoders=1))
    yield found
    found.close()
    assert found._idle == []


def pid(intake: Intake) -> int:
    (process,) = intake._idle
    return process._process.pid


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal here")
def test_a_decoder_that_takes_too_long_is_killed_and_the_next_one_works(own):
    assert own.read(PICTURE).width == 80
    first = pid(own)
    os.kill(first, signal.SIGSTOP)
    own.limits = Limits(decode_s=0.05)
    with pytest.raises(Fault, match=r"within 0\.05 s") as told:
        own.read(PICTURE)
    assert told.value.code == "invalid" and not own._idle
    own.limits = Limits(decode_s=60.0)
    assert own.read(PICTURE).width == 80 and pid(own) != first


def test_the_start_of_a_decoder_is_no_part_of_the_decoding(own, monkeypatch):
    """A start of a second, a limit of half of one."""
    late = "import sys, time; time.sleep(1); from ddengine.serve.decoder import main; main(int(sys.argv[1]))"
    monkeypatch.setattr(pictures, "_COMMAND", [sys.executable, "-c", late])
    own.limits = Limits(decode_s=0.5)
    assert own.read(PICTURE).width == 80


def test_a_decoder_that_died_while_it_waited_costs_no_picture(own):
    assert own.read(PICTURE).width == 80
    (process,) = own._idle
    process._process.kill()  # as if something had run out of memory
    process._process.wait()
    assert own.read(PICTURE).width == 80 and own._idle != [process]
    os.kill(pid(own), signal.SIGKILL)  # just now: whether it is still there when it is asked, nobody knows
    assert own.read(PICTURE).width == 80


# Decoders that end at one kind of picture, as a crash in a library would end them.
CRASHES = """
import os, sys
from ddengine.serve import decoder
decode = decoder.decoded

def decoded(data, pixels):
    if {when}:
        os._exit(9)
    return decode(data, pixels)

decoder.decoded = decoded
decoder.main(int(sys.argv[1]))
"""


def test_a_decoder_that_dies_at_a_picture_is_asked_twice(own, monkeypatch, tmp_path):
    started = []
    whole = pictures._Process

    def counted(pixels):
        started.append(pixels)
        return whole(pixels)

    monkeypatch.setattr(pictures, "_Process", counted)
    mark = tmp_path / "crashed"
    once = f"not os.path.exists({str(mark)!r}) and not open({str(mark)!r}, 'w').close()"
    monkeypatch.setattr(pictures, "_COMMAND", [sys.executable, "-c", CRASHES.format(when=once)])
    assert own.read(PICTURE).width == 80 and len(started) == 2  # that one had bad luck
    own.close()
    own._closed = False
    monkeypatch.setattr(pictures, "_COMMAND", [sys.executable, "-c", CRASHES.format(when="data[:2] == b'RI'")])
    started.clear()
    assert own.read(PICTURE).width == 80 and len(started) == 1
    assert refused(own, FILES["WEBP"]) == "invalid" and len(started) == 2  # this one is to blame
    assert own.read(PICTURE).width == 80 and len(started) == 3


@pytest.mark.parametrize(
    "command",
    [["/nowhere/python"], [sys.executable, "-c", "raise SystemExit(1)"], [sys.executable, "-c", "print('x' * 99)"]],
)
async def test_where_no_decoder_starts_the_service_is_unavailable(own, monkeypatch, command):
    monkeypatch.setattr(pictures, "_COMMAND", command)
    own.warm()
    async with serving(intake=own) as it:
        for _ in range(2):
            answer = await it.http.post("/v1/edits", **form())
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
            assert "retry-after" in answer.headers and it.service.jobs.open == 0
        monkeypatch.undo()
        assert (await it.http.post("/v1/edits", **form())).status_code == 200


def test_a_decoder_has_little_memory(intake):
    """Whatever a decoder asks for, the process ends before the machine does."""
    resource = pytest.importorskip("resource")
    intake.read(PICTURE)
    limit, _ = resource.prlimit(intake._idle[0]._process.pid, resource.RLIMIT_AS)
    assert 0 < limit < 4 << 30


@settings(max_examples=20)
@given(data=st.binary(max_size=400), name=st.sampled_from(["", *FILES]))
def test_any_bytes_as_a_picture_over_http(intake, data, name):
    """Fuzzed uploads: never a 500."""
    import asyncio

    body = FILES[name][: 40 + len(data)] + data if name else data

    async def ask():
        async with serving(intake=intake) as it:
            return await it.http.post("/v1/edits", **form(picture=body))

    assert asyncio.run(ask()).status_code in (200, 413, 415, 422)
