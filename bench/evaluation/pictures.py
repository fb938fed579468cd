"""The report's pictures: reduced once, named by their content's digest, beside the page."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ddengine.artifacts import atomic_write, make_folder, sha256_bytes
from ddengine.bench.evaluation import folder as files
from ddengine.bench.evaluation.suites import Item, png
from ddengine.errors import DDEngineError

PICTURES = "report"
SIDE = 512  # the longest side of a picture in the page


@dataclass(frozen=True)
class Shown:
    """A picture of the page. at: its address; file: that of the whole picture; size: (width, height) at the first."""

    at: str
    file: str
    size: tuple[int, int]


class Pictures:
    """All pictures of a page. A picture that cannot be read is None."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.used = folder, set[str]()
        make_folder(folder / PICTURES)

    def input(self, item: Item) -> Shown | None:
        """An input picture; the page has a copy, since the set may lie anywhere."""
        try:
            content = item.picture()
        except DDEngineError:
            return None
        return self._reduced(sha256_bytes(content), lambda: content)

    def goal(self, item: Item) -> Shown | None:
        """What a drawn scene should have become."""
        from ddengine.bench.scenes import SIZE, held_out_drag

        content = png(held_out_drag(item.truth).goal.render(SIZE))
        return self._reduced(sha256_bytes(content), lambda: content)

    def result(self, slug: str, name: str, digest: str) -> Shown | None:
        """An edit, and its file as it was written."""
        path = self.folder / files.RESULTS / slug / name / files.PICTURE
        whole = "/".join(quote(os.fsencode(part)) for part in (files.RESULTS, slug, *name.split("/"), files.PICTURE))
        return self._reduced(digest, path.read_bytes, whole)

    def sweep(self) -> None:
        """Remove the pictures of former pages."""
        for path in (self.folder / PICTURES).glob("*.webp"):
            if path.name not in self.used:
                path.unlink(missing_ok=True)

    def _reduced(self, digest: str, content: Callable[[], bytes], whole: str | None = None) -> Shown | None:
        from PIL import Image

        from ddengine.image import read_image

        name = f"{digest[:20]}.webp"
        path = self.folder / PICTURES / name
        try:
            if not path.exists():
                picture = read_image(Image.open(io.BytesIO(content())))
                picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                file = io.BytesIO()
                picture.save(file, "WEBP", quality=88)
                atomic_write(path, file.getvalue())
            with Image.open(path) as kept:
                size = kept.size
        except (DDEngineError, OSError):
            return None
        self.used.add(name)
        at = f"{PICTURES}/{name}"
        return Shown(at, whole or at, size)
