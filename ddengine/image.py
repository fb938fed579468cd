"""Pictures in and out: reading with limits, upright 8-bit RGB, masks, and the step between pixels and tensors.

Everything a user passes is treated as hostile: sizes are checked from the header before any pixel is decoded, a format
is tried only if it is on the list below, and every failure of a decoder becomes an InputError. Reading needs no torch.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddengine.errors import DDEngineError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000  # 64 megapixels: 8000 x 8000; about 200 MB as RGB bytes
MIN_SIDE = 64

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# What Pillow's decoders raise for broken files, found by truncating and damaging files of every format above.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    AttributeError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def read_image(image: Any) -> Image.Image:
    """Read a picture and return it upright, as a new 8-bit RGB picture with no metadata but its colour profile.

    `image`: a path, a PIL picture or a uint8 array [H, W, 3] (RGB). EXIF rotation is applied first; 16-bit
    values are scaled to 8 bits; grey, palette, CMYK and other modes are converted; transparent pictures are
    composited on white. Raises InputError if it is no picture of FORMATS, is damaged or empty, holds several
    frames, has more than MAX_PIXELS pixels (by its header, before decoding) or a side under MIN_SIDE.
    """
    if isinstance(image, (str, os.PathLike)):
        with _opened(image) as (opened, name):
            return _upright_rgb(opened, name)
    if isinstance(image, Image.Image):
        return _upright_rgb(image, "the picture")
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise InputError(
        f"cannot read a picture from {type(image).__name__}; pass a path, a PIL picture or a "
        "uint8 array of shape (H, W, 3)"
    )


def read_mask(mask: Any, width: int, height: int) -> NDArray[np.float32]:
    """Read a mask for a picture of `width` x `height` (upright) pixels: float32 [H, W] in 0..1, where 1 may change.

    `mask`: a path or PIL picture (its brightness; transparent parts count as black), or an array [H, W] (a
    last axis of 1 is allowed) of bool, of float in 0..1, or of uint8 in 0..255; integers that never exceed 1
    are taken as 0 and 1. Raises InputError for another size, dtype or range, and for files as `read_image`
    does.
    """
    if isinstance(mask, (str, os.PathLike)):
        with _opened(mask) as (opened, name):
            values = _brightness(opened, name, (width, height))
    elif isinstance(mask, Image.Image):
        values = _brightness(mask, "the mask", (width, height))
    elif isinstance(mask, np.ndarray):
        values = _mask_values(mask)
    else:
        raise InputError(
            f"cannot read a mask from {type(mask).__name__}; pass a path, a PIL picture or an array of shape (H, W)"
        )
    if values.shape != (height, width):
        raise InputError(
            f"the mask is {values.shape[1]} x {values.shape[0]} pixels, the upright picture "
            f"{width} x {height}; "
            "give the mask the picture's size"
        )
    return values


def to_tensor(picture: Image.Image | NDArray[np.uint8]) -> Tensor:
    """8-bit RGB picture or array [H, W, 3] -> float32 tensor [1, 3, H, W] in [-1, 1], as v / 127.5 - 1."""
    import torch

    pixels = np.ascontiguousarray(np.asarray(picture, dtype=np.uint8))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def resize(image: Tensor, size: tuple[int, int], filter: str = "antialias") -> Tensor:
    """Resize an image tensor [B, C, H, W] to `size` (width, height), pixel centres and the range of values kept.

    "antialias": bicubic with a filter as wide as the reduction. "bilinear": four neighbours and no antialiasing, which
    is what OpenCV's default does and the published code uses.
    """
    import torch.nn.functional as F

    width, height = size
    if tuple(image.shape[-2:]) == (height, width):
        return image
    if filter == "bilinear":
        return F.interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=False)
    if filter != "antialias":
        raise InputError(f"resize filter is {filter!r}; it must be 'antialias' or 'bilinear'")
    resized = F.interpolate(image, (height, width), mode="bicubic", align_corners=False, antialias=True)
    # Bicubic weights overshoot at edges; without the clamp, white gets whiter than 1.
    return resized.clamp(image.amin(), image.amax())


def to_pixels(image: Tensor, rounding: str = "nearest") -> NDArray[np.uint8]:
    """Image tensor [1, 3, H, W] in [-1, 1] -> uint8 array [H, W, 3], clipped; (x / 2 + 1/2) * 255.

    "nearest" gives back exactly what `to_tensor` took; "truncate" cuts the fraction off, as the published
    code does (method specification, section 11). Raises DDEngineError if a value is not a number.
    """
    import torch

    values = image.detach().to("cpu", torch.float32)[0]
    if not torch.isfinite(values).all():
        raise DDEngineError("the edited picture holds values that are not finite; run again with dtype='float32'")
    values = (values / 2 + 0.5).clamp(0, 1) * 255
    values = values.round() if rounding == "nearest" else values.floor()
    return np.ascontiguousarray(values.to(torch.uint8).permute(1, 2, 0).numpy())


# Reading


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Image.Image, str]]:
    """Open a picture file: its header only, of a regular file, by one of the listed decoders."""
    name = os.fspath(path)
    try:
        file = Path(name)
        if file.is_dir():
            raise InputError(f"{name} is a folder; name a picture file in it")
        if not file.exists():
            hint = "; addresses are not fetched, download it first" if "://" in name else "; check the path"
            raise InputError(f"there is no file {name}{hint}")
        if not file.is_file():  # a pipe or device could block or never end
            raise InputError(f"{name} is not a regular file; copy the picture to one")
        if file.stat().st_size == 0:
            raise InputError(f"{name} is empty (zero bytes); it holds no picture")
        with _decoding(name), Image.open(file, formats=FORMATS) as opened:
            yield opened, name
    except UnicodeEncodeError as error:
        raise InputError(f"cannot read {name!r}: {error}; rename the file") from error


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what Pillow raises for bad files into InputError."""
    try:
        yield
    except DDEngineError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture of a known format; use one of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is above the limit of {MAX_PIXELS} pixels; scale it down ({error})") from error
    except PermissionError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}; change its permissions") from error
    except _DECODER_ERRORS as error:
        raise InputError(f"{name} is damaged or incomplete and cannot be read ({error}); save it again") from error


