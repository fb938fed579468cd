"""Pictures are read upright, whole and within limits; everything hostile is refused with a reason."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddengine import image as module
from ddengine.errors import DDEngineError, InputError
from ddengine.image import MAX_PIXELS, MIN_SIDE, read_image, read_mask, resize, to_pixels, to_tensor

# Pillow warns of what it meets in damaged files, and of sizes that are refused a moment later.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

RNG = np.random.default_rng(1)
WIDTH, HEIGHT = 96, 72
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(picture, format, **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def written(folder, data, name="in.bin"):
    (folder / name).write_bytes(data)
    return folder / name


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# What is read


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_files_give_their_pixels(tmp_path, format):
    path = written(tmp_path, encoded(PICTURE, format, **({"lossless": True} if format == "WEBP" else {})))
    for spelling in (path, str(path), Image.open(path)):
        picture = read_image(spelling)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), PIXELS)


def test_arrays_and_pictures_give_their_pixels_and_are_not_shared():
    pixels = PIXELS.copy()
    for given_ in (pixels, pixels[:, ::-1], Image.fromarray(pixels)):
        np.testing.assert_array_equal(np.asarray(read_image(given_)), np.asarray(given_))
    source = PICTURE.copy()
    read = read_image(source)
    source.paste("black", (0, 0, WIDTH, HEIGHT))
    np.testing.assert_array_equal(np.asarray(read), PIXELS)


# The corner that row 0, column 0 of the stored pixels takes in the upright picture, by EXIF orientation.
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied_first(tmp_path, orientation, format):
    upright = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    upright[:20, :10] = (250, 10, 10)
    upright[-7:, :30] = (10, 250, 10)
    inverse = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(inverse(upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif, **({"lossless": True} if format == "WEBP" else {})}
    path = written(tmp_path, encoded(stored, format, **options))
    for given_ in (path, Image.open(path)):
        picture = read_image(given_)
        np.testing.assert_array_equal(np.asarray(picture), upright)
        assert picture.getexif().get(0x0112) is None  # a saved result must not be turned a second time
    mask = read_mask(path, WIDTH, HEIGHT)
    assert mask.shape == (HEIGHT, WIDTH)


def test_a_damaged_exif_block_does_not_cost_the_picture(tmp_path):
    path = written(tmp_path, encoded(PICTURE, "PNG", exif=b"Exif\0\0MM\0*garbage"))
    np.testing.assert_array_equal(np.asarray(read_image(path)), PIXELS)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, WIDTH * HEIGHT).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    expected = np.round(grey / 257).astype(np.uint8)
    for format in ("PNG", "TIFF"):
        picture = read_image(written(tmp_path, encoded(Image.fromarray(grey), format)))
        for band in range(3):
            np.testing.assert_array_equal(np.asarray(picture)[..., band], expected)


def test_sixteen_bit_colour_is_scaled_not_clipped(tmp_path):
    values = RNG.integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    picture = read_image(written(tmp_path, png(WIDTH, HEIGHT, 16, 2, rows)))
    assert np.abs(np.asarray(picture) - values / 257).max() <= 1


def test_grey_palette_bilevel_and_other_modes_become_rgb(tmp_path):
    grey = Image.fromarray(PIXELS[..., 0])
    for mode in ("L", "P", "1"):
        picture = {"L": grey, "P": PICTURE.quantize(64), "1": grey.convert("1")}[mode]
        for format in ("PNG", "TIFF", "GIF"):
            read = read_image(written(tmp_path, encoded(picture, format)))
            np.testing.assert_array_equal(np.asarray(read), np.asarray(picture.convert("RGB")))
    for mode in ("YCbCr", "HSV"):
        assert read_image(PICTURE.convert(mode)).mode == "RGB"


def test_cmyk_becomes_rgb_and_its_profile_is_dropped(tmp_path):
    colours = Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))
    colours.info["icc_profile"] = b"\0" * 16 + b"CMYK" + b"\0" * 108
    for format in ("JPEG", "TIFF"):
        data = encoded(colours, format, icc_profile=colours.info["icc_profile"])
        picture = read_image(written(tmp_path, data))
        assert np.abs(np.asarray(picture).astype(int) - (255, 0, 0)).max() <= 2
        assert "icc_profile" not in picture.info


def test_an_rgb_profile_stays_with_the_pixels(tmp_path):
    profile = b"\0" * 16 + b"RGB " + b"\0" * 108
    picture = read_image(written(tmp_path, encoded(PICTURE, "PNG", icc_profile=profile)))
    assert picture.info == {"icc_profile": profile}


def test_transparency_is_composited_on_white(tmp_path):
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1)))
    rgba = PICTURE.copy()
    rgba.putalpha(alpha)
    share = np.asarray(alpha)[..., None] / 255
    expected = PIXELS * share + 255 * (1 - share)
    for format in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        picture = read_image(written(tmp_path, encoded(rgba, format, **options)))
        assert np.abs(np.asarray(picture) - expected).max() <= 1
    clear = Image.new("LA", (WIDTH, HEIGHT), (0, 0))
    assert np.asarray(read_image(written(tmp_path, encoded(clear, "PNG")))).min() == 255


def test_a_transparent_palette_colour_is_composited_on_white(tmp_path):
    palette = Image.new("P", (WIDTH, HEIGHT), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (0, 0, 20, 20))
    picture = np.asarray(read_image(written(tmp_path, encoded(palette, "PNG", transparency=0))))
    assert tuple(picture[5, 5]) == (255, 0, 0)
    assert tuple(picture[40, 40]) == (255, 255, 255)


def test_a_phones_jpeg_with_a_second_picture_is_read_as_its_first(tmp_path):
    path = tmp_path / "phone.jpg"
    PICTURE.save(path, "MPO", save_all=True, append_images=[PICTURE.resize((64, 64))])
    with Image.open(path) as opened:
        assert opened.n_frames == 2
    assert read_image(path).size == (WIDTH, HEIGHT)


# What is refused


def big_png(width, height):
    """A header that promises many pixels, and none behind it: reading them would fail."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def frames(format, **options):
    others = [PICTURE.rotate(angle) for angle in (90, 180)]
    return encoded(PICTURE, format, save_all=True, append_images=others, **options)


