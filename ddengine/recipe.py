"""One edit as data: a JSON file that replays it to the same pixels, the call that makes it, the command that makes it.

A file is text that nobody trusts: every field is checked, and a picture other than the one it was made for is refused.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ddengine.artifacts import StrPath, atomic_write, check_writable, sha256_bytes
from ddengine.config import PRESETS, RULES, DirectDragConfig
from ddengine.drags import Drag, parse_drags
from ddengine.errors import InputError
from ddengine.image import MAX_PIXELS, MIN_SIDE
from ddengine.request import check_method, checked_mask, checked_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT, VERSION = "ddengine-edit", 1
SUFFIX = ".json"
MAX_BYTES = 32 << 20  # of a file; without a mask one has about 3 KB
MAX_TEXT = 4096  # letters of a prompt, a path or a name
MAX_WORK_SIDE = 4096


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the pixels of one edit but the picture itself, of which it holds size and digest.

    image_size: (width, height) of the upright picture. image_sha256: `picture_digest` of it. drags: in its pixels.
    mask: an 8-bit grey PNG of that size, white where it may change, or None. model to dtype: what `Engine.load` takes
    (size: long side of the working picture). Raises InputError for values no edit could have.
    """

    image_size: tuple[int, int]
    image_sha256: str
    drags: tuple[Drag, ...]
    config: DirectDragConfig
    prompt: str = ""
    seed: int = 0
    mask: bytes | None = None
    method: str = "directdrag"
    model: str = "embedded"
    readout: str | None = None
    lora: str | None = None
    vae: str | None = None
    size: int | None = None
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_method(self.method)
        checked_seed(self.seed)
        check_prompt(self.prompt)
        object.__setattr__(self, "drags", parse_drags(self.drags, *self.image_size))
        self.area()

    def area(self) -> NDArray[np.float32] | None:
        """The mask as float32 [H, W] in 0..1 (see `Engine.edit`), None without one."""
        if self.mask is None:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size has to be the picture's
                picture = Image.open(io.BytesIO(self.mask), formats=("PNG",))
        except Image.DecompressionBombError as error:  # raised for the size in its header
            raise InputError(
                f"the edit's mask has far more pixels than the limit of {MAX_PIXELS} ({error}); save the edit again"
            ) from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise InputError("the edit's mask is no PNG picture; save the edit again") from error
        return checked_mask(picture, self.image_size)

    def check_picture(self, picture: Image.Image) -> None:
        """InputError if this edit was made for another picture (an upright RGB one, as `read_image` returns)."""
        wanted = self.image_size
        if picture.size != wanted:
            raise InputError(
                f"the edit was made for a picture of {wanted[0]} x {wanted[1]} pixels, this one has {picture.width} x "
                f"{picture.height}; give the picture it was made for, or make the edit anew with --drag"
            )
        digest = picture_digest(picture)
        if digest != self.image_sha256:
            raise InputError(
                f"the edit was made for another picture: its pixels have SHA-256 {self.image_sha256[:12]}, this one's "
                f"{digest[:12]}; give the picture it was made for (a lossless copy), or make the edit anew with --drag"
            )

    def to_json(self) -> str:
        """The text that `parse` reads."""
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "image": {"size": list(self.image_size), "sha256": self.image_sha256},
            "drags": [{"handle": _short(drag.handle), "target": _short(drag.target)} for drag in self.drags],
            "mask": None if self.mask is None else base64.b64encode(self.mask).decode("ascii"),
            **{name: getattr(self, name) for name in _PLAIN},
            "config": self.config.to_dict(),
        }
        text = json.dumps(facts, indent=1, allow_nan=False)
        return re.sub(r"\[\n\s+([-\d.e+]+),\n\s+([-\d.e+]+)\n\s+\]", r"[\1, \2]", text) + "\n"  # points on a line

    def save(self, path: StrPath) -> Path:
        """Write the file atomically; InputError for another suffix or a path that cannot be written."""
        return atomic_write(check_recipe_path(path), self.to_json().encode())


def check_prompt(prompt: str) -> None:
    """InputError for a prompt that cannot be written in UTF-8, which is what models read."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt has half a surrogate pair (letter {error.start + 1}, {prompt[error.start]!r}), which is no "
            f"letter of any text; remove it"
        ) from error


def picture_digest(picture: Image.Image) -> str:
    """SHA-256, in hexadecimal, of an upright picture's RGB bytes, row by row."""
    return sha256_bytes(picture.convert("RGB").tobytes())


def mask_png(area: NDArray[np.float32] | None) -> bytes | None:
    """A mask [H, W] in 0..1 as the PNG of a recipe; InputError for values that 8 bits do not hold."""
    if area is None:
        return None
    levels = np.rint(area * 255).astype(np.uint8)
    if (levels.astype(np.float32) / np.float32(255) != area).any():
        raise InputError(
            "the mask has values that are no multiples of 1/255, which an edit file cannot hold; round them"
        )
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", optimize=True)
    return file.getvalue()


