"""The comparison as people read it: a table, what each system needed, and a sheet of all pictures."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ddengine.artifacts import save_picture
from ddengine.bench.peers.order import Order
from ddengine.draw import with_arrows

HEAD = (
    *("system", "edit, ms", "of our edit", "of our next", "next edit, ms", "invert", "drag", "denoise", "load"),
    *("LoRA", "updates", "ms an update", "memory, MB"),
)
TILE = 256


def rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of every system; what it does not have or was not measured is a dash."""
    return [_cells(row) for row in facts["systems"]]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = row.get("name") or row["system"]
    name = f"{name}, {row['preset']}" if row["own"] else name
    if "edit_ms" not in row:
        return (name, "failed", *["-"] * (len(HEAD) - 2))
    lora, memory = row["lora"], row["memory_bytes"]
    return (
        name,
        _spread(row["edit_ms"], _ms),
        _spread(row.get("ratio"), _ratio),
        _spread(row.get("ratio_next"), _ratio),
        _spread(row["next_ms"], _ms),
        *(_ms(row["ms"][group]) for group in ("invert", "drag", "denoise", "load")),
        f"{lora['seconds']:.3g} s for {lora['steps']} steps" if lora else "-",
        str(row["updates"]) if row["updates"] else "-",
        "-" if row["update_ms"] is None else _ms(row["update_ms"]),
        "-" if memory is None else f"{memory / 1e6:.0f}",
    )


def _spread(values: Mapping[str, Any] | None, shown: Any) -> str:
    if values is None:
        return "-"
    middle, low, high = (shown(values[name]) for name in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def markdown(facts: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    rule = ["---", *["---:"] * (len(HEAD) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, rule, *rows(facts)))


def needs(facts: Mapping[str, Any]) -> str:
    """What each system wanted and what was changed for it, in Markdown."""
    head = ("system", "commit", "wants beside picture and drags", "ran with", "passes of an edit", "noted")
    lines = [head, ["---"] * len(head)]
    for row in facts["systems"]:
        source = row["source"] or {}
        wanted = ", ".join(f"{what} ({why})" for what, why in (row["needs"] or {}).items()) or "nothing"
        versions = row["versions"] or {}
        ran = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers") if name in versions)
        counts = row.get("counts") or {}
        passes = f"{counts.get('forwards', 0)} forwards"
        if counts.get("pictures", 0) > counts.get("forwards", 0):
            passes += f" of {counts['pictures']} pictures"
        passes += f", {counts.get('backwards', 0)} backwards"
        said = [f"{field}={value}" for field, value in (row["changes"] or {}).items()]
        said += [] if row["own"] else [*(row["redirected"] or []), *(row["notes"] or [])]
        if row["stand_ins"]:
            said.append(f"stand-ins for {', '.join(row['stand_ins'])}")
        if row["error"]:
            said.insert(0, f"failed: {row['error']}")
        name = row.get("name") or row["system"]
        commit = f"{source['commit'][:7]}{' and changes' if source['dirty'] else ''}" if source.get("commit") else "-"
        lines.append(
            (f"{name}, {row['preset']}" if row["own"] else name, commit, wanted, ran or "-", passes,
             "; ".join(said) or "-")
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def conditions(facts: Mapping[str, Any]) -> str:
    """On what, how and how often."""
    about = facts["machine"]
    where = about.get("gpu", {}).get("name") or f"{about['processor']}, {facts['threads']} thread(s)"
    clock = next((row["clock"] for row in facts["systems"] if row["clock"]), "-")
    updates = f"{facts['updates']} updates an edit for all" if facts["updates"] else "each system's own updates"
    commit = about["commit"][:7] if about["commit"] else "unknown"
    lora = "none trained" if facts["lora_steps"] is None else f"{facts['lora_steps'] or 'published'} steps"
    return (
        f"Model {facts['model']} at {facts['size'][0]} x {facts['size'][1]}, {len(facts['drags'])} drag(s), {updates}, "
        f"LoRA: {lora}; {facts['rounds']} edits each in turns{', after one unmeasured' if facts['warm_up'] else ''}, "
        f"clock: {clock}; median (lowest to highest); {where}, torch {about['torch']}, commit {commit}"
        f"{' and changes' if about['dirty'] else ''}."
    )


def text(facts: Mapping[str, Any], *, terminal: bool | None = None) -> str:
    """What the command prints: drawn where someone watches a terminal, else Markdown; failures below it."""
    watched = sys.stdout.isatty() if terminal is None else terminal
    table = _drawn(facts) if watched else markdown(facts)
    failed = [f"{row['system']}: {row['error']}" for row in facts["systems"] if row["error"]]
    return "\n".join([table, "", conditions(facts), *failed])


def _drawn(facts: Mapping[str, Any]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    buffer = io.StringIO()
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(HEAD):
        drawn.add_column(name, justify="right" if number else "left")
    for cells, row in zip(rows(facts), facts["systems"], strict=True):
        drawn.add_row(*cells, style="red" if row["error"] else "bold" if row["own"] else None)
    Console(file=buffer, force_terminal=True).print(drawn)
    return buffer.getvalue().rstrip()


def contact_sheet(facts: Mapping[str, Any], order: Order, folder: Path) -> Path:
    """Before, arrows, and what each system made, in one picture; its path."""
    tiles = [("before", order.picture), ("the drags", with_arrows(order.picture, order.drags))]
    for row, cells in zip(facts["systems"], rows(facts), strict=True):
        path = folder / f"{row['system']}.png"
        if path.is_file():
            with Image.open(path) as picture:
                tiles.append((cells[0], picture.convert("RGB")))
    return save_picture(_sheet(tiles), folder / "sheet.png")


def _sheet(tiles: Sequence[tuple[str, Image.Image]], columns: int = 4) -> Image.Image:
    scale = TILE / max(tiles[0][1].size)
    width, height = (round(side * scale) for side in tiles[0][1].size)
    gap, line = 10, 22
    across = min(columns, len(tiles))
    down = -(-len(tiles) // across)
    sheet = Image.new("RGB", (gap + across * (width + gap), gap + down * (height + line + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (name, picture) in enumerate(tiles):
        x, y = gap + number % across * (width + gap), gap + number // across * (height + line + gap)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + height + 3), name, fill="black", font=font)
    return sheet