def _check_header(image: Image.Image, name: str) -> None:
    """Refuse by what the header says, before pixels are decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is {width} x {height} = {width * height} pixels, the limit is {MAX_PIXELS}; "
            "scale it down or crop it"
        )
    # Phones write MPO: a JPEG followed by a thumbnail, depth or brightness map. Its first frame is the picture.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise InputError(
            f"{name} holds {frames} frames (an animation or several pages); save the one to edit as a still picture"
        )


def _check_sides(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{name} is {width} x {height} pixels; each side must have at least {MIN_SIDE}, so scale it up first"
        )


def _upright(image: Image.Image, name: str) -> Image.Image:
    # Decoded before anything else looks at it: after a failed attempt Pillow hands out what it has as if it were whole.
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except _DECODER_ERRORS as error:
        log.warning("%s: its EXIF block is damaged and was ignored (%s)", name, error)
        return image


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    with _decoding(name):
        _check_header(image, name)
        _check_sides(*image.size, name)
        profile = image.info.get("icc_profile")
        upright = _eight_bit(_upright(image, name), name)
        if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            rgb = Image.new("RGB", rgba.size, "white")
            rgb.paste(rgba, mask=rgba.getchannel("A"))
        else:
            # Taken through bytes: the result shares nothing with the caller's picture.
            rgb = Image.fromarray(np.asarray(upright.convert("RGB")))
        rgb.info.clear()
        # A profile for CMYK or grey values says nothing about the RGB values made from them.
        if isinstance(profile, bytes) and profile[16:20] == b"RGB ":
            rgb.info["icc_profile"] = profile
        return rgb


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit grey to 8 bits (Pillow's own conversion clips); refuse values of unknown range."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{name} holds values from {values.min()} to {values.max()}; scale them to 8 or 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point values of unknown range; scale them to 8 bits")
    return image


def _from_array(array: NDArray[Any]) -> Image.Image:
    expected = "pass uint8 of shape (H, W, 3), RGB"
    if array.dtype != np.uint8:
        raise InputError(f"the picture array has dtype {array.dtype}; {expected}")
    if array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"the picture array has shape {array.shape}; {expected}")
    height, width = array.shape[:2]
    if width * height > MAX_PIXELS:
        raise InputError(
            f"the picture array holds {width * height} pixels, the limit is {MAX_PIXELS}; scale it down or crop it"
        )
    _check_sides(width, height, "the picture array")
    return Image.fromarray(np.ascontiguousarray(array))


def _brightness(image: Image.Image, name: str, size: tuple[int, int]) -> NDArray[np.float32]:
    with _decoding(name):
        _check_header(image, name)
        if sorted(image.size) != sorted(size):  # a rotation may still swap the sides
            raise InputError(
                f"{name} is {image.width} x {image.height} pixels, the upright picture {size[0]} "
                f"x {size[1]}; "
                "give the mask the picture's size"
            )
        upright = _eight_bit(_upright(image, name), name)
        if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            black = Image.new("RGB", rgba.size, "black")
            black.paste(rgba, mask=rgba.getchannel("A"))
            upright = black
        elif upright.mode == "CMYK":
            upright = upright.convert("RGB")
        return np.asarray(upright.convert("L"), dtype=np.float32) / np.float32(255)


def _mask_values(array: NDArray[Any]) -> NDArray[np.float32]:
    expected = "pass shape (H, W) of bool, uint8 (0 to 255) or float (0 to 1)"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"the mask array has shape {array.shape}; {expected}")
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        # Masks of zeros and ones are as common as masks of 0 and 255.
        return array.astype(np.float32) / np.float32(1 if array.max() <= 1 else 255)
    if np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float32)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InputError(
                f"the mask array holds values from {array.min()} to {array.max()}; they must be finite and from 0 to 1"
            )
        return values
    raise InputError(f"the mask array has dtype {array.dtype}; {expected}")
