"""Modules that stand in for imports which are missing in a peer's Python and which an edit does not depend on.

Runs in a peer's process. A stand-in has what peers call during an edit or import by name, done simply (a seed is set,
a mask resized, a picture cropped); everything else of it can be imported and named, and says so when it is called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import random
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class _Absent:
    """What a stand-in does not have."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{self._name} was called, but only a stand-in is here: install {self._name.split('.')[0]}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")


class StandIn(ModuleType):
    """A module of what it was given."""

    def __init__(self, name: str, **has: Any) -> None:
        super().__init__(name, "a stand-in")
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []
        self.__dict__.update(has)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


def install(name: str, *, always: bool = False) -> bool:
    """Put a stand-in for a missing module, dotted or not, into sys.modules; whether that was needed.

    always: even where the module can be imported.
    """
    top = name.partition(".")[0]
    have = sys.modules.get(top)
    if not isinstance(have, StandIn) and not always and importlib.util.find_spec(top) is not None:
        return False
    for part in _prefixes(name):
        if not isinstance(sys.modules.get(part), StandIn):
            sys.modules[part] = StandIn(part, **_KNOWN.get(part, dict)())
        parent, _, last = part.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, sys.modules[part])
    return True


def replace(name: str) -> None:
    """Put a stand-in for one module of a package that is itself there."""
    sys.modules[name] = StandIn(name)


def _prefixes(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[: count + 1]) for count in range(len(words))]


def _seeding() -> dict[str, Any]:
    def seed_everything(seed: int, workers: bool = False) -> int:
        import torch

        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return seed

    return {"seed_everything": seed_everything}


def _filling() -> dict[str, Any]:
    def c2_msra_fill(module: Any) -> None:
        import torch

        torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            torch.nn.init.constant_(module.bias, 0)

    return {"c2_msra_fill": c2_msra_fill}


def _browser() -> dict[str, Any]:
    """What a page's functions return and take by default; no page is shown."""
    shown = SimpleNamespace(update=lambda value=None, **_: value)
    return {"Image": shown, "Progress": lambda *_, **__: None, "SelectData": object}


def _resizing() -> dict[str, Any]:
    def resize(picture: Any, size: Any, *_: Any, **__: Any) -> Any:
        import torch

        return torch.nn.functional.interpolate(picture, tuple(size), mode="bilinear", antialias=True)

    return {"resize": resize}


def _transforms() -> dict[str, Any]:
    """The transforms of LoRA training; flips, colours and erasing leave the picture as it is: speed is the same."""

    class Each:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.arguments = arguments

        def __call__(self, picture: Any) -> Any:
            return picture

    class Compose(Each):
        def __call__(self, picture: Any) -> Any:
            for step in self.arguments[0]:
                picture = step(picture)
            return picture

    class Resize(Each):
        def __call__(self, picture: Any) -> Any:
            scale = self.arguments[0] / min(picture.size)
            return picture.resize([max(self.arguments[0], round(side * scale)) for side in picture.size], 2)

    class RandomCrop(Each):
        def __call__(self, picture: Any) -> Any:
            side = self.arguments[0]
            left, top = (random.randint(0, length - side) for length in picture.size)
            return picture.crop((left, top, left + side, top + side))

    class ToTensor(Each):
        def __call__(self, picture: Any) -> Any:
            import torch

            return torch.from_numpy(np.array(picture, np.float32).transpose(2, 0, 1) / 255)

    class Normalize(Each):
        def __call__(self, picture: Any) -> Any:
            return (picture - self.arguments[0][0]) / self.arguments[1][0]

    made = {kind.__name__: kind for kind in (Compose, Resize, RandomCrop, ToTensor, Normalize)}
    same = dict.fromkeys(("RandomHorizontalFlip", "ColorJitter", "RandomErasing"), Each)
    return {**made, **same, "InterpolationMode": SimpleNamespace(BILINEAR=2)}


_KNOWN: dict[str, Any] = {
    "pytorch_lightning": _seeding,
    "lightning": _seeding,
    "fvcore.nn.weight_init": _filling,
    "gradio": _browser,
    "torchvision.transforms": _transforms,
    "torchvision.transforms.functional": _resizing,
}
