"""What an edit is asked for: refused or made definite before anything is loaded or computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ddengine.config import DirectDragConfig
from ddengine.drags import Spaces, fit
from ddengine.errors import InputError
from ddengine.image import read_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

METHODS = ("directdrag",)
ANY_SIZE = 512  # stands for a model's size where only the refusals of the size rule matter


def check_method(method: Any) -> None:
    """InputError for a method that does not exist."""
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")


def checked_settings(config: DirectDragConfig | str | None) -> DirectDragConfig:
    """The configuration a user means by one, by a preset's name or by None; InputError for anything else."""
    if isinstance(config, DirectDragConfig):
        return config
    if config is None or isinstance(config, str):
        return DirectDragConfig.preset(config or "default")
    raise InputError(f"config is a {type(config).__name__}; pass a DirectDragConfig or a preset's name")


def checked_mask(mask: Any, size: tuple[int, int]) -> NDArray[np.float32] | None:
    """`read_mask`, None for None; InputError also for a mask that frees nothing."""
    if mask is None:
        return None
    area = read_mask(mask, *size)
    if not (area > 0.5).any():
        raise InputError(
            f"the mask leaves nothing free to change: its largest value is {area.max():.2f}, a free pixel has more "
            f"than 0.5 of 1; make the part to edit white"
        )
    return area


def checked_seed(seed: Any) -> int:
    """A seed as an int; InputError for what torch would not take."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed!r}; it must be a whole number from 0 to 2**63 - 1")
    return int(seed)


def plan_of(config: DirectDragConfig, *, prepared: bool = False, only_prepare: bool = False) -> dict[str, int]:
    """Expected steps of each stage, for a progress bar; an edit may take fewer."""
    steps = round(config.inversion_strength * config.n_inference_step)
    updates = config.drag_end_step * config.track_per_step * config.max_drag_per_track
    first = {} if prepared else {"encode": 1, "invert": steps, "reference": steps}
    return first if only_prepare else {**first, "warp": 1, "drag": updates, "denoise": steps, "decode": 1}


def spaces_for(picture: Image.Image, size: int, config: DirectDragConfig) -> Spaces:
    """All coordinate spaces of an edit of the picture by a model of a working size; InputError by `fit`."""
    if config.resize == "fit":
        return fit(*picture.size, size)
    return fit(*picture.size, size, upscale=False, snap=1)
