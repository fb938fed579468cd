"""The engine: a loaded model that prepares pictures and edits them. Composition only; the method is directdrag's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddengine.backends import create_passes, select_backend
from ddengine.config import DirectDragConfig
from ddengine.directdrag.decode import decode
from ddengine.directdrag.edit import Record
from ddengine.directdrag.edit import edit as drag_edit
from ddengine.directdrag.points import image_points, points_for
from ddengine.directdrag.prepare import prepare
from ddengine.directdrag.preserve import change_weight, composite
from ddengine.drags import Drag, Spaces, fit, parse_drags
from ddengine.errors import InputError
from ddengine.image import read_image, read_mask, resize, to_pixels, to_tensor
from ddengine.models.load import Model, load_model
from ddengine.progress import Progress, Reporter, reporter
from ddengine.result import EditResult
from ddengine.source import Source

if TYPE_CHECKING:
    from ddengine.backends.passes import Passes

METHODS = ("directdrag",)
STAGES = ("load", "encode", "invert", "reference", "warp", "drag", "denoise", "decode")


class Engine:
    """A model on a device behind a backend. Safe to call from several threads: edits run one after the other."""

    def __init__(self, model: Model, backend: str = "auto") -> None:
        self.model = model
        self.backend = select_backend(backend)
        self._lock = threading.RLock()
        self._passes: dict[str, Passes] = {}

    @classmethod
    def load(
        cls,
        model: str | Path = "embedded",
        *,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        readout: str | Path | None = None,
        lora: str | Path | None = None,
        vae: str | Path | None = None,
    ) -> Engine:
        """Load a model: "embedded", a diffusers folder or a hub id of the Stable Diffusion 1.5 family.

        readout: a readout head (.safetensors); lora: a folder or file, fused; vae: another autoencoder.
        Raises ModelError, BackendUnavailable, or InputError for an unknown device, dtype or backend.
        """
        select_backend(backend)  # refuse before the weights are read
        return cls(load_model(model, device=device, dtype=dtype, readout=readout, lora=lora, vae=vae), backend)

    def prepare(
        self,
        image: Any,
        *,
        prompt: str = "",
        config: DirectDragConfig | str | None = None,
        progress: bool | Reporter | None = None,
    ) -> Source:
        """Encode, invert and record a picture, so that each later edit of it pays only for its drag.

        image: a path, PIL.Image or uint8 array [H, W, 3]. Edits may change everything in `config` but the trajectory
        (an edit with another one is refused). Raises InputError, ModelError, Cancelled.
        """
        settings = _settings(config)
        picture = read_image(image)
        with self._lock, reporter(progress, _plan(settings, only_prepare=True)) as report:
            return self._prepare(picture, prompt, settings, report)

    def edit(
        self,
        image: Any,
        drags: Iterable[Any],
        *,
        method: str = "directdrag",
        mask: Any = None,
        prompt: str = "",
        config: DirectDragConfig | str | None = None,
        seed: int = 0,
        progress: bool | Reporter | None = None,
    ) -> EditResult:
        """Move what lies at each drag's handle to its target.

        image: a `Source`, or what `prepare` takes. drags: pairs ((x, y), (x, y)) or `Drag`, in pixels of the upright
        picture. mask: picture-sized, where the picture may change (default: found from the drags). prompt: optional
        text. config: a preset's name or a DirectDragConfig. seed: seeds torch for the edit, which itself draws no
        random numbers. progress: None, True (a bar) or a callable. Raises InputError, ModelError, Cancelled.
        """
        if method not in METHODS:
            raise InputError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
        started = time.perf_counter()
        settings = _settings(config)
        source = image if isinstance(image, Source) else None
        picture = source.image if source is not None else read_image(image)
        arrows = parse_drags(drags, *picture.size)
        area = None if mask is None else read_mask(mask, *picture.size)
        if source is not None:
            self._check(source, prompt)
        plan = _plan(settings, prepared=source is not None)
        with self._lock, reporter(progress, plan) as report, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ready = source or self._prepare(picture, prompt, settings, report)
            result = self._edit(ready, arrows, area, settings, report)
        if source is None:
            result.timings.update({stage: ready.timings.get(stage, 0.0) for stage in ("encode", "invert", "reference")})
            result.passes.update(ready.passes)
        result.timings["total"] = time.perf_counter() - started
        return result

    def _prepare(self, picture: Image.Image, prompt: str, config: DirectDragConfig, report: Reporter) -> Source:
        passes = self._passes_for(prompt)
        spaces = _spaces(picture, self.model.size, config)
        kind = "antialias" if config.resize == "fit" else "bilinear"
        work = resize(to_tensor(picture), spaces.work_size, kind).to(passes.device)
        prepared = prepare(passes, work, config, report)
        return Source(picture, work, spaces, prepared, self.model.digest, prompt)

    def _edit(
        self, source: Source, drags: tuple[Drag, ...], area: Any, config: DirectDragConfig, report: Reporter
    ) -> EditResult:
        passes, spaces = self._passes_for(source.prompt), source.spaces
        handles_yx, targets_yx = points_for(config, drags, spaces)
        user_mask = None if area is None else _work_mask(area, spaces)
        edited = drag_edit(
            passes, source.prepared, handles_yx, targets_yx, config, user_mask=user_mask, progress=report
        )
        started = time.perf_counter()
        image = self._picture(passes, source, edited.latent, user_mask, config)
        image.info.update(source.image.info)  # the colour profile, where the input had one
        seconds = time.perf_counter() - started
        report(Progress("decode", 1, 1, edited.handles_yx, edited.latent))
        full_mask = _resized_mask(edited.mask, source.image.size)
        points = [tuple(map(float, xy)) for xy in image_points(config, edited.handles_yx, spaces)]
        reason = f"{self.backend.name} ({self.backend.reason})"
        return EditResult(
            image=image,
            handles=tuple(points),
            mask=full_mask,
            timings={stage: edited.timings.get(stage, 0.0) for stage in STAGES} | {"decode": seconds},
            passes=dict(edited.passes),
            history=tuple(_history(record, config, spaces) for record in edited.history),
            backend=dict.fromkeys(STAGES[1:], reason),
            notes=self.model.notes,
        )

    def _picture(
        self, passes: Passes, source: Source, latent: Tensor, user_mask: Tensor | None, config: DirectDragConfig
    ) -> Image.Image:
        edited = decode(passes, latent, source.spaces.work_hw)
        if not config.preserve:
            picture = Image.fromarray(to_pixels(edited, config.output_rounding))
            return picture if config.resize == "shrink" else picture.resize(source.image.size, Image.Resampling.BICUBIC)
        unedited = decode(passes, source.prepared.unedited, source.spaces.work_hw)
        weight = change_weight(edited, unedited, user_mask)
        return Image.fromarray(composite(np.asarray(source.image), edited, weight))

    def _passes_for(self, prompt: str) -> Passes:
        if prompt not in self._passes:
            self._passes = {prompt: create_passes(self.backend.name, self.model, prompt)}
        return self._passes[prompt]

    def _check(self, source: Source, prompt: str) -> None:
        if source.model != self.model.digest:
            raise InputError(
                f"the source was prepared with model {source.model[:12]}, this engine holds {self.model.digest[:12]}; "
                f"prepare the picture with this engine"
            )
        if prompt and prompt != source.prompt:
            raise InputError(
                f"the source was prepared with prompt {source.prompt!r}; prepare it with prompt={prompt!r}"
            )


def edit(
    image: Any,
    drags: Iterable[Any],
    *,
    model: str | Path = "embedded",
    method: str = "directdrag",
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    mask: Any = None,
    prompt: str = "",
    config: DirectDragConfig | str | None = None,
    seed: int = 0,
    progress: bool | Reporter | None = None,
) -> EditResult:
    """Move what lies at each drag's handle to its target, in one call; see `Engine.load` and `Engine.edit`.

    The engine of a (model, backend, device, dtype) is loaded once per process, so a second call pays only for the edit.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    # Everything that can be wrong with the input is found before the seconds that loading takes.
    settings = _settings(config)
    if not isinstance(image, Source):
        image = read_image(image)
        drags = parse_drags(drags, *image.size)
        mask = None if mask is None else read_mask(mask, *image.size)
    started = time.perf_counter()
    engine = _engine(str(model), backend, device, dtype)
    loading = time.perf_counter() - started
    result = engine.edit(
        image, drags, method=method, mask=mask, prompt=prompt, config=settings, seed=seed, progress=progress
    )
    result.timings["load"] = loading
    result.timings["total"] += loading
    return result


