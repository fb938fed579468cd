"""Working sizes as people write them."""

from __future__ import annotations

from ddengine.errors import InputError


def parse_size(text: str) -> tuple[int, int]:
    """(rows, columns) of "512" or "768x512" (width x height), in pixels; InputError for anything else."""
    width, cross, height = text.lower().partition("x")
    try:
        size = int(height if cross else width), int(width)
    except ValueError:
        size = 0, 0
    if not all(16 <= side <= 4096 for side in size):
        raise InputError(f"size {text!r} is not a side or WIDTHxHEIGHT of 16 to 4096 pixels; for example 512, 768x512")
    return size