def check_recipe_path(path: StrPath) -> Path:
    """`check_writable`, and the suffix must be .json; InputError otherwise."""
    if Path(path).suffix.lower() != SUFFIX:
        raise InputError(f"cannot write the edit to {path}: it is no {SUFFIX} name; end it in {SUFFIX}")
    return check_writable(path)


def read_recipe(path: StrPath) -> Recipe:
    """Read what `Recipe.save` wrote; InputError, naming the file, for anything else."""
    file = Path(path)
    try:
        if not file.is_file():
            raise InputError(f"there is no file {path}; name an edit's {SUFFIX} file")
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {error}; name an edit's {SUFFIX} file") from error
    return parse(data, path)


def parse(data: bytes | str, where: object = "the edit") -> Recipe:
    """The recipe in a file's content, every field checked; InputError, naming `where`, for any that is wrong."""
    if len(data) > MAX_BYTES:
        raise InputError(f"{where} has more than {MAX_BYTES} bytes, the limit of an edit; save the edit again")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        facts = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except InputError as error:
        raise _unusable(where, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _unusable(where, f"it is no JSON text ({error})") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise _unusable(where, f"it is no edit: its format is not {FORMAT!r}")
    found = facts.get("version")
    if found != VERSION or not _whole(found):
        raise _unusable(where, f"its version is {_shown(found)}, this ddengine reads version {VERSION}")
    _check_names(where, "it", facts, {"format", "version", *_FIELDS})
    for name, (allowed, test) in _FIELDS.items():
        if not test(facts[name]):
            raise _unusable(where, f"its {name} is {_shown(facts[name])}, not {allowed}")
    image, config = facts["image"], facts["config"]
    _check_names(where, "its config", config, set(RULES))
    try:
        mask = None if facts["mask"] is None else base64.b64decode(facts["mask"], validate=True)
        return Recipe(
            image_size=(image["size"][0], image["size"][1]),
            image_sha256=image["sha256"],
            drags=tuple(Drag(tuple(drag["handle"]), tuple(drag["target"])) for drag in facts["drags"]),
            mask=mask,
            config=DirectDragConfig(**config),
            **{name: facts[name] for name in _PLAIN},
        )
    except InputError as error:
        raise _unusable(where, str(error)) from error
    except ValueError as error:  # of the decoder
        raise _unusable(where, f"its mask is not base64 ({error})") from error


def python_call(recipe: Recipe, image: str = "picture.png", output: str = "out.png", mask: str = "mask.png") -> str:
    """The Python program that makes this edit of the picture in the file `image`; `mask` is used if there is one."""
    arrows = ", ".join(f"({_point(drag.handle)}, {_point(drag.target)})" for drag in recipe.drags)
    where = _changed(recipe, ("model", "readout", "lora", "vae", "size", "backend", "device", "dtype"))
    how: dict[str, Any] = {"mask": mask} if recipe.mask is not None else {}
    how = {name: _quoted(value) for name, value in {**how, **_changed(recipe, ("prompt",))}.items()}
    preset, changes = nearest_preset(recipe.config)
    if changes:
        words = ", ".join([_quoted(preset), *(f"{name}={_quoted(value)}" for name, value in changes.items())])
        how["config"] = f"ddengine.DirectDragConfig.preset({words})"
    elif preset != "default":
        how["config"] = _quoted(preset)
    how |= {name: repr(value) for name, value in _changed(recipe, ("seed",)).items()}
    loads = {name: _quoted(value) for name, value in where.items()}
    lines = ["import ddengine", ""]
    given = [_quoted(image), f"[{arrows}]"]
    if any(name in where for name in ("readout", "lora", "vae", "size")):  # which the short form does not take
        lines += _call("engine = ddengine.Engine.load", [f"{name}={value}" for name, value in loads.items()])
        call = "engine.edit"
    else:
        how, call = {**loads, **how}, "ddengine.edit"
    lines += _call(f"result = {call}", [*given, *(f"{name}={value}" for name, value in how.items())])
    return "\n".join([*lines, f"result.save({_quoted(output)})", ""])


def command_line(recipe: Recipe, image: str = "picture.png", output: str = "out.png", mask: str = "mask.png") -> str:
    """The command that makes this edit of the picture in the file `image`; `mask` is used if there is one."""
    words = ["ddengine", "edit", _file(image)]
    for drag in recipe.drags:
        ends = (",".join(_number(value) for value in point) for point in (drag.handle, drag.target))
        words += ["--drag", ":".join(ends)]
    words += ["-o", _file(output)]
    words += ["--mask", _file(mask)] if recipe.mask is not None else []
    preset, changes = nearest_preset(recipe.config)
    words += ["--config", preset] if preset != "default" else []
    for name, value in changes.items():
        words += ["--set", f"{name}={_text(value)}"]
    names = ("prompt", "model", "readout", "lora", "vae", "size", "backend", "device", "dtype", "seed")
    for name, value in _changed(recipe, names).items():
        words += [f"--{name}", str(value)]
    return shlex.join(words)


def nearest_preset(config: DirectDragConfig) -> tuple[str, dict[str, Any]]:
    """The preset from which the fewest changes lead to a configuration, and those changes."""
    wanted = config.to_dict()
    found = {}
    for name in PRESETS:
        preset = DirectDragConfig.preset(name).to_dict()
        found[name] = {key: value for key, value in wanted.items() if preset[key] != value}
    return min(found.items(), key=lambda item: len(item[1]))


# Reading


def _unusable(where: object, what: str) -> InputError:
    return InputError(f"{where} cannot be replayed: {what}; save the edit again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError("it has a field twice")
    return found


def _no_number(word: str) -> None:
    raise InputError(f"it holds {word}, which is no number")


def _check_names(where: object, what: str, found: Mapping[str, Any], known: set[str]) -> None:
    if odd := sorted(found.keys() ^ known):
        raise _unusable(where, f"{what} lacks, or should not have, {', '.join(name[:40] for name in odd[:4])}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _text_field(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and "\0" not in value


def _name_field(value: Any) -> bool:
    return _text_field(value) and bool(value)


def _path_field(value: Any) -> bool:
    return value is None or _name_field(value)


def _pair(value: Any) -> bool:
    number = (int, float)
    return isinstance(value, list) and len(value) == 2 and all(type(part) in number for part in value)


def _image_field(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"size", "sha256"}:
        return False
    size, digest = value["size"], value["sha256"]
    sides = isinstance(size, list) and len(size) == 2 and all(_whole(side, MIN_SIDE, MAX_PIXELS) for side in size)
    return sides and size[0] * size[1] <= MAX_PIXELS and bool(re.fullmatch("[0-9a-f]{64}", str(digest)))


def _drags_field(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(drag, dict) and drag.keys() == {"handle", "target"} and all(map(_pair, drag.values()))
        for drag in value
    )


_NAME, _PATH = f"a text of 1 to {MAX_TEXT} letters", f"null or a text of 1 to {MAX_TEXT} letters"
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "image": (
        f"{{size: [width, height], sha256: 64 hexadecimal digits}} of a picture with sides of at least {MIN_SIDE} and "
        f"at most {MAX_PIXELS} pixels",
        _image_field,
    ),
    "drags": ("a list of {handle: [x, y], target: [x, y]}", _drags_field),
    "config": ("an object", lambda value: isinstance(value, dict)),
    "prompt": (f"a text of at most {MAX_TEXT} letters", _text_field),
    "seed": ("a whole number from 0 to 2**63 - 1", lambda value: _whole(value, 0, 2**63 - 1)),
    "mask": ("null or a PNG picture in base64", lambda value: value is None or isinstance(value, str)),
    "method": (_NAME, _name_field),
    "model": (_NAME, _name_field),
    "readout": (_PATH, _path_field),
    "lora": (_PATH, _path_field),
    "vae": (_PATH, _path_field),
    "size": (
        f"null or a whole number from 8 to {MAX_WORK_SIDE}",
        lambda value: value is None or _whole(value, 8, MAX_WORK_SIDE),
    ),
    "backend": (_NAME, _name_field),
    "device": (_NAME, _name_field),
    "dtype": (_NAME, _name_field),
}
_PLAIN = tuple(name for name in _FIELDS if name not in {"image", "drags", "config", "mask"})


# Writing


def _changed(recipe: Recipe, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields among `names` whose value is not the default, which callers need not write."""
    defaults = Recipe.__dataclass_fields__
    return {name: getattr(recipe, name) for name in names if getattr(recipe, name) != defaults[name].default}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _short(point: tuple[float, float]) -> list[float]:
    return [int(value) if value == int(value) else value for value in point]


def _point(point: tuple[float, float]) -> str:
    return f"({_number(point[0])}, {_number(point[1])})"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(value: Any) -> str:
    """As Python writes it, but a plain text between double quotes."""
    text = repr(value)
    plain = isinstance(value, str) and '"' not in value and text == f"'{value}'"
    return f'"{value}"' if plain else text


def _file(name: str) -> str:
    return f"./{name}" if name.startswith("-") else name  # which would be read as an option


def _call(start: str, arguments: list[str], width: int = 88) -> list[str]:
    line = f"{start}({', '.join(arguments)})"
    if len(line) <= width:
        return [line]
    return [f"{start}(", *(f"    {argument}," for argument in arguments), ")"]
