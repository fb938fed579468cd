"""The engine: a loaded model that prepares pictures and edits them. Composition only; the method is directdrag's."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddengine.backends import create_passes, make_ready, select_backend, what_ran
from ddengine.backends.build import build_command
from ddengine.backends.engines import Wanted, wanted_passes
from ddengine.backends.graphs import PassShape
from ddengine.config import DirectDragConfig
from ddengine.directdrag.decode import decode
from ddengine.directdrag.drag import StepShape
from ddengine.directdrag.edit import Edited, Record, Task, edit_batch
from ddengine.directdrag.mask import edit_mask, work_mask
from ddengine.directdrag.memory import check_budget
from ddengine.directdrag.points import image_points, points_for
from ddengine.directdrag.prepare import prepare
from ddengine.directdrag.preserve import change_weight, composite
from ddengine.directdrag.readout import uses_readout
from ddengine.directdrag.run import Step
from ddengine.drags import Drag, Spaces, parse_drags
from ddengine.errors import InputError
from ddengine.image import read_image, resize, to_pixels, to_tensor
from ddengine.memory_errors import memory_errors
from ddengine.models.identity import LoRA
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
from ddengine.torch_state import drawing_weights, working

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddengine.backends.passes import Passes

SMALL_MODEL = 256  # working pixels along the long side up to which one CPU thread serves a model best
KNOWN_IDENTITIES = 8  # whose sources may be edited without naming the identity again; at rank 16 and SD 1.5 13 MB each
PREPARING = ("encode", "invert", "reference")
STAGES = ("load", *PREPARING, "warp", "drag", "denoise", "decode")


class Engine:
    """A model on a device behind a backend. Safe to call from several threads: edits run one after the other."""

    def __init__(
        self, model: Model, backend: str = "auto", *, build: bool = False, described: Sequence[str] = ()
    ) -> None:
        """build: see `load`. described: the command line's words for the model, to name in messages."""
        self.model = model
        self.backend = select_backend(backend)
        self._build, self._described = build, tuple(described)
        self._lock = threading.RLock()
        self._passes: dict[str, tuple[str, Passes]] = {}  # by the model's digest, for one prompt
        self._fused: Model | None = None  # the model with the identity last used
        self._identities: dict[str, LoRA] = {}  # by the digest of the model with it, the last used last

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
        size: int | None = None,
        build: bool = False,
    ) -> Engine:
        """Load a model: "embedded", a diffusers folder or a hub id of the Stable Diffusion 1.5 family.

        readout: a readout head (.safetensors); lora: a folder or file, fused; vae: another autoencoder. size: long side
        of the working pictures in pixels, a multiple of 8 (default: what the model was made for). build: what the
        named backend lacks for a picture's size is built before its first edit, which takes minutes; otherwise a
        BackendUnavailable says what to run.
        Raises ModelError, BackendUnavailable, or InputError for an unknown device, dtype or backend.
        """
        select_backend(backend)  # refuse before the weights are read
        # What is made in inference mode can never take part in a gradient.
        with torch.inference_mode(False), drawing_weights():
            loaded = load_model(model, device=device, dtype=dtype, readout=readout, lora=lora, vae=vae, size=size)
        parts = {"readout": readout, "lora": lora, "vae": vae, "device": device, "precision": dtype}
        words = ["--model", str(model)]
        for name, value in parts.items():
            words += [f"--{name}", str(value)] if value not in (None, "auto") else []
        return cls(loaded, backend, build=build, described=words)

    def prepare(
        self,
        image: Any,
        *,
        prompt: str = "",
        config: DirectDragConfig | str | None = None,
        identity: LoRA | None = None,
        budget: int | None = None,
        progress: bool | Reporter | None = None,
    ) -> Source:
        """Encode, invert and record a picture, so that each later edit of it pays only for its drag.

        image: a path, PIL.Image or uint8 array [H, W, 3]. Edits may change everything in `config` but the trajectory
        (an edit with another one is refused). identity: as in `edit`, which then uses the same. budget: bytes of the
        device that the keys and values of the trajectory may take (a picture of 512 x 512: 0.83 GiB in half precision);
        by default a quarter of a GPU's free memory, elsewhere 1 GiB. Beyond it they are kept in a GPU's host, and where
        there is no room, or with 0, made again in each edit, to the same pixels. Raises InputError, ModelError,
        Cancelled.
        """
        settings = checked_settings(config)
        check_budget(budget)
        self._check_identity(identity)
        picture = read_image(image)
        plan = plan_of(settings, only_prepare=True)
        with self._lock, reporter(progress, plan) as report, _working(self.model):
            return self._prepare(picture, prompt, self._model_with(identity), settings, report, budget)

    def fit_identity(
        self,
        image: Any,
        steps: int = 70,
        rank: int = 16,
        *,
        prompt: str = "",
        seed: int = 0,
        compile: bool | None = None,
        progress: bool | Reporter | None = None,
    ) -> LoRA:
        """Fit a LoRA to a picture, so that the model knows what it shows; edits with it are as fast as without.

        image: what `prepare` takes. compile: torch.compile for the training step; None does so where this engine's
        backend is "compile" and its device a GPU, never on a CPU. The engine's own weights stay as they are; equal
        seeds give equal LoRAs. Raises InputError, ModelError, Cancelled, and BackendUnavailable without PEFT.
        """
        from ddengine.training.identity import check_fit, fit

        seed = checked_seed(seed)
        check_fit(steps, rank)
        picture = read_image(image)
        if compile is None:
            compile = self.backend.name == "compile" and self.model.device.type == "cuda"
        plan = {"identity": steps}
        with self._lock, reporter(progress, plan) as report, _working(self.model):
            return fit(
                self.model, picture, prompt=prompt, steps=steps, rank=rank, seed=seed, compile=compile,
                report=lambda step, total: report(Progress("identity", step, total)),
            )  # fmt: skip

    def edit(
        self,
        image: Any,
        drags: Iterable[Any],
        *,
        method: str = "directdrag",
        mask: Any = None,
        prompt: str = "",
        config: DirectDragConfig | str | None = None,
        identity: LoRA | None = None,
        seed: int = 0,
        progress: bool | Reporter | None = None,
    ) -> EditResult:
        """Move what lies at each drag's handle to its target.

        image: a `Source`, or what `prepare` takes. drags: pairs ((x, y), (x, y)) or `Drag`, in pixels of the upright
        picture. mask: picture-sized, white where the picture may change; with `preserve`, black pixels stay (default:
        found from the drags). prompt: optional text. config: a preset's name or a DirectDragConfig (default: the
        `Source`'s own). identity: a LoRA from `fit_identity`; a `Source` prepared with one is edited with it. seed: 0
        to 2**63 - 1, for methods that draw random numbers: directdrag draws none. progress: None, True (a bar) or a
        callable. The caller's random state and gradient mode are left alone. Raises InputError, ModelError, Cancelled.
        """
        check_method(method)
        started = time.perf_counter()
        settings = _settings_for(image, config)
        checked_seed(seed)
        source = image if isinstance(image, Source) else None
        picture = source.image if source is not None else read_image(image)
        arrows = parse_drags(drags, *picture.size)
        area = checked_mask(mask, picture.size)
        self._check_identity(identity)
        if source is not None:
            identity = self._check(source, prompt, identity)
        plan = plan_of(settings, prepared=source is not None)
        with self._lock, reporter(progress, plan) as report, _working(self.model):
            model = self._model_with(identity)
            ready = source or self._prepare(picture, prompt, model, settings, report, editing=True)
            before = self._preparation([] if source else [ready], prompt, model)
            (result,) = self._edit([ready], [arrows], [area], model, settings, report)
        before.add_to(result)
        result.timings["total"] = time.perf_counter() - started
        return result

    def soft_mask(
        self, image: Any, drags: Iterable[Any], *, config: DirectDragConfig | str | None = None
    ) -> NDArray[np.float32]:
        """Where an edit with these drags and no mask would be free to change the picture, without editing it.

        image: a `Source`, or what `prepare` takes. float32 [H, W] in 0..1 at its size, 1 where it may change: the
        `mask` of the edit's result. Raises InputError.
        """
        settings = _settings_for(image, config)
        picture = image.image if isinstance(image, Source) else read_image(image)
        arrows = parse_drags(drags, *picture.size)
        spaces = spaces_for(picture, self.model.size, settings)
        mask = edit_mask(*points_for(settings, arrows, spaces), spaces.feature_hw, settings)
        return _resized_mask(mask, picture.size)

    def edit_batch(
        self,
        edits: Iterable[Sequence[Any]],
        *,
        prompt: str = "",
        config: DirectDragConfig | str | None = None,
        identity: LoRA | None = None,
        seed: int = 0,
        progress: bool | Reporter | None = None,
    ) -> list[EditResult]:
        """Several edits at once, each as `edit` would do it up to rounding; their pictures have one working size.

        edits: (image, drags) or (image, drags, mask), each part as in `edit`; equal pictures are prepared once if they
        are given as one object, best as a `Source`. The other arguments hold for all. timings and passes of every
        result are the batch's, with what preparing its pictures took; each has its own decode. `progress` tells no
        points and no previews. Raises what `edit` does.
        """
        started = time.perf_counter()
        wanted = _checked_batch(edits)
        settings = _settings_for(wanted[0][0], config)
        checked_seed(seed)
        self._check_identity(identity)
        given: dict[int, Any] = {id(image): image for image, _, _ in wanted}
        pictures = {
            key: image.image if isinstance(image, Source) else read_image(image) for key, image in given.items()
        }
        arrows = [parse_drags(drags, *pictures[id(image)].size) for image, drags, _ in wanted]
        areas = [checked_mask(mask, pictures[id(image)].size) for image, _, mask in wanted]
        found = [self._check(image, prompt, identity) for image in given.values() if isinstance(image, Source)]
        if len({one and one.digest for one in found}) > 1:
            raise InputError("the sources of a batch were prepared with different identities; edit them one by one")
        identity = found[0] if found else identity
        plan = plan_of(settings, prepared=True)
        with self._lock, reporter(progress, plan) as report, _working(self.model):
            model = self._model_with(identity)
            sources = {
                key: image
                if isinstance(image, Source)
                else self._prepare(pictures[key], prompt, model, settings, report)
                for key, image in given.items()
            }
            ready = [sources[id(image)] for image, _, _ in wanted]
            if len({source.prompt for source in ready}) > 1:
                raise InputError("the sources of a batch were prepared with different prompts; edit them one by one")
            fresh = [source for key, source in sources.items() if source is not given[key]]
            before = self._preparation(fresh, prompt, model)
            results = self._edit(ready, arrows, areas, model, settings, report)
        for result in results:
            before.add_to(result)
            result.timings["total"] = time.perf_counter() - started
        return results

    def passes(self, prompt: str = "") -> Passes:
        """The network passes that edits with this prompt run through; they take one edit at a time.

        Raises ModelError for a prompt without a text encoder.
        """
        with self._lock:
            return self._passes_for(prompt, self.model)

    def _prepare(
        self,
        picture: Image.Image,
        prompt: str,
        model: Model,
        config: DirectDragConfig,
        report: Reporter,
        budget: int | None = None,
        editing: bool = False,
    ) -> Source:
        passes = self._passes_for(prompt, model)
        spaces = spaces_for(picture, self.model.size, config)
        # All that the edit will run too: what is missing is said, or built, before minutes of work.
        make_ready(passes, _wanted(passes, config, spaces, preparing=True, editing=editing), report)
        kind = "antialias" if config.resize == "fit" else "bilinear"
        work = resize(to_tensor(picture), spaces.work_size, kind).to(passes.device)
        with memory_errors(passes.device, spaces.work_hw):
            prepared = prepare(passes, work, config, _teller(report, passes, config, spaces), kv_budget=budget)
        return Source(picture, spaces, prepared, model.digest, prompt, passes.device, passes.dtype)

    def _preparation(self, fresh: Sequence[Source], prompt: str, model: Model) -> _Preparation:
        """What preparing some pictures took and what ran it; to be asked before anything else runs."""
        timings = {stage: sum(source.timings.get(stage, 0.0) for source in fresh) for stage in PREPARING}
        passes: dict[str, Counter[str]] = {}
        for source in fresh:
            for stage, calls in source.passes.items():
                passes.setdefault(stage, Counter()).update(calls)
        ran = dict.fromkeys(PREPARING, "prepared before")
        if fresh:
            ran = what_ran(self._passes_for(prompt, model), self.backend, editing=False)
        return _Preparation(timings, {stage: dict(calls) for stage, calls in passes.items()}, ran)

    def _edit(
        self,
        sources: Sequence[Source],
        drags: Sequence[tuple[Drag, ...]],
        areas: Sequence[NDArray[np.float32] | None],
        model: Model,
        config: DirectDragConfig,
        report: Reporter,
    ) -> list[EditResult]:
        passes, spaces = self._passes_for(sources[0].prompt, model), sources[0].spaces
        tasks, masks = [], []
        for source, arrows, area in zip(sources, drags, areas, strict=True):
            masks.append(None if area is None else work_mask(torch.from_numpy(area), source.spaces.work_hw))
            tasks.append(Task(source.prepared, *points_for(config, arrows, source.spaces), masks[-1]))
        make_ready(passes, _wanted(passes, config, spaces, preparing=False, editing=True), report)
        tell = _teller(report, passes, config, spaces)
        results = []
        with memory_errors(passes.device, spaces.work_hw, len(tasks)):
            edits = edit_batch(passes, tasks, config, progress=tell)
            for number, (source, edited) in enumerate(zip(sources, edits, strict=True)):
                started = time.perf_counter()
                image = _picture(passes, source, edited, areas[number], masks[number], config)
                image.info.update(source.image.info)  # the colour profile, where the input had one
                seconds = time.perf_counter() - started
                alone = len(edits) == 1
                points_yx, latent = (edited.handles_yx, edited.latent) if alone else (None, None)
                tell(Step("decode", number + 1, len(edits), points_yx, latent))
                points = image_points(config, edited.handles_yx, source.spaces)
                results.append(
                    EditResult(
                        image=image,
                        handles=tuple((float(x), float(y)) for x, y in points),
                        mask=_resized_mask(edited.mask, source.image.size),
                        timings={stage: edited.timings.get(stage, 0.0) for stage in STAGES} | {"decode": seconds},
                        passes=dict(edited.passes),
                        history=tuple(_history(record, config, source.spaces) for record in edited.history),
                        backend={},
                        notes=model.notes,
                    )
                )
        ran = what_ran(passes, self.backend, editing=True)
        if edits[0].unit:
            ran["drag"] = edits[0].unit
        for result in results:
            result.backend.update(ran)
        return results

    def _passes_for(self, prompt: str, model: Model) -> Passes:
        held = self._passes.get(model.digest)
        if held is None or held[0] != prompt:
            passes = create_passes(
                self.backend.name, model, prompt, building=self._build, remedy=partial(self._remedy, model)
            )
            held = self._passes[model.digest] = (prompt, passes)
        return held[1]

    def _remedy(self, model: Model, backend: str, shape: PassShape | StepShape) -> str:
        """What to do where a backend has nothing built for a shape."""
        if model is not self.model:
            return "load the engine with build=True (--build): a model with an identity is built by its own engine"
        if isinstance(shape, StepShape):
            height, width = (8 * cells for cells in shape.latent_hw)
            size = PassShape((height, width), batch=shape.edits)
            command = f"{build_command(self._described, backend, size)} --points {shape.pairs}"
            return f"run `{command}` with the edit's --config and --set, or load the engine with build=True (--build)"
        return f"run `{build_command(self._described, backend, shape)}`, or load the engine with build=True (--build)"

    def _model_with(self, identity: LoRA | None) -> Model:
        """The model, or its copy with an identity in its weights, of which there is never more than one."""
        if identity is None:
            return self.model
        digest = identity.model_digest
        self._identities.pop(digest, None)
        self._identities[digest] = identity
        if len(self._identities) > KNOWN_IDENTITIES:
            del self._identities[next(iter(self._identities))]
        if self._fused is None or self._fused.digest != digest:
            if self._fused is not None:
                self._passes.pop(self._fused.digest, None)
                self._fused = None
            self._fused = identity.fused(self.model)
        return self._fused

    def _check_identity(self, identity: Any) -> None:
        if identity is not None and not isinstance(identity, LoRA):
            raise InputError(
                f"identity is a {type(identity).__name__}; pass what fit_identity returned, or LoRA.load(FILE)"
            )
        if identity is not None:
            identity.check(self.model)

    def _check(self, source: Source, prompt: str, identity: LoRA | None) -> LoRA | None:
        """The identity to edit a source with; InputError for a source that cannot be edited here or not like this."""
        found = identity or self._identities.get(source.model)
        if found is None and source.model != self.model.digest:
            raise InputError(
                f"the source was prepared with model {source.model[:12]}, this engine holds {self.model.digest[:12]}; "
                f"prepare the picture with this engine, or pass the identity it was prepared with: identity=..."
            )
        if found is not None and found.model_digest != source.model:
            raise InputError(
                f"the source was not prepared with this identity ({found.digest[:12]}); prepare it with identity=..., "
                f"or leave identity out to edit it as it was prepared"
            )
        here = (self.model.device, self.model.dtype)
        if (source.device, source.dtype) != here:
            raise InputError(
                f"the source was prepared on {source.device} in {source.dtype}, this engine computes on {here[0]} in "
                f"{here[1]}; prepare the picture with this engine"
            )
        made = source.prepared
        if made.times != self.model.schedule.timesteps(made.config.n_inference_step, made.config.inversion_strength):
            raise InputError(
                f"the source's times, {made.times[0]} to {made.times[-1]}, are not those of this model's schedule; "
                f"prepare the picture with this engine"
            )
        if prompt and prompt != source.prompt:
            raise InputError(
                f"the source was prepared with prompt {source.prompt!r}; prepare it with prompt={prompt!r}"
            )
        return found


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
    settings = _settings_for(image, config)
    checked_seed(seed)
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
    result.timings["load"] += loading
    result.timings["total"] += loading
    return result


