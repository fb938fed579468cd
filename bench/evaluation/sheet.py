"""A contact sheet as one picture, of a run's first samples: input with its drags, rows' edits, the right answer.

`python -m ddengine.bench.evaluation.sheet FOLDER OUT.png --row baseline --row +SM+RG+LWF` makes it from the folder of a
run; the report is the whole of it, this is a page of it for a document.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ddengine.artifacts import atomic_write, sha256_bytes
from ddengine.bench.evaluation import folder as files
from ddengine.bench.evaluation.run import RESULT
from ddengine.bench.evaluation.suites import Item, Suite, read_suite
from ddengine.bench.evaluation.tables import shown
from ddengine.bench.evaluation.view import SHORT, Facts, edited, value_of
from ddengine.draw import with_arrows
from ddengine.errors import InputError
from ddengine.image import FORMATS, read_image

GAP, EDGE = 12, 16  # pixels between tiles, and around all
HEAD, LINE = 30, 19  # pixels of the headings, and of a line below a tile
INK, FAINT, EMPTY = "#1c1c1f", "#6b6b73", "#ececf0"
PICTURES = "Pictures"  # the PNG's text with the digests of the edits that it shows


@dataclass(frozen=True)
class Tile:
    """A picture with two lines below it; without a picture, a place that says so."""

    picture: Image.Image | None
    line: str = ""
    below: str = ""


def sheet(facts: Facts, suite: Suite, folder: Path, rows: Sequence[str] = (), count: int = 6, side: int = 256) -> bytes:
    """A PNG of the first `count` samples by name, each tile's long side `side` pixels; rows: all that edit by default.

    facts, suite: of the run whose folder it is. Which edits are shown is in the PNG's text "Pictures": their digests by
    sample and row. Raises InputError for an unknown row, and for an edit that is not the one that was judged.
    """
    rows = list(rows) or edited(facts)
    for row in rows:
        if row not in edited(facts):
            raise InputError(f"there is no row {row!r} in the run; it has {', '.join(edited(facts))}")
    heads = ["input and drag", *rows, *(["right answer"] if suite.drawn else [])]
    digests: dict[str, dict[str, str]] = {}
    strips = []
    for item in suite.items[:count]:
        if item.name not in facts["edits"]:
            raise InputError(f"the run has no sample {item.name}; name the set that it was carried out on")
        found = facts["edits"][item.name]["rows"]
        digests[item.name] = {row: found[row]["picture"] for row in rows if "picture" in found.get(row, {})}
        strip = [Tile(_input(item, side), item.name, item.prompt)]
        strip += [_edit(facts, folder, item.name, row, digests[item.name].get(row), side) for row in rows]
        if suite.drawn:
            strip.append(Tile(_tile(_goal(item), side)))
        strips.append(strip)
    about = PngInfo()
    about.add_text(PICTURES, json.dumps(digests))
    file = io.BytesIO()
    _drawn(heads, strips, side).save(file, "PNG", optimize=True, pnginfo=about)
    return file.getvalue()


def pictures_of(png: Path) -> Any:
    """The digests of the edits that a sheet shows, by sample and row."""
    with Image.open(png) as picture:
        return json.loads(picture.info[PICTURES])


def _drawn(heads: Sequence[str], strips: Sequence[Sequence[Tile]], side: int) -> Image.Image:
    heights = [
        max((tile.picture.height for tile in strip if tile.picture is not None), default=side) for strip in strips
    ]
    width = 2 * EDGE + len(heads) * side + (len(heads) - 1) * GAP
    below = 2 if any(tile.below for strip in strips for tile in strip) else 1
    room = 4 + below * LINE + GAP
    canvas = Image.new("RGB", (width, EDGE + HEAD + sum(height + room for height in heights)), "white")
    draw, y = ImageDraw.Draw(canvas), EDGE
    columns = [EDGE + number * (side + GAP) for number in range(len(heads))]
    for x, words in zip(columns, heads, strict=True):
        _line(draw, (x, y), words, 17, INK, side)
    y += HEAD
    for strip, height in zip(strips, heights, strict=True):
        for x, tile in zip(columns, strip, strict=True):
            if tile.picture is None:
                draw.rectangle((x, y, x + side - 1, y + height - 1), fill=EMPTY)
                _line(draw, (x + 12, y + height // 2 - 8), "no edit", 14, FAINT, side)
            else:
                canvas.paste(tile.picture, (x, y))
            _line(draw, (x, y + height + 4), tile.line, 13, INK, side)
            _line(draw, (x, y + height + 4 + LINE), tile.below, 13, FAINT, side)
        y += height + room
    return canvas


def _line(draw: ImageDraw.ImageDraw, at: tuple[int, int], words: str, size: int, fill: str, width: int) -> None:
    """One line of text, cut where it would run into the next column."""
    font = ImageFont.load_default(size)
    while words and draw.textlength(words, font) > width:
        words = words[:-2].rstrip(" .") + "\u2026" if len(words) > 2 else ""
    draw.text(at, words, fill=fill, font=font)


def _edit(facts: Facts, folder: Path, sample: str, row: str, digest: str | None, side: int) -> Tile:
    if digest is None:
        return Tile(None, "failed")
    path = folder / files.RESULTS / facts["rows"][row]["slug"] / sample / files.PICTURE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; carry out the run again") from error
    if sha256_bytes(content) != digest:
        raise InputError(f"{path} is not the edit that {RESULT} tells of; carry out the run again")
    figures = [
        f"{_name(figure)} {shown(value, figure['digits'])} {figure['unit']}".rstrip()
        for figure in facts["figures"]
        if (value := value_of(facts, sample, row, figure["name"])) is not None
    ]
    picture = read_image(Image.open(io.BytesIO(content), formats=FORMATS))
    return Tile(_tile(picture, side), ", ".join(figures[:3]), ", ".join(figures[3:]))


def _name(figure: Facts) -> str:
    """A figure's short name without its unit, which follows the value."""
    name: str = figure["name"]
    return SHORT.get(name, name).partition(",")[0].replace("_", " ")


