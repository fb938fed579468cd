"""What an Accept header asks for, among what there is (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from ddengine.serve.faults import Fault
from ddengine.serve.pictures import MEDIA

JSON = "application/json"


def media_for(accept: str, among: tuple[str, ...] = (*MEDIA, JSON)) -> str:
    """The media type to answer with: the one of the highest weight, of equals the first of `among`; Fault."""
    weights = {media: _weight(accept, media) for media in among}
    best = max(among, key=lambda media: weights[media])
    if weights[best] == 0:
        raise Fault("not_acceptable", f"Accept allows none of {', '.join(among)}")
    return best


def _weight(accept: str, media: str) -> float:
    """The weight of the most specific range that a media type falls under."""
    ranges = {media: 2, f"{media.partition('/')[0]}/*": 1, "*/*": 0}
    best, found = -1, 0.0
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if ranges.get(name, -1) > best:
            best, found = ranges[name], _quality(parameters)
    return found


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return min(max(float(parameter[2:]), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0