@lru_cache(maxsize=2)
def _engine(model: str, backend: str, device: str, dtype: str) -> Engine:
    return Engine.load(model, backend=backend, device=device, dtype=dtype)


def _settings(config: DirectDragConfig | str | None) -> DirectDragConfig:
    if isinstance(config, DirectDragConfig):
        return config
    if config is None or isinstance(config, str):
        return DirectDragConfig.preset(config or "default")
    raise InputError(f"config is a {type(config).__name__}; pass a DirectDragConfig or a preset's name")


def _plan(config: DirectDragConfig, *, prepared: bool = False, only_prepare: bool = False) -> dict[str, int]:
    """Expected steps of each stage, for a progress bar; an edit may take fewer."""
    steps = round(config.inversion_strength * config.n_inference_step)
    updates = config.drag_end_step * config.track_per_step * config.max_drag_per_track
    first = {} if prepared else {"encode": 1, "invert": steps, "reference": steps}
    return first if only_prepare else {**first, "warp": 1, "drag": updates, "denoise": steps, "decode": 1}


def _spaces(picture: Image.Image, size: int, config: DirectDragConfig) -> Spaces:
    if config.resize == "fit":
        return fit(*picture.size, size)
    return fit(*picture.size, size, upscale=False, snap=1)


def _work_mask(mask: np.ndarray, spaces: Spaces) -> Tensor:
    """A picture-sized mask at the working size: a working pixel is free where any of its part of the mask is."""
    work = resize(torch.from_numpy(np.ascontiguousarray(mask))[None, None], spaces.work_size, "bilinear")
    return (work[0, 0] > 0.5).float()


def _resized_mask(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    whole = torch.nn.functional.interpolate(
        mask[None, None].float().cpu(), size[::-1], mode="bilinear", align_corners=False
    )
    return whole[0, 0].clamp(0, 1).numpy()


def _history(record: Record, config: DirectDragConfig, spaces: Spaces) -> dict[str, Any]:
    facts = {name: getattr(record, name) for name in (
        "step", "t", "drag_loss", "background_loss", "readout_loss", "total_loss", "updated")}  # fmt: skip
    points = image_points(config, torch.tensor(record.handles_yx), spaces)
    return {**facts, "handles": [tuple(map(float, xy)) for xy in points]}
