"""Passes run by engines: programs built ahead of time, one for each pass and size; what none covers, PyTorch runs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ddengine.backends.graphs import PassShape, PassSpec
from ddengine.backends.passes import Passes, Size
from ddengine.errors import BackendUnavailable, EngineMismatch, InputError
from ddengine.export.to_onnx import needed_shape
from ddengine.models.network import Network, Observation
from ddengine.models.unet import KeyValue
from ddengine.progress import Progress
from ddengine.store import Artefact

if TYPE_CHECKING:
    from torch import device, dtype

    from ddengine.schedule import Schedule

log = logging.getLogger(__name__)

Reporter = Callable[[Progress], None]
Wanted = tuple[str, PassShape]  # a pass, and the sizes it is wanted at

PARTS = 100  # steps that one build is reported in
GRADIENT = "no engine has gradients"
OTHER_TIMES = "the head is told other times than the pass's own"
AT_OTHER_TIMES = "reference at other times"
# The stages that the passes belong to; previews decode while others run.
_PREPARING = {"encode": "encode", "predict": "invert", AT_OTHER_TIMES: "invert", "reference": "reference"}
_EDITING = {"supervise": "drag", "predict": "denoise", "denoise": "denoise", "reference": "denoise", "decode": "decode"}


class Program(Protocol):
    """A pass at fixed sizes, ready to run."""

    spec: PassSpec

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Fill `outputs` from `inputs`: contiguous, as the spec says, on the model's device.

        Nothing is copied, and nothing allocated once it has run.
        """
        ...


class Programs(Protocol):
    """The programs of one library for one model: those that are built can be found, the others built.

    rounding: see `Passes`, for programs in place of the eager passes.
    """

    name: str
    rounding: float

    def find(self, name: str, shape: PassShape) -> Program | None:
        """The program of a pass if it is built; `EngineMismatch` if what is there must not be used."""
        ...

    def build(self, name: str, shape: PassShape, progress: Reporter | None = None) -> Artefact:
        """Build the program of a pass, or leave it as it is if it is built."""
        ...


def wanted_passes(
    image_hw: Size,
    *,
    readout_hw: Size | None = None,
    prompt_tokens: int | None = None,
    batch: int = 1,
    names: Iterable[str] = ("encode", "reference", "predict", "denoise", "decode"),
) -> tuple[Wanted, ...]:
    """Every program that edits at one working size run; with `readout_hw`, `reference` with and without a map.

    The first one with the most weights, so that the others can share its file (`export_graph`).
    """
    shapes = [PassShape(image_hw, batch, grid, prompt_tokens) for grid in {readout_hw: 0, None: 0}]
    wanted = ((name, needed_shape(name, shape)) for name in names for shape in shapes)
    return tuple(dict.fromkeys(wanted))


