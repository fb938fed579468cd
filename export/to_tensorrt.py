"""ONNX graphs to TensorRT engines: strongly typed, so that every number keeps the precision the graph gives it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ddengine.backends.tensorrt.flavour import Flavour
from ddengine.errors import BackendUnavailable, InputError, ModelError
from ddengine.export.graph import GraphFacts, read_graph
from ddengine.export.quality_gate import GateResult
from ddengine.progress import Progress

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by input name
Reporter = Callable[[Progress], object]

_TOTAL = 1000  # steps that a whole build is reported in


@dataclass(frozen=True)
class Profile:
    """The sizes that one tuning of an engine with dynamic inputs takes, from `least` to `most`, and does `best`."""

    least: Shapes
    best: Shapes
    most: Shapes

    @classmethod
    def exactly(cls, shapes: Shapes) -> Profile:
        """For one size alone, as fast as a graph without dynamic sizes and sharing its weights with the others."""
        return cls(shapes, shapes, shapes)


@dataclass(frozen=True)
class BuildOptions:
    """What changes an engine but not its function, and so belongs to its key.

    optimization_level: 0 to 5, how long the builder may search. workspace: most bytes of GPU memory that the builder
    may use for a layer, None for all there is. refittable: weights can be replaced later (`refit`), at some speed.
    tf32: float32 products may drop to 10 bits of mantissa, as PyTorch's convolutions do by default. detailed: keep
    what `inspect` reports about each layer. target: "auto" builds for the GPU at hand, and without one (TensorRT-RTX
    alone) for all that the library lists; or a compute capability such as 89.
    """

    optimization_level: int = 3
    workspace: int | None = None
    refittable: bool = False
    tf32: bool = False
    detailed: bool = False
    target: int | str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization_level is {self.optimization_level}; it must be 0 (fast build) to 5")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise InputError(f"workspace is {self.workspace} bytes; allow at least 1 MiB, or None for no limit")

    def facts(self) -> dict[str, Any]:
        """For the engine's key."""
        return asdict(self)


@dataclass(frozen=True)
class Port:
    """An input or output of an engine: its type, and its shape with -1 where that is dynamic."""

    dtype: str
    shape: Shape