def _input(item: Item, side: int) -> Image.Image:
    picture = read_image(Image.open(io.BytesIO(item.picture()), formats=FORMATS))
    # Arrows are drawn at the tile's own scale or above it: reduced, they keep their shape.
    factor = max(1, round(side / max(picture.size)))
    return _tile(with_arrows(picture, item.drags, factor), side)


def _goal(item: Item) -> Image.Image:
    from ddengine.bench.scenes import SIZE, held_out_drag

    return held_out_drag(item.truth).goal.render(SIZE)


def _tile(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)


def _result(path: Path) -> Any:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}); name the folder of a run that went to its end") from error
    if not isinstance(facts, dict) or facts.get("format") != files.FORMAT:
        raise InputError(f"{path} is no result of this version; carry out the run again")
    return facts


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m ddengine.bench.evaluation.sheet", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a run of ddengine eval")
    parser.add_argument("output", type=Path, help="the PNG")
    parser.add_argument("--row", action="append", default=[], help="a row to show; repeatable, all by default")
    parser.add_argument("--count", type=int, default=6, help="so many samples, the first by name")
    parser.add_argument("--side", type=int, default=256, help="long side of a tile in pixels")
    parser.add_argument("--data", type=Path, help="the set's folder; drawn scenes need none")
    asked = parser.parse_args(words)
    if asked.count < 1 or not 32 <= asked.side <= 2048:
        parser.error("--count is at least 1, --side from 32 to 2048")
    try:
        facts = _result(asked.folder / RESULT)
        suite = read_suite(facts["suite"], asked.data, count=facts["samples"], limit=asked.count)
        atomic_write(asked.output, sheet(facts, suite, asked.folder, asked.row, asked.count, asked.side))
    except InputError as error:
        parser.error(str(error))
    print(f"wrote {asked.output}")


if __name__ == "__main__":
    main()