WHOLE_PNG = encoded(PICTURE, "PNG")
BAD_FILES = {
    "text": (b"hello, this is no picture" * 10, "not a picture"),
    "pdf": (b"%PDF-1.4\n" + b"0" * 500, "not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>', "not a picture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n", "not a picture"),
    "one byte": (b"\x89", "not a picture"),
    "empty": (b"", "zero bytes"),
    "cut png": (WHOLE_PNG[: len(WHOLE_PNG) // 2], "damaged"),
    "cut jpeg": (encoded(PICTURE, "JPEG")[:900], "damaged"),
    "cut webp": (encoded(PICTURE, "WEBP")[:600], r"damaged|not a picture"),
    "png bad crc": (WHOLE_PNG[:60] + b"\xff\xff" + WHOLE_PNG[62:], "damaged"),
    "png header only": (WHOLE_PNG[:33], "not a picture"),
    "animated gif": (frames("GIF"), "3 frames"),
    "animated png": (frames("PNG"), "3 frames"),
    "animated webp": (frames("WEBP"), "3 frames"),
    "many pages": (frames("TIFF"), "3 frames"),
    "too many pixels": (big_png(8001, 8000), str(MAX_PIXELS)),
    "far too many pixels": (big_png(2**31 - 1, 2**31 - 1), str(MAX_PIXELS)),
    "long and thin": (big_png(2_000_000, 64), str(MAX_PIXELS)),
    "narrow": (encoded(PICTURE.resize((MIN_SIDE - 1, 200)), "PNG"), "at least 64"),
    "flat": (encoded(PICTURE.resize((200, MIN_SIDE - 1)), "PNG"), "at least 64"),
    "floats": (encoded(Image.fromarray(np.full((99, 99), 0.5, np.float32)), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_the_reason(tmp_path, name):
    data, says = BAD_FILES[name]
    path = written(tmp_path, data, f"{name}.png")
    with pytest.raises(InputError, match=says):
        read_image(path)
    with pytest.raises(InputError):
        read_mask(path, WIDTH, HEIGHT)
    assert os.listdir(tmp_path) == [path.name]


def test_the_pixel_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="64008000 pixels"):
        read_image(written(tmp_path, big_png(8001, 8000)))
    with Image.open(tmp_path / "in.bin") as opened, pytest.raises(InputError, match="64008000 pixels"):
        read_image(opened)


def test_pillows_own_limit_comes_out_as_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="above the limit"):
        read_image(written(tmp_path, WHOLE_PNG))


@pytest.mark.parametrize("kind", ["missing", "folder", "address", "zero byte", "pipe"])
def test_paths_that_are_no_picture_files(tmp_path, kind):
    path = {
        "missing": tmp_path / "no.png",
        "folder": tmp_path,
        "address": "https://example.org/a.png",
        "zero byte": "a\0.png",
        "pipe": tmp_path / "pipe",
    }[kind]
    if kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes here")
        os.mkfifo(path)
    says = {"folder": "is a folder", "address": "not fetched", "pipe": "regular"}.get(kind, "no file|null")
    with pytest.raises(InputError, match=says):
        read_image(path)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (PIXELS.astype(np.float32) / 255, "float32"),
        (PIXELS.astype(np.int64), "int64"),
        (PIXELS.astype(np.uint16), "uint16"),
        (PIXELS[..., 0], "shape"),
        (PIXELS[..., :2], "shape"),
        (np.zeros((72, 96, 4), np.uint8), "shape"),
        (PIXELS.transpose(2, 0, 1), "shape"),
        (PIXELS[None], "shape"),
        (np.zeros((0, 96, 3), np.uint8), "at least 64"),
        (PIXELS[:63], "at least 64"),
        (np.broadcast_to(np.uint8(0), (8001, 8000, 3)), "limit"),
    ],
)
def test_bad_arrays(array, says):
    with pytest.raises(InputError, match=says):
        read_image(array)


@pytest.mark.parametrize("wrong", [None, 7, b"\x89PNG", io.BytesIO(WHOLE_PNG), [[1]], torch.zeros(3, 64, 64)])
def test_other_things_are_refused(wrong):
    with pytest.raises(InputError, match="pass a path"):
        read_image(wrong)


def test_a_lazily_opened_truncated_picture_is_refused(tmp_path):
    with (
        Image.open(written(tmp_path, WHOLE_PNG[: len(WHOLE_PNG) // 2])) as opened,
        pytest.raises(InputError, match="damaged"),
    ):
        read_image(opened)


SEEDS = [encoded(PICTURE, format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]


@settings(max_examples=150)
@given(st.sampled_from(SEEDS), st.data())
def test_damaged_files_are_read_or_refused_never_crash(tmp_path_factory, seed, data):
    """Whatever bytes are changed or cut off, the answer is a picture or an InputError."""
    changed = bytearray(seed)
    where = st.integers(0, min(len(seed) - 1, data.draw(st.sampled_from([40, 400, 10**9]))))
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(where)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del changed[data.draw(where) :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(changed))
    try:
        picture = read_image(path)
    except InputError:
        return
    assert picture.mode == "RGB"


# Masks


def test_masks_of_every_kind_say_the_same(tmp_path):
    area = np.zeros((HEIGHT, WIDTH), bool)
    area[10:30, 40:80] = True
    picture = Image.fromarray(np.where(area, 255, 0).astype(np.uint8))
    on_clear = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
    on_clear.paste((255, 255, 255, 255), mask=picture)
    kinds = [
        area,
        area.astype(np.uint8),
        area.astype(np.uint8) * 255,
        area.astype(np.float32),
        area.astype(np.float64)[..., None],
        picture,
        picture.convert("1"),
        picture.convert("RGB"),
        picture.convert("P"),
        on_clear,
        Image.fromarray(area.astype(np.uint16) * 65535),
        written(tmp_path, encoded(picture, "PNG")),
    ]
    for kind in kinds:
        mask = read_mask(kind, WIDTH, HEIGHT)
        assert mask.dtype == np.float32
        np.testing.assert_array_equal(mask, area.astype(np.float32))


def test_soft_masks_keep_their_values():
    soft = RNG.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    for kind in (soft, Image.fromarray(soft), soft / 255):
        np.testing.assert_allclose(read_mask(kind, WIDTH, HEIGHT), soft / 255, atol=1e-7)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.zeros((WIDTH, HEIGHT)), "picture's size"),
        (np.zeros((HEIGHT + 1, WIDTH), bool), "picture's size"),
        (Image.new("L", (WIDTH, HEIGHT - 1)), "picture's size"),
        (Image.new("L", (HEIGHT, WIDTH)), "picture's size"),
        (np.full((HEIGHT, WIDTH), 1.5), "0 to 1"),
        (np.full((HEIGHT, WIDTH), -0.5), "0 to 1"),
        (np.full((HEIGHT, WIDTH), np.nan), "finite"),
        (np.zeros((HEIGHT, WIDTH), np.int64), "int64"),
        (np.zeros((HEIGHT, WIDTH), object), "object"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), "shape"),
        (np.zeros((0, WIDTH)), "shape"),
        ([[0, 1]], "pass a path"),
        ("no-such-mask.png", "no file"),
    ],
)
def test_bad_masks(mask, says):
    with pytest.raises(InputError, match=says):
        read_mask(mask, WIDTH, HEIGHT)


# Tensors


def test_every_8_bit_value_survives_the_tensor_both_ways():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    tensor = to_tensor(ramp)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    np.testing.assert_array_equal(to_pixels(tensor), ramp)
    assert set((ramp - to_pixels(tensor, "truncate")).ravel().tolist()) <= {0, 1}
    np.testing.assert_array_equal(np.asarray(PICTURE), to_pixels(to_tensor(PICTURE)))


def test_rounding_truncating_and_clipping():
    levels = torch.tensor([-9.0, 99.6, 100.4, 300.0]) / 127.5 - 1
    tensor = levels.reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_pixels(tensor)[..., 0].ravel().tolist() == [0, 100, 100, 255]
    assert to_pixels(tensor, "truncate")[..., 0].ravel().tolist() == [0, 99, 100, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_decoder_does_not_become_a_picture(value):
    with pytest.raises(DDEngineError, match="float32"):
        to_pixels(torch.full((1, 3, 4, 4), value))


def test_enlarging_and_reducing_keep_places():
    """The centre of a blob stays at the same share of the way across, in both filters."""
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    blob = torch.exp(-((x - 30.25) ** 2 + (y - 20.75) ** 2) / 50)[None, None]
    for size in ((160, 120), (40, 30), (56, 48)):
        for filter in ("antialias", "bilinear"):
            resized = resize(blob, size, filter)[0, 0]
            assert resized.shape == size[::-1]
            rows, columns = (resized.sum(axis) / resized.sum() for axis in (1, 0))
            centre_y = (rows * torch.arange(size[1])).sum() + 0.5
            centre_x = (columns * torch.arange(size[0])).sum() + 0.5
            assert abs(centre_x / size[0] - 30.75 / 80) < 2e-3
            assert abs(centre_y / size[1] - 21.25 / 60) < 2e-3


def test_the_default_filter_antialiases_and_does_not_overshoot():
    checks = torch.tensor([[1.0, -1.0] * 64, [-1.0, 1.0] * 64] * 64)[None, None]
    assert resize(checks, (43, 43)).abs().max() < 0.1  # grey, not a moiré of black and white
    assert resize(checks, (43, 43), "bilinear").abs().max() > 0.9
    step = torch.cat([torch.zeros(1, 1, 40, 20), torch.ones(1, 1, 40, 20)], 3)
    enlarged = resize(step, (120, 120))
    assert (enlarged.min(), enlarged.max()) == (0, 1)
    assert resize(step, (40, 40)) is step


def test_an_unknown_filter_is_refused():
    with pytest.raises(InputError, match="nearest"):
        resize(torch.zeros(1, 3, 8, 8), (4, 4), "nearest")


def test_reading_needs_no_torch():
    assert not hasattr(module, "torch")
