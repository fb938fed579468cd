"""An engine that can run: deserialised, with a context, its ports bound to addresses; knows neither PyTorch nor NumPy.

Memory. An engine holds a copy of its weights, which TensorRT does not share between engines; one engine with several
optimisation profiles holds them once for all its sizes. What an engine needs while it runs is taken from `Scratch`,
which all engines of one stream share, for they run one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ddengine.backends.gpu import find_gpu
from ddengine.backends.tensorrt.flavour import Flavour
from ddengine.errors import BackendUnavailable, EngineMismatch, InputError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
_REBUILD = "build it again with `ddengine build`"


@dataclass(frozen=True)
class Port:
    """An input or output: `dtype` as NumPy and PyTorch call it, `shape` with -1 for sizes left open."""

    name: str
    dtype: str
    shape: Shape


class Scratch:
    """One piece of GPU memory, as large as the largest need, for the engines that run on one stream."""

    def __init__(self, allocate: Callable[[int], tuple[int, object]]) -> None:
        """allocate: bytes to (address aligned to 256, what owns the memory)."""
        self._allocate = allocate
        self._owner: object = None
        self.address = self.size = self.generation = 0

    def reserve(self, size: int) -> None:
        """Make it at least this large; engines see by `generation` that it moved, and graphs captured before end."""
        if size <= self.size:
            return
        self._owner = None  # first, so that old and new need not fit together
        self.address, self._owner = self._allocate(size)
        self.size = size
        self.generation += 1


class Session:
    """One engine and one execution context. Not for two threads or streams at once."""

    def __init__(
        self, plan: bytes, flavour: Flavour, scratch: Scratch, *, name: str = "engine", kernels: bytes | None = None
    ) -> None:
        """plan: verified bytes of an engine. kernels: what `kernels()` gave at an earlier run, for RTX to start fast.

        `EngineMismatch` for an engine this library or GPU does not take, `BackendUnavailable` without a driver.
        """
        self.name, self.flavour, self.scratch = name, flavour, scratch
        trt = flavour.trt
        self._runtime = trt.Runtime(flavour.logger)
        self.engine = deserialize(self._runtime, plan, flavour, name)
        self.inputs, self.outputs = self._ports()
        self._kernel_cache: Any = None
        self._context = self._create_context(kernels)
        self._dynamic = any(-1 in port.shape for port in self.inputs.values())
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._generation = -1
        self._need = int(self.engine.device_memory_size_v2)

    def shapes(self, inputs: Mapping[str, Shape], stream: int) -> dict[str, Shape]:
        """Set the inputs' shapes and tell those of the outputs; InputError for shapes the engine was not built for."""
        self._check_names(inputs, self.inputs, "inputs")
        wanted = {name: tuple(inputs[name]) for name in self.inputs}
        if wanted != self._shapes:
            self._choose_profile(wanted, stream)
            for name, shape in wanted.items():
                if not self._context.set_input_shape(name, shape):
                    raise InputError(f"{self.name} does not take {name} of shape {list(shape)}; {self._takes()}")
            missing = self._context.infer_shapes()
            if missing:
                raise EngineMismatch(f"{self.name} needs more than its inputs ({', '.join(missing)}); {_REBUILD}")
            if self._dynamic:
                self._need = int(self._context.update_device_memory_size_for_shapes())
            self._shapes, self._generation = wanted, -1
        return {name: tuple(int(n) for n in self._context.get_tensor_shape(name)) for name in self.outputs}

    def bind(self, addresses: Mapping[str, int]) -> None:
        """Say where every input and output lies; costs nothing for addresses that are as they were."""
        self._check_names(addresses, {**self.inputs, **self.outputs}, "addresses")
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise EngineMismatch(f"{self.name} refuses the address {address:#x} for {name}; {_REBUILD}")
                self._addresses[name] = address

    def execute(self, stream: int) -> None:
        """Enqueue one run on a CUDA stream (its handle); returns at once."""
        if self._generation != self.scratch.generation or self.scratch.size < self._need:
            self.scratch.reserve(self._need)
            self._context.set_device_memory(self.scratch.address, self.scratch.size)
            self._generation = self.scratch.generation
        with self.flavour.listening() as errors:
            if not self._context.execute_async_v3(stream):
                reasons = "; ".join(errors) or "no reason given"
                raise BackendUnavailable(f"{self.name} did not run on {self.flavour.name}: {reasons}; use 'eager'")

    def inspect(self) -> str:
        """What the library says of every layer, as JSON; only names for engines not built as `detailed`."""
        format = self.flavour.trt.LayerInformationFormat.JSON
        return str(self.engine.create_engine_inspector().get_engine_information(format))

    def kernels(self) -> bytes | None:
        """The kernels compiled on this GPU so far, to hand to the next process; None where that is not how it works."""
        if self._kernel_cache is None:
            return None
        return bytes(self._kernel_cache.serialize())

    def close(self) -> None:
        """Free the GPU memory; twice does no harm."""
        self._context = self._kernel_cache = self.engine = self._runtime = None

    def _create_context(self, kernels: bytes | None) -> Any:
        trt = self.flavour.trt
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.flavour.kernel_cache:
            # Every kernel is compiled before the first run, so that a captured graph holds the final ones.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._kernel_cache = config.create_runtime_cache()
            if kernels and not self._kernel_cache.deserialize(kernels):
                log.info("%s: the kept kernels are of another GPU or version; they are compiled again", self.name)
            config.set_runtime_cache(self._kernel_cache)
        with self.flavour.listening() as errors:
            context = self.engine.create_execution_context(config)
            if context is None:
                reasons = "; ".join(errors) or "no reason given"
                raise BackendUnavailable(f"{self.name} has no room on the GPU ({reasons}); free memory or use 'eager'")
        return context

    def _ports(self) -> tuple[dict[str, Port], dict[str, Port]]:
        trt, engine = self.flavour.trt, self.engine
        found: dict[Any, dict[str, Port]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineMismatch(f"{self.name} wants {name!r} in host memory, which is not done here; {_REBUILD}")
            shape = tuple(int(side) for side in engine.get_tensor_shape(name))
            port = Port(name, _dtype(trt, engine.get_tensor_dtype(name)), shape)
            found[engine.get_tensor_mode(name)][name] = port
        return found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT]

    def _choose_profile(self, wanted: Mapping[str, Shape], stream: int) -> None:
        for name, shape in wanted.items():
            port = self.inputs[name]
            if len(shape) != len(port.shape) or any(
                built not in (-1, given) for built, given in zip(port.shape, shape, strict=True)
            ):
                raise InputError(f"{self.name} does not take {name} of shape {list(shape)}; {self._takes()}")
        if not self._dynamic:
            return
        for index in range(self.engine.num_optimization_profiles):
            if all(self._within(name, shape, index) for name, shape in wanted.items()):
                if self._context.active_optimization_profile != index:
                    self._context.set_optimization_profile_async(index, stream)
                return
        sizes = ", ".join(f"{name} {list(shape)}" for name, shape in wanted.items())
        raise InputError(f"{self.name} does not take {sizes}; {self._takes()}")

    def _within(self, name: str, shape: Shape, index: int) -> bool:
        if -1 not in self.inputs[name].shape:
            return True
        least, _, most = self.engine.get_tensor_profile_shape(name, index)
        return all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))

    def _takes(self) -> str:
        parts = []
        for name, port in self.inputs.items():
            if -1 not in port.shape:
                parts.append(f"{name} {list(port.shape)}")
                continue
            for index in range(self.engine.num_optimization_profiles):
                least, _, most = self.engine.get_tensor_profile_shape(name, index)
                parts.append(f"{name} {list(map(int, least))} to {list(map(int, most))}")
        return f"it was built for {', '.join(parts)}; build one for other sizes with `ddengine build`"

    def _check_names(self, given: Mapping[str, Any], known: Mapping[str, Any], what: str) -> None:
        if given.keys() != known.keys():
            wrong = ", ".join(sorted(given.keys() ^ known.keys()))
            raise InputError(f"{self.name} has the {what} {', '.join(known)}; {wrong} missing or unknown")