def _settings_for(image: Any, config: DirectDragConfig | str | None) -> DirectDragConfig:
    """The configuration a user means: without one that of a prepared source, whose trajectory it has to fit."""
    return image.prepared.config if config is None and isinstance(image, Source) else checked_settings(config)


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


def _working(model: Model) -> AbstractContextManager[None]:
    """torch as an engine needs it, the caller's settings kept.

    A small model on the CPU runs on one thread: a second one gains a fifth on idle cores, and on busy ones threads that
    wait for each other cost ten times as much.
    """
    return working(model.device, one_thread=model.size <= SMALL_MODEL)


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


def _wanted(
    passes: Passes, config: DirectDragConfig, spaces: Spaces, *, preparing: bool, editing: bool
) -> tuple[Wanted, ...]:
    """The passes of a preparation, an edit or both, at their sizes."""
    grid = None
    if preparing and uses_readout(config, passes) and config.rg_reference == "same_t" and config.drag_end_step:
        grid = (config.rg_grid, config.rg_grid) if config.rg_grid else spaces.latent_hw
    names = ["encode"] if preparing else []
    names += ["reference", "predict"]
    names += ["denoise"] if editing and config.mutual_attention else []
    return wanted_passes(spaces.work_hw, readout_hw=grid, names=names + (["decode"] if editing else []))