@dataclass(frozen=True)
class EngineFacts:
    """What is worth knowing of an engine; goes into its manifest."""

    flavour: str
    version: str
    precision: str
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    layers: int
    profiles: int
    plan_bytes: int
    seconds: float
    options: BuildOptions

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine, its facts, and what the next build may learn from this one (None where nothing)."""

    plan: bytes = field(repr=False)
    facts: EngineFacts
    timing_cache: bytes | None = field(default=None, repr=False)


def build_engine(
    onnx_path: str | Path,
    *,
    flavour: Flavour,
    precision: str | None = None,
    profiles: Sequence[Profile] = (),
    options: BuildOptions | None = None,
    timing_cache: bytes | None = None,
    fp8_gate: GateResult | None = None,
    has_gpu: bool = False,
    progress: Reporter | None = None,
) -> BuiltEngine:
    """Build an engine of an ONNX graph (its weights inside, or in files beside it).

    precision: fp16, bf16, fp32 or fp8; given, it must be that of most of the graph's weights, for engines are strongly
    typed. profiles: one or more for a graph with dynamic sizes, none for a static one. timing_cache: of an earlier
    build on the same GPU. fp8_gate: what a graph with fp8 in it needs. has_gpu: whether "auto" can mean the GPU at
    hand. progress: told a `Progress` of stage "build"; what it raises stops the build and is passed on.

    Raises ModelError for a graph that cannot be read, parsed or built (with the library's own reasons), InputError for
    profiles that do not fit, and BackendUnavailable where building needs a GPU.
    """
    options = options or BuildOptions()
    graph = read_graph(onnx_path)
    _check_precision(graph, precision, fp8_gate)
    _check_profiles(graph, profiles)
    trt = flavour.trt
    started = time.monotonic()
    with flavour.listening() as errors:
        builder = _made(trt.Builder(flavour.logger), "builder", flavour, errors)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = _made(builder.create_network(flags), "network", flavour, errors)
        parser = trt.OnnxParser(network, flavour.logger)
        if not parser.parse_from_file(str(graph.path)):
            raise ModelError(f"{flavour.name} cannot read {graph.path}: {_parser_errors(parser)}; export it again")
        config = _made(builder.create_builder_config(), "configuration", flavour, errors)
        _configure(config, flavour, options, has_gpu)
        for profile in profiles:
            _add_profile(builder, config, graph, profile)
        if flavour.timing_cache:
            _use_timing_cache(config, timing_cache)
        monitor = _monitor(trt, progress)
        if monitor is not None:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.stopped_by is not None:
            raise monitor.stopped_by
        if plan is None:
            raise _not_built(graph, flavour, options, has_gpu, list(errors))
    data = bytes(plan)
    learned = bytes(config.get_timing_cache().serialize()) if flavour.timing_cache else None
    facts = EngineFacts(
        flavour=flavour.name,
        version=flavour.version,
        precision=graph.precision,
        inputs=_ports(trt, [network.get_input(index) for index in range(network.num_inputs)]),
        outputs=_ports(trt, [network.get_output(index) for index in range(network.num_outputs)]),
        layers=network.num_layers,
        profiles=len(profiles),
        plan_bytes=len(data),
        seconds=round(time.monotonic() - started, 3),
        options=replace(options),
    )
    return BuiltEngine(data, facts, learned)


def _check_precision(graph: GraphFacts, precision: str | None, gate: GateResult | None) -> None:
    if precision is not None and precision != graph.precision:
        raise ModelError(
            f"{graph.path} is a graph in {graph.precision}, not {precision}; export it in {precision}: an engine keeps "
            f"its graph's types"
        )
    if "fp8" not in graph.types:
        return
    if gate is None:
        raise ModelError(
            f"{graph.path} computes in fp8, which can change the picture; measure it first "
            f"(ddengine.export.quality_gate) and pass the result as fp8_gate"
        )
    if not gate.passed or gate.graph != graph.digest:
        why = f"it was measured on another graph ({gate.graph[:12]})" if gate.graph != graph.digest else gate.says()
        raise ModelError(f"{graph.path} computes in fp8 and its quality gate does not pass: {why}; use fp16 or bf16")


def _check_profiles(graph: GraphFacts, profiles: Sequence[Profile]) -> None:
    dynamic = {name for name, port in graph.inputs.items() if -1 in port.shape}
    if bool(dynamic) != bool(profiles):
        what = f"dynamic inputs {', '.join(sorted(dynamic))} and no profile" if dynamic else "no dynamic input"
        raise InputError(f"{graph.path} has {what}; give profiles for graphs with dynamic sizes and for no other")
    for profile in profiles:
        for name in sorted(dynamic):
            shape = graph.inputs[name].shape
            try:
                low, best, high = profile.least[name], profile.best[name], profile.most[name]
            except KeyError as error:
                raise InputError(f"a profile has no sizes for input {name!r} {list(shape)}; give all three") from error
            fits = all(len(given) == len(shape) for given in (low, best, high)) and all(
                (a <= b <= c) and (wanted == -1 or a == b == c == wanted)
                for wanted, a, b, c in zip(shape, low, best, high, strict=True)
            )
            if not fits:
                raise InputError(
                    f"a profile's sizes for input {name!r} are {list(low)}, {list(best)}, {list(high)}; the graph has "
                    f"{list(shape)} (-1 is free), and they must not decrease"
                )


def _configure(config: Any, flavour: Flavour, options: BuildOptions, has_gpu: bool) -> None:
    trt = flavour.trt
    config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    target = options.target
    if target == "auto":
        if not (has_gpu and "current" in flavour.targets):
            return  # TensorRT: the GPU at hand; TensorRT-RTX without one: every GPU it lists
        target = "current"
    if target not in flavour.targets:
        known = ", ".join(map(str, flavour.targets)) or "none: it builds for the GPU at hand"
        raise InputError(f"{flavour.name} cannot build for {target!r}; use auto or one of: {known}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(flavour.targets[target], 0)


def _add_profile(builder: Any, config: Any, graph: GraphFacts, profile: Profile) -> None:
    tuned = builder.create_optimization_profile()
    for name, port in graph.inputs.items():
        if -1 in port.shape:
            tuned.set_shape(name, tuple(profile.least[name]), tuple(profile.best[name]), tuple(profile.most[name]))
    if config.add_optimization_profile(tuned) < 0:
        raise InputError(f"the profile {profile.best} is refused; check its sizes against the graph {graph.path}")


def _use_timing_cache(config: Any, data: bytes | None) -> None:
    cache = config.create_timing_cache(data or b"")
    # From another GPU or version it is refused, and the build starts without.
    if not config.set_timing_cache(cache, False):
        log.info("the timing cache is of another GPU or version; starting a new one")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _not_built(
    graph: GraphFacts, flavour: Flavour, options: BuildOptions, has_gpu: bool, errors: list[str]
) -> ModelError | BackendUnavailable:
    reasons = "; ".join(errors) or "it gives no reason"
    if not has_gpu and any("CUDA" in text or "Cuda" in text for text in errors):
        what = "a refittable engine" if options.refittable else "this engine"
        return BackendUnavailable(
            f"{flavour.name} cannot build {what} of {graph.path} without a GPU and its driver ({reasons}); build it on "
            f"the machine that runs it"
        )
    return ModelError(
        f"{flavour.name} {flavour.version} cannot build {graph.path}: {reasons}; try another precision or size, a "
        f"larger workspace, or backend='eager'"
    )


def _made(thing: Any, what: str, flavour: Flavour, errors: Iterable[str]) -> Any:
    if thing is None:
        raise BackendUnavailable(
            f"{flavour.name} gives no {what}: {'; '.join(errors) or 'no reason given'}; check nvidia-smi and the "
            f"installation (ddengine info)"
        )
    return thing


def _parser_errors(parser: Any) -> str:
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node()}" if error.node() >= 0 else "the model"
        named = " ".join(text for text in (error.node_operator(), repr(error.node_name())) if text.strip("'"))
        lines.append(f"{where} ({named}): {error.desc()}" if named else f"{where}: {error.desc()}")
    return "; ".join(lines) or "it gives no reason"


def _ports(trt: Any, tensors: Sequence[Any]) -> dict[str, Port]:
    return {tensor.name: Port(tensor.dtype.name, tuple(int(side) for side in tensor.shape)) for tensor in tensors}


def _monitor(trt: Any, progress: Reporter | None) -> Any:
    """The library's progress monitor; it knows phases within phases, we tell one number that never falls."""
    if progress is None:
        return None
    report = progress

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped_by: BaseException | None = None
            self._phases: dict[str, list[Any]] = {}  # name -> [parent, steps, done]
            self._told = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [parent_phase, max(1, num_steps), 0]
            self._tell()

        def phase_finish(self, phase_name: str) -> None:
            phase = self._phases.pop(phase_name, None)
            if phase is not None and phase[0] is None:
                self._tell(_TOTAL)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][2] = step + 1
            self._tell()
            return self.stopped_by is None

        def _tell(self, at: int | None = None) -> None:
            at = int(_TOTAL * self._share(None)) if at is None else at
            if self.stopped_by is not None or at <= self._told:
                return
            self._told = at
            try:
                report(Progress("build", at, _TOTAL))
            except BaseException as error:  # an exception must not cross the library's own threads
                self.stopped_by = error

        def _share(self, parent: str | None) -> float:
            """How much of the innermost steps of a phase is done, from the outermost in."""
            for name, (above, steps, done) in list(self._phases.items()):
                if above == parent and done < steps:
                    return (done + self._share(name)) / steps
            return 0.0

    return Monitor()
