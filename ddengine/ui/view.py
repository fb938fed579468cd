"""What the editor shows of a picture: at a size for screens, with arrows, the soft mask and handles on their way."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ddengine.drags import Drag, Point
from ddengine.draw import display_factor, with_arrows, with_dots
from ddengine.ui.arrows import Arrows

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SHOWN = 1024  # long side of what is sent to a browser
NEAR = 0.03  # of the long side: how near to an arrow's end a click picks it up, unless the browser says less
_VEIL = (28, 32, 48)  # over what is held still
_VEIL_SHARE = 0.5


@dataclass(frozen=True)
class View:
    """A picture's size and the size it is shown at, both (width, height), and the maps between their pixels."""

    size: tuple[int, int]

    @property
    def shown(self) -> tuple[int, int]:
        longest = max(self.size)
        if longest < MAX_SHOWN:
            factor = display_factor(self.size)
            return self.size[0] * factor, self.size[1] * factor
        width, height = (max(1, round(side * MAX_SHOWN / longest)) for side in self.size)
        return width, height

    def picture_at(self, share: tuple[float, float]) -> Point:
        """Shares 0..1 of the shown picture's width and height -> (x, y) of the picture; anything else: its border."""
        x, y = (
            min(max(part, 0.0), 1.0) * side - 0.5 if math.isfinite(part) else 0.0
            for part, side in zip(share, self.size, strict=True)
        )
        return x, y

    def shown_at(self, point: Point) -> Point:
        """(x, y) of the picture -> (x, y) of the shown one; pixel centres are kept."""
        x, y = (
            (value + 0.5) * shown / side - 0.5 for value, shown, side in zip(point, self.shown, self.size, strict=True)
        )
        return x, y

    def near(self, share: float) -> float:
        """Pixels of the picture within which an end is picked up, for a browser's share of the shown width."""
        pixels = share * self.size[0] if math.isfinite(share) else 0.0
        return min(max(pixels, 0.0), NEAR * 2 * max(self.size)) or NEAR * max(self.size)

    def enlarge(self, picture: Image.Image) -> Image.Image:
        """A picture of any size at the shown one."""
        return picture if picture.size == self.shown else picture.resize(self.shown, Image.Resampling.BICUBIC)

    def arrows(self, drags: Iterable[Drag]) -> list[Drag]:
        """Drags on the shown picture."""
        return [Drag(self.shown_at(drag.handle), self.shown_at(drag.target)) for drag in drags]


def draw_arrows(shown: Image.Image, view: View, arrows: Arrows) -> Image.Image:
    """The shown picture with all arrows, the dot of one begun and a ring around the end that is held."""
    drawn = with_arrows(shown, view.arrows(arrows.drags))
    if arrows.start is not None:
        drawn = with_dots(drawn, handles=[view.shown_at(arrows.start)])
    if arrows.held is not None:
        number, end = arrows.held
        drawn = with_dots(drawn, rings=[view.shown_at(getattr(arrows.drags[number], end))])
    return drawn


def draw_travel(preview: Image.Image, view: View, handles: Sequence[Point], targets: Sequence[Point]) -> Image.Image:
    """A preview at the shown size with handles where they are now and arrows along what is left of their ways."""
    ways = list(zip(map(view.shown_at, handles), map(view.shown_at, targets), strict=True))
    far = [Drag(here, there) for here, there in ways if math.dist(here, there) > 0.02 * max(view.shown)]
    drawn = with_arrows(view.enlarge(preview), far)
    close = [way for way in ways if Drag(*way) not in far]
    return with_dots(drawn, targets=[there for _, there in close], handles=[here for here, _ in close])


def veil(shown: Image.Image, mask: NDArray[np.float32]) -> Image.Image:
    """The shown picture, darker the more the mask [H, W] in 0..1 holds it still; where it may change as it is."""
    share = _VEIL_SHARE * (1 - mask[..., None])
    pixels = np.asarray(shown, dtype=np.float32) * (1 - share) + np.array(_VEIL, dtype=np.float32) * share
    return Image.fromarray(pixels.round().astype(np.uint8))


def data_url(picture: Image.Image) -> str:
    """A picture as an address that holds it, for an `img`; JPEG of good quality, since it is for looking at."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