def _checked_batch(edits: Iterable[Sequence[Any]]) -> list[tuple[Any, Any, Any]]:
    """(image, drags, mask) of every edit; InputError for a batch without one or an entry of another form."""
    found = []
    for number, one in enumerate(edits):
        if not isinstance(one, (tuple, list)) or len(one) not in (2, 3):
            raise InputError(
                f"edit {number} of the batch is {type(one).__name__} {str(one)[:60]!r}; give (image, drags) or "
                f"(image, drags, mask)"
            )
        found.append((one[0], one[1], one[2] if len(one) == 3 else None))
    if not found:
        raise InputError("a batch of no edits was given; give at least one (image, drags)")
    return found


def _resized_mask(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    whole = torch.nn.functional.interpolate(
        mask[None, None].float().cpu(), size[::-1], mode="bilinear", align_corners=False
    )
    return whole[0, 0].clamp(0, 1).numpy()


class _Preparation(NamedTuple):
    """What an edit's pictures cost before it: nothing but "prepared before" where that was in an earlier call."""

    timings: dict[str, float]
    passes: dict[str, dict[str, int]]
    ran: dict[str, str]

    def add_to(self, result: EditResult) -> None:
        result.timings.update(self.timings)
        result.passes.update({stage: dict(calls) for stage, calls in self.passes.items()})
        result.backend.update(self.ran)


def _history(record: Record, config: DirectDragConfig, spaces: Spaces) -> dict[str, Any]:
    facts = {name: getattr(record, name) for name in (
        "step", "t", "drag_loss", "background_loss", "readout_loss", "total_loss", "updated")}  # fmt: skip
    points = image_points(config, torch.tensor(record.handles_yx), spaces)
    return {**facts, "handles": [tuple(map(float, xy)) for xy in points]}
