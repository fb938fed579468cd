"""The engine: a loaded model that prepares pictures and edits them. Composition only; the method is directdrag's."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
from ddengine.directdrag.edit import Edited, Record
from ddengine.directdrag.edit import edit as drag_edit
from ddengine.directdrag.mask import work_mask
from ddengine.directdrag.points import image_points, points_for
from ddengine.directdrag.prepare import prepare
from ddengine.directdrag.preserve import change_weight, composite
from ddengine.directdrag.run import Step
from ddengine.drags import Drag, Spaces, parse_drags
from ddengine.errors import InputError
from ddengine.image import read_image, resize, to_pixels, to_tensor
from ddengine.models.load import Model, load_model
from ddengine.progress import Progress, Reporter, reporter
from ddengine.request import (
    ANY_SIZE,
    check_method,
    checked_mask,
    checked_seed,
    checked_settings,
    plan_of,
    spaces_for,
)
from ddengine.result import EditResult
from ddengine.source import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddengine.backends.passes import Passes

SMALL_MODEL = 256  # working pixels along the long side up to which one CPU thread serves a model best
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
        with torch.inference_mode(False):  # what is made in that mode can never take part in a gradient
            loaded = load_model(model, device=device, dtype=dtype, readout=readout, lora=lora, vae=vae)
        return cls(loaded, backend)

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
        settings = checked_settings(config)
        picture = read_image(image)
        plan = plan_of(settings, only_prepare=True)
        with self._lock, reporter(progress, plan) as report, _own_torch_state(self.model):
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
        picture. mask: picture-sized, white where the picture may change; with `preserve`, black pixels stay (default:
        found from the drags). prompt: optional text. config: a preset's name or a DirectDragConfig. seed: 0 to 2**63 -
        1, seeds torch for the edit, which itself draws no random numbers. progress: None, True (a bar) or a callable.
        The caller's random state and gradient mode are left alone. Raises InputError, ModelError, Cancelled.
        """
        check_method(method)
        started = time.perf_counter()
        settings, seed = checked_settings(config), checked_seed(seed)
        source = image if isinstance(image, Source) else None
        picture = source.image if source is not None else read_image(image)
        arrows = parse_drags(drags, *picture.size)
        area = checked_mask(mask, picture.size)
        if source is not None:
            self._check(source, prompt)
        plan = plan_of(settings, prepared=source is not None)
        with self._lock, reporter(progress, plan) as report, _own_torch_state(self.model, seed):
            ready = source or self._prepare(picture, prompt, settings, report)
            result = self._edit(ready, arrows, area, settings, report)
        if source is None:
            result.timings.update({stage: ready.timings.get(stage, 0.0) for stage in ("encode", "invert", "reference")})
            result.passes.update(ready.passes)
        result.timings["total"] = time.perf_counter() - started
        return result

    def _prepare(self, picture: Image.Image, prompt: str, config: DirectDragConfig, report: Reporter) -> Source:
        passes = self._passes_for(prompt)
        spaces = spaces_for(picture, self.model.size, config)
        kind = "antialias" if config.resize == "fit" else "bilinear"
        work = resize(to_tensor(picture), spaces.work_size, kind).to(passes.device)
        prepared = prepare(passes, work, config, _teller(report, passes, config, spaces))
        return Source(picture, spaces, prepared, self.model.digest, prompt, passes.device, passes.dtype)

    def _edit(
        self,
        source: Source,
        drags: tuple[Drag, ...],
        area: NDArray[np.float32] | None,
        config: DirectDragConfig,
        report: Reporter,
    ) -> EditResult:
        passes, spaces = self._passes_for(source.prompt), source.spaces
        handles_yx, targets_yx = points_for(config, drags, spaces)
        user_mask = None if area is None else work_mask(torch.from_numpy(area), spaces.work_hw)
        tell = _teller(report, passes, config, spaces)
        edited = drag_edit(passes, source.prepared, handles_yx, targets_yx, config, user_mask=user_mask, progress=tell)
        started = time.perf_counter()
        image = _picture(passes, source, edited, area, user_mask, config)
        image.info.update(source.image.info)  # the colour profile, where the input had one
        seconds = time.perf_counter() - started
        tell(Step("decode", 1, 1, edited.handles_yx, edited.latent))
        full_mask = _resized_mask(edited.mask, source.image.size)
        points = [(float(x), float(y)) for x, y in image_points(config, edited.handles_yx, spaces)]
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
        here = (self.model.device, self.model.dtype)
        if (source.device, source.dtype) != here:
            raise InputError(
                f"the source was prepared on {source.device} in {source.dtype}, this engine computes on {here[0]} in "
                f"{here[1]}; prepare the picture with this engine"
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
    check_method(method)
    # Everything that can be wrong with the input is found before the seconds that loading takes.
    settings, seed = checked_settings(config), checked_seed(seed)
    if not isinstance(image, Source):
        image = read_image(image)
        spaces_for(image, ANY_SIZE, settings)  # for its refusals
        drags = parse_drags(drags, *image.size)
        mask = checked_mask(mask, image.size)
    plan = {"load": 1, **plan_of(settings, prepared=isinstance(image, Source))}
    with reporter(progress, plan) as report:
        started = time.perf_counter()
        engine = _loaded(model, backend, device, dtype)
        loading = time.perf_counter() - started
        report(Progress("load", 1, 1))
        result = engine.edit(
            image, drags, method=method, mask=mask, prompt=prompt, config=settings, seed=seed, progress=report
        )
    result.timings["load"] = loading
    result.timings["total"] += loading
    return result


_LOADING = threading.Lock()


def _loaded(model: str | Path, backend: str, device: str, dtype: str) -> Engine:
    name = str(model)
    if name != "embedded" and os.path.isdir(folder := os.path.expanduser(name)):
        name = os.path.realpath(folder)
    with _LOADING:  # two threads that want the same engine load it once
        return _engine(name, backend, device, dtype)


@lru_cache(maxsize=2)
def _engine(model: str, backend: str, device: str, dtype: str) -> Engine:
    return Engine.load(model, backend=backend, device=device, dtype=dtype)


@contextmanager
def _own_torch_state(model: Model, seed: int = 0) -> Iterator[None]:
    """Gradients possible, random numbers seeded, cuDNN repeatable, whatever the caller has set and will find again.

    A small model on the CPU runs on one thread: a second one gains a fifth on idle cores, and on busy ones threads that
    wait for each other cost ten times as much.
    """
    device = model.device
    cuda, cudnn = device.type == "cuda", torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    threads = torch.get_num_threads()
    alone = device.type == "cpu" and model.size <= SMALL_MODEL
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[device] if cuda else []),
    ):
        torch.default_generator.manual_seed(seed)
        if alone:
            torch.set_num_threads(1)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
            cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before
            if alone:
                torch.set_num_threads(threads)


def _teller(report: Reporter, passes: Passes, config: DirectDragConfig, spaces: Spaces) -> Callable[[Step], None]:
    """Tells a user's reporter the method's steps, in the user's own coordinates and pictures."""

    def tell(at: Step) -> None:
        def preview() -> Image.Image:
            assert at.latent is not None
            return Image.fromarray(to_pixels(decode(passes, at.latent, spaces.work_hw), config.output_rounding))

        points = None if at.points_yx is None else image_points(config, at.points_yx, spaces)
        report(Progress(at.stage, at.step, at.total, points, None if at.latent is None else preview))

    return tell


def _picture(
    passes: Passes,
    source: Source,
    edited: Edited,
    area: NDArray[np.float32] | None,
    user_mask: Tensor | None,
    config: DirectDragConfig,
) -> Image.Image:
    size_hw = source.spaces.work_hw
    after = decode(passes, edited.latent, size_hw)
    if edited.unedited is None:
        picture = Image.fromarray(to_pixels(after, config.output_rounding))
        return picture.resize(source.image.size, Image.Resampling.BICUBIC)
    weight = change_weight(after, decode(passes, edited.unedited, size_hw), user_mask)
    return Image.fromarray(composite(np.asarray(source.image), after, weight, area))


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