class EnginePasses:
    """`Passes` by the programs of one library where there is one for the size, and by `base` where there is none.

    strict: a missing program is an error instead (`BackendUnavailable` with the command that builds it). building: a
    missing program is built when `ready` asks for it. `supervise` and readout times other than the pass's own are
    always the base's.
    """

    any_batch = False  # most programs are for one

    def __init__(
        self,
        base: Passes,
        network: Network,
        programs: Programs,
        *,
        base_name: str = "eager",
        prompted: bool = False,
        reason: str = "as asked",
        strict: bool = False,
        building: bool = False,
        remedy: Callable[[PassShape], str] = lambda _: "run `ddengine build`",
    ) -> None:
        """network: for the prompt's keys and values, where `prompted`. remedy: what to do where a shape has none."""
        self.base, self.programs = base, programs
        self._base_name, self._reason = base_name, reason
        self._strict, self._building, self._remedy = strict, building, remedy
        cross = [tensor for pair in network.cross_kv() for tensor in pair] if prompted else []
        self._cross = [tensor.contiguous() for tensor in cross]
        self._tokens = cross[0].shape[1] if prompted else None
        self._times = torch.arange(len(base.schedule.alphas_cumprod), device=base.device)
        self._held: dict[Wanted, Program] = {}
        self._missing: dict[Wanted, str] = {}
        self._ran: dict[str, Counter[str]] = {}

    @property
    def has_readout(self) -> bool:
        """Whether the model has a readout head."""
        return self.base.has_readout

    @property
    def schedule(self) -> Schedule:
        """The model's noise schedule."""
        return self.base.schedule

    @property
    def device(self) -> device:
        """Where the model is."""
        return self.base.device

    @property
    def dtype(self) -> dtype:
        """What the network computes in."""
        return self.base.dtype

    @property
    def rounding(self) -> float:
        """Of the programs, once one of them stands for a walk of the network; until then the base's."""
        walks = any(name not in ("encode", "decode") for name, _ in self._held)
        return self.base.rounding + (self.programs.rounding if walks else 0.0)

    def ready(self, wanted: Iterable[Wanted], progress: Reporter | None = None) -> None:
        """Open the programs of an edit before it starts; what is missing is built, refused or left to the base.

        progress: told of stage "build" while programs are built.
        """
        self._missing.clear()  # they may have been built since
        listed = [(name, needed_shape(name, replace(shape, prompt_tokens=self._tokens))) for name, shape in wanted]
        if self._building:
            absent = [one for one in listed if one not in self._held and self._find(*one) is None]
            for number, (name, shape) in enumerate(absent):
                report = part(progress, number, len(absent))
                self.programs.build(name, shape, report)
                report(Progress("build", 1, 1))
                del self._missing[name, shape]
        for name, shape in listed:
            self._program(name, shape)

    def account(self, *, editing: bool) -> dict[str, str]:
        """What ran each stage of a preparation or of an edit since this was last asked, in words."""
        stages: dict[str, Counter[str]] = {}
        for kind, counts in self._ran.items():
            stage = (_EDITING if editing else _PREPARING).get(kind)
            if stage is not None:
                stages.setdefault(stage, Counter()).update(counts)
        self._ran.clear()
        # The drag steps may be handed to the base without a call of these passes.
        drag = {"drag": f"{self._base_name} ({GRADIENT})"} if editing else {}
        return drag | {stage: _told(counts) for stage, counts in stages.items()}

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] to scaling factor * posterior mean, [B, 4, H // 8, W // 8]."""
        program = self._for("encode", (image.shape[-2], image.shape[-1]), image.shape[0])
        if program is None:
            return self.base.encode(image)
        return self._run(program, [image])[0]

    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        """Noise prediction alone, in the latent's dtype."""
        program = self._walk("predict", latent)
        if program is None:
            return self.base.predict(latent, timestep)
        return self._run(program, [latent, self._time(timestep), *self._cross])[0].to(latent.dtype)

    def reference(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        readout_hw: Size | None = None,
        readout_times: Sequence[int] | None = None,
    ) -> Observation:
        """Noise, drag feature, appearance maps and self-attention K/V."""
        program = None
        if readout_hw is not None and readout_times is not None:
            self._count(AT_OTHER_TIMES, f"{self._base_name} ({OTHER_TIMES})")
        elif readout_hw is None or self.has_readout:
            program = self._walk("reference", latent, readout_hw)
        if program is None:
            return self.base.reference(latent, timestep, readout_hw=readout_hw, readout_times=readout_times)
        noise, feature, *rest = self._run(program, [latent, self._time(timestep), *self._cross])
        maps = 0 if readout_hw is None else 1
        pairs = tuple(zip(rest[maps::2], rest[maps + 1 :: 2], strict=True))
        return Observation(noise.to(latent.dtype), feature, tuple(rest[:maps]), pairs)

    def supervise(self, latent: Tensor, timestep: int | Tensor, *, readout_hw: Size | None = None) -> Observation:
        """Noise, drag feature and appearance map with gradients to the latent; by the base."""
        self._count("supervise", f"{self._base_name} ({GRADIENT})")
        return self.base.supervise(latent, timestep, readout_hw=readout_hw)

    def denoise(self, latent: Tensor, timestep: int | Tensor, reference_kv: Sequence[KeyValue]) -> Tensor:
        """Noise prediction in the latent's dtype, with mutual self-attention to `reference_kv`."""
        program = self._walk("denoise", latent)
        if program is None:
            return self.base.denoise(latent, timestep, reference_kv)
        pairs = [tensor for pair in reference_kv for tensor in pair]
        return self._run(program, [latent, self._time(timestep), *pairs, *self._cross])[0].to(latent.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        """Latent to an image [B, 3, 8h, 8w] in [-1, 1], not clamped, float32."""
        program = self._for("decode", (8 * latent.shape[-2], 8 * latent.shape[-1]), latent.shape[0])
        if program is None:
            return self.base.decode(latent)
        return self._run(program, [latent])[0]

    def _walk(self, name: str, latent: Tensor, readout_hw: Size | None = None) -> Program | None:
        return self._for(name, (8 * latent.shape[-2], 8 * latent.shape[-1]), latent.shape[0], readout_hw)

    def _for(self, name: str, image_hw: Size, batch: int, readout_hw: Size | None = None) -> Program | None:
        """The program for a call, None for the base; either way it is written down."""
        grid = None if readout_hw is None else (readout_hw[0], readout_hw[1])
        try:
            shape = needed_shape(name, PassShape(image_hw, batch, grid, self._tokens))
        except InputError:  # smaller than any engine
            self._count(name, f"{self._base_name} (no engine is this small)")
            return None
        program = self._program(name, shape)
        ran = (self.programs.name, self._reason) if program else (self._base_name, self._missing[name, shape])
        self._count(name, "{} ({})".format(*ran))
        return program

    def _program(self, name: str, shape: PassShape) -> Program | None:
        program = self._held.get((name, shape))
        if program is None and (name, shape) not in self._missing:
            program = self._find(name, shape)
        if program is None and self._strict:
            raise BackendUnavailable(f"backend {self.programs.name!r} cannot run {name}: {self._missing[name, shape]}")
        return program

    def _find(self, name: str, shape: PassShape) -> Program | None:
        """Look for a program and remember it, or what to do about its absence."""
        remedy = self._remedy(shape)
        try:
            program = self.programs.find(name, shape)
        except EngineMismatch as error:
            if self._strict and not self._building:
                raise EngineMismatch(f"{error}; {remedy}") from error
            log.warning("%s", error)
            self._missing[name, shape] = f"{error}; {remedy}"
            return None
        if program is None:
            self._missing[name, shape] = f"nothing is built for {_words(shape)}; {remedy}"
            return None
        self._held[name, shape] = program
        self._missing.pop((name, shape), None)
        return program

    def _run(self, program: Program, values: Sequence[Tensor]) -> list[Tensor]:
        """Run on tensors of any dtype, device and layout, into new ones: what an edit keeps is never written again."""
        with torch.no_grad():
            inputs = [
                value.detach().to(self.device, one.dtype).expand(one.shape).contiguous()
                for one, value in zip(program.spec.inputs, values, strict=True)
            ]
            outputs = [torch.empty(one.shape, dtype=one.dtype, device=self.device) for one in program.spec.outputs]
            program.run(inputs, outputs)
        return outputs

    def _time(self, timestep: int | Tensor) -> Tensor:
        if isinstance(timestep, int):
            return self._times[timestep : timestep + 1]
        return timestep.reshape(1)

    def _count(self, kind: str, who: str) -> None:
        self._ran.setdefault(kind, Counter())[who] += 1


def part(progress: Reporter | None, number: int, total: int) -> Reporter:
    """A reporter for one of several builds: its progress as a part of stage "build"."""

    def report(at: Progress) -> None:
        if progress is not None:
            steps = PARTS * number + PARTS * at.step // max(1, at.total)
            progress(Progress("build", steps, PARTS * total))

    return report


def _told(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} x {who}" for who, count in counts.most_common())


def _words(shape: PassShape) -> str:
    height, width = shape.image_hw
    parts = [f"{width} x {height}"]
    parts += [f"batch {shape.batch}"] if shape.batch > 1 else []
    parts += ["a prompt"] if shape.prompt_tokens is not None else []
    if shape.readout_hw not in (None, shape.latent_hw):
        parts.append(f"a readout grid of {shape.readout_hw}")
    return ", ".join(parts)
