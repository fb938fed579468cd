"""What a saved source says of itself, as JSON that nobody trusts: every field is checked, and that they agree."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from ddengine.config import RULES, DirectDragConfig
from ddengine.drags import MIN_WORK_SIDE, Spaces, fit
from ddengine.errors import InputError
from ddengine.image import MAX_PIXELS, MIN_SIDE

FORMAT = 1
ENTRY = "ddengine.source"  # the one entry of the file's metadata: safetensors writes several in no fixed order
MAX_WORK_SIDE = 4096  # of a model
DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Header:
    """What a saved source says of itself; the fields of `Source` and `Prepared`, and these:

    guided: holds readout maps. followed: steps of the unedited trajectory. layers: self-attentions whose keys and
    values it holds, 0 for none. channels_last: names of the maps whose channels lie innermost in memory. versions: of
    ddengine and torch, that wrote it.
    """

    image_size: tuple[int, int]
    work_size: tuple[int, int]
    config: DirectDragConfig
    times: tuple[int, ...]
    spacing: int
    model: str
    prompt: str
    device: str
    dtype: str
    guided: bool
    followed: int
    layers: int
    channels_last: tuple[str, ...]
    passes: dict[str, dict[str, int]]
    timings: dict[str, float]
    versions: dict[str, str]

    @property
    def spaces(self) -> Spaces:
        """All coordinate spaces, which follow from the sizes."""
        longest = max(self.work_size)
        if self.config.resize == "fit":
            return fit(*self.image_size, longest)
        return fit(*self.image_size, longest, upscale=False, snap=1)

    @property
    def latent_dtype(self) -> str:
        """Latents are float32 at least."""
        return "float64" if self.dtype == "float64" else "float32"

    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file that `parse` reads."""
        return {ENTRY: json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)}


def unusable(where: object, what: str) -> InputError:
    """The error for a saved source that cannot be used."""
    return InputError(f"{where}: {what}; prepare the picture again and save it")


def parse(metadata: Mapping[str, str] | None, where: object) -> Header:
    """The header in the metadata of a file, every field checked; InputError, naming `where`, for any that is wrong."""
    text = (metadata or {}).get(ENTRY)
    if text is None:
        raise unusable(where, "is a safetensors file but no prepared source")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unusable(where, f"its header is not JSON ({error})") from error
    found = facts.pop("format", None) if isinstance(facts, dict) else None
    if found != FORMAT or isinstance(found, bool):
        raise unusable(where, f"its format is {found!r}, this version of ddengine reads format {FORMAT}")
    known = {item.name for item in fields(Header)}
    if odd := sorted(known ^ facts.keys()):
        raise unusable(where, f"its header lacks, or should not have, {', '.join(odd[:4])}")
    for name, (allowed, test) in _FIELDS.items():
        if not test(facts[name]):
            shown = repr(facts[name])
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise unusable(where, f"its {name} is {shown}, not {allowed}")
    if odd := sorted(RULES.keys() ^ facts["config"].keys()):
        raise unusable(where, f"its configuration, of another version, lacks or should not have {', '.join(odd[:4])}")
    tuples = {name: tuple(facts[name]) for name in ("image_size", "work_size", "times", "channels_last")}
    try:
        header = Header(**{**facts, **tuples, "config": DirectDragConfig(**facts["config"])})
        wrong = _contradiction(header)
    except InputError as error:
        raise unusable(where, str(error)) from error
    if wrong:
        raise unusable(where, wrong)
    return header


def _contradiction(header: Header) -> str | None:
    """What a header says that cannot be true if the rest is."""
    config, times = header.config, header.times
    steps = round(config.inversion_strength * config.n_inference_step)
    if header.spaces.work_size != header.work_size:
        return (
            f"its working size is {header.work_size}, that of its {header.image_size} pixels {header.spaces.work_size}"
        )
    if len(times) != steps or any(a - b != header.spacing for a, b in pairwise(times)):
        return (
            f"its times are {len(times)} from {times[0] if times else None}, expected {steps}, {header.spacing} apart"
        )
    if not max(config.drag_end_step, steps if header.layers else 0) <= header.followed <= steps:
        return f"it follows {header.followed} of {steps} steps, {config.drag_end_step} of them with drags"
    return None


def _whole(value: Any, low: int = 0, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _size(value: Any, low: int, high: int) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_whole(side, low, high) for side in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _each(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(test, value.values()))


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "image_size": (
        f"[width, height] of at least {MIN_SIDE} each and at most {MAX_PIXELS} pixels",
        lambda value: _size(value, MIN_SIDE, MAX_PIXELS) and value[0] * value[1] <= MAX_PIXELS,
    ),
    "work_size": (
        f"[width, height] from {MIN_WORK_SIDE} to {MAX_WORK_SIDE}",
        lambda value: _size(value, MIN_WORK_SIDE, MAX_WORK_SIDE),
    ),
    "config": ("an object", lambda value: isinstance(value, dict)),
    "times": ("a list of whole numbers from 0", lambda value: isinstance(value, list) and all(map(_whole, value))),
    "spacing": ("a whole number from 1", lambda value: _whole(value, 1)),
    "model": ("a digest of 64 hexadecimal digits", lambda value: bool(re.fullmatch("[0-9a-f]{64}", str(value)))),
    "prompt": ("a text", _text),
    "device": ("a text", _text),
    "dtype": (f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES),
    "guided": ("true or false", lambda value: isinstance(value, bool)),
    "followed": ("a whole number from 0", _whole),
    "layers": ("a whole number from 0", _whole),
    "channels_last": ("a list of names", lambda value: isinstance(value, list) and all(map(_text, value))),
    "passes": ("counts by stage and direction", lambda value: _each(value, lambda counts: _each(counts, _whole))),
    "timings": ("seconds by stage", lambda value: _each(value, _seconds)),
    "versions": ("texts by name", lambda value: _each(value, _text)),
}