def deserialize(runtime: Any, plan: bytes, flavour: Flavour, name: str) -> Any:
    """An engine of its verified bytes; `EngineMismatch` or `BackendUnavailable` says why it is refused."""
    trt = flavour.trt
    with flavour.listening() as errors:
        if hasattr(runtime, "get_engine_validity"):
            validity, bits = runtime.get_engine_validity(plan)
            if validity == trt.EngineValidity.INVALID:
                members = trt.EngineInvalidityDiagnostics.__members__
                found = [label for label, member in members.items() if int(bits) & int(member.value)]
                raise _refusal(name, flavour, found or list(errors))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise _refusal(name, flavour, list(errors))
    return engine


def _refusal(name: str, flavour: Flavour, reasons: list[str]) -> EngineMismatch | BackendUnavailable:
    try:
        find_gpu()
    except BackendUnavailable as error:
        return error
    said = "; ".join(reasons) or "no reason given"
    return EngineMismatch(f"{flavour.name} {flavour.version} refuses {name}: {said}; {_REBUILD}")


_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


def _dtype(trt: Any, dtype: Any) -> str:
    try:
        return _DTYPES[dtype.name]
    except KeyError as error:
        raise EngineMismatch(f"an engine's port is of type {dtype.name}, which has no tensor; {_REBUILD}") from error
