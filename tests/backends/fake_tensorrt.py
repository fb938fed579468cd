"""A TensorRT that checks every call against the interface in `tensorrt_api.json`, records it, and computes on the host.

Classes, members, parameter types and enumerations are those of one named version; anything else is an AttributeError
or a TypeError, as with the real bindings. An "engine" takes graphs whose every output is the first input times the
scalar weights, which it reads and writes at the very addresses it was given.
"""

from __future__ import annotations

import ctypes
import enum
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TABLE = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())
VERSIONS: list[str] = TABLE["versions"]
NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "INT8": "int8"}
ONNX = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64", 6: "INT32", 17: "FP8"}


class HostMemory(bytearray):
    """`IHostMemory`: something with the buffer protocol."""


class Thing:
    """An object of one of the fake's classes; `held` is the fake's own knowledge of it."""

    _fake: FakeTensorRT
    _kind: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.held: dict[str, Any] = {}
        self._fake.called(self, "__init__", args, kwargs)


class FakeTensorRT:
    """Stands for the module. `calls`: (class, member, arguments) in order. Attributes below are to be set by tests."""

    def __init__(self, version: str) -> None:
        assert version in VERSIONS
        number = VERSIONS.index(version)
        self.__name__, self.__version__ = version.split()
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.parse_errors: list[tuple[int, str, str, str]] = []  # node, operator, name, description
        self.build_fails: list[str] | None = None
        self.refused: list[str] | None = None  # what a runtime says of every plan
        self.refit_fails = False
        self.needs_together: tuple[str, ...] = ()
        self.scratch = 1000
        self.compute: Callable[[str, dict[str, Any], dict[str, Any]], None] | None = (
            None  # graph's name, inputs, outputs
        )
        self.logger: Any = None
        self._api: dict[str, dict[str, str]] = {}
        for kind, members in TABLE["classes"].items():
            here = {member: row["is"] for member, rows in members.items() for row in rows if number in row["in"]}
            if "=" in here:
                owner, _, name = kind.rpartition(".")
                setattr(self if not owner else getattr(self, owner), name, enum.IntEnum(name, here["="]))
            elif here:
                self._api[kind] = here
                setattr(self, kind, self._class(kind, here))

    def names(self, kind: str) -> list[str]:
        """Members of a class that were called or set, in order."""
        return [member for called, member, _ in self.calls if called == kind]

    def arguments(self, kind: str, member: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of a member."""
        return [arguments for called, name, arguments in self.calls if (called, name) == (kind, member)]

    # What follows makes classes and checks calls.

    def _class(self, kind: str, members: dict[str, str]) -> type:
        space: dict[str, Any] = {"_fake": self, "_kind": kind}
        for member, text in members.items():
            if member == "__init__":
                continue
            if text.startswith(("get ", "set ")):
                space[member] = self._property(kind, member, text)
            else:
                space[member] = self._method(kind, member)
        return type(kind, (Thing,), space)

    def _method(self, kind: str, member: str) -> Callable[..., Any]:
        def method(thing: Thing, *args: Any, **kwargs: Any) -> Any:
            return self.called(thing, member, args, kwargs)

        return method

    def _property(self, kind: str, member: str, text: str) -> property:
        types = dict(line.split(" ", 1) for line in text.splitlines())

        def get(thing: Thing) -> Any:
            behaviour = getattr(self, f"{kind}_get_{member}", None)
            return behaviour(thing) if behaviour else thing.held.get(member)

        def put(thing: Thing, value: Any) -> None:
            self._check(f"{kind}.{member}", types["set"], value)
            self.calls.append((kind, member, (value,)))
            thing.held[member] = value

        return property(get if "get" in types else None, put if "set" in types else None)

    def called(self, thing: Thing, member: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = thing._kind
        text = self._api[kind].get(member)
        if text is None:
            if args or kwargs:
                raise TypeError(f"{kind} takes no arguments")
            bound: tuple[Any, ...] = ()
            result = "None"
        else:
            bound, result = self._bind(f"{kind}.{member}", text, args, kwargs)
        self.calls.append((kind, member, bound))
        behaviour = getattr(self, f"{kind}_{member.strip('_')}", None)
        if behaviour is not None:
            return behaviour(thing, *bound)
        if result in self._api:
            return self._make(result)
        assert result in {"None", "bool"}, f"{kind}.{member} gives {result} and the fake has no behaviour for it"
        return True if result == "bool" else None

    def _make(self, kind: str, **held: Any) -> Any:
        """An object that users cannot construct themselves."""
        thing = getattr(self, kind).__new__(getattr(self, kind))
        thing.held = held
        return thing

    def _bind(self, what: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], str]:
        problems = []
        for line in text.splitlines():
            match = re.fullmatch(r"\w+\((.*)\) -> (.*)", line)
            assert match, line
            parameters = _split(match.group(1))[1:]  # without self
            try:
                return self._fit(what, parameters, args, kwargs), match.group(2)
            except TypeError as error:
                problems.append(str(error))
        raise TypeError("; ".join(problems))

    def _fit(self, what: str, parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if len(args) > len(parameters):
            raise TypeError(f"{what} takes {len(parameters)} arguments, {len(args)} given")
        left, values = dict(kwargs), []
        for position, parameter in enumerate(parameters):
            name, _, rest = parameter.partition(": ")
            kind, has_default, _ = rest.partition(" = ")
            if position < len(args):
                value = args[position]
            elif name in left:
                value = left.pop(name)
            elif has_default:
                break
            else:
                raise TypeError(f"{what} lacks {name}")
            self._check(f"{what}({name})", kind, value)
            values.append(value)
        if left:
            raise TypeError(f"{what} has no {', '.join(left)}")
        return tuple(values)

    def _check(self, what: str, kind: str, value: Any) -> None:
        sequences = (tuple, list)
        fits: dict[str, Callable[[Any], bool]] = {
            "str": lambda v: isinstance(v, str),
            "bool": lambda v: isinstance(v, bool),
            "typing.SupportsInt": lambda v: hasattr(v, "__int__") and not isinstance(v, (str, float)),
            "Dims": lambda v: isinstance(v, sequences) and all(isinstance(n, int) for n in v),
            "tuple": lambda v: isinstance(v, tuple),
            "list": lambda v: isinstance(v, list),
            "typing_extensions.Buffer": lambda v: isinstance(v, (bytes, bytearray, memoryview)),
            "numpy.ndarray": lambda v: isinstance(v, np.ndarray),
            "object": lambda v: False,  # an overload that is never meant
        }
        owner: Any = self
        for part in kind.split("."):
            owner = getattr(owner, part, None)
        check = fits.get(kind) or (lambda v: isinstance(owner, type) and isinstance(v, owner))
        if not check(value):
            raise TypeError(f"{what} must be {kind}, it is {value!r}")

    def _error(self, text: str) -> None:
        self.logger.log(self.ILogger.Severity.ERROR, text)

    # What follows are the objects' behaviours, named Class_member.

    def Builder_init(self, thing: Any, logger: Any) -> None:
        assert self.logger in (None, logger), "a second logger, which the library ignores"
        self.logger = logger

    def Builder_create_network(self, thing: Any, flags: int = 0) -> Any:
        assert flags & (1 << self.NetworkDefinitionCreationFlag.STRONGLY_TYPED), "not strongly typed"
        return self._make("INetworkDefinition")

    def Builder_create_builder_config(self, thing: Any) -> Any:
        return self._make("IBuilderConfig", flags={self.BuilderFlag.TF32}, profiles=[])

    def Builder_create_optimization_profile(self, thing: Any) -> Any:
        return self._make("IOptimizationProfile", shapes={})

    def Builder_build_serialized_network(self, thing: Any, network: Any, config: Any) -> HostMemory | None:
        monitor = config.held.get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("all", None, 2)
            for step in range(2):
                monitor.phase_start("part", "all", 2)
                going = monitor.step_complete("part", 0) and monitor.step_complete("part", 1)
                monitor.phase_finish("part")
                if not (going and monitor.step_complete("all", step)):
                    self._error("Error Code 7: BuildCanceled")
                    return None
            monitor.phase_finish("all")
        if self.build_fails is not None:
            for text in self.build_fails:
                self._error(text)
            return None
        plan = {
            **network.held["graph"],
            "profiles": config.held["profiles"],
            "refittable": self.BuilderFlag.REFIT in config.held["flags"],
            "detailed": config.held.get("profiling_verbosity") == self.ProfilingVerbosity.DETAILED,
        }
        return HostMemory(json.dumps(plan).encode())

    def OnnxParser_init(self, thing: Any, network: Any, logger: Any) -> None:
        thing.held["network"] = network

    def OnnxParser_parse_from_file(self, thing: Any, path: str) -> bool:
        if self.parse_errors:
            return False
        thing.held["network"].held["graph"] = _read(path)
        return True

    def OnnxParser_get_num_errors(self, thing: Any) -> int:
        return len(self.parse_errors)

    def OnnxParser_get_error(self, thing: Any, index: int) -> Any:
        node, operator, name, text = self.parse_errors[index]
        return self._make("ParserError", node=node, operator=operator, name=name, desc=text)

    def ParserError_node(self, thing: Any) -> int:
        return thing.held["node"]

    def ParserError_node_operator(self, thing: Any) -> str:
        return thing.held["operator"]

    def ParserError_node_name(self, thing: Any) -> str:
        return thing.held["name"]

    def ParserError_desc(self, thing: Any) -> str:
        return thing.held["desc"]

    def INetworkDefinition_get_num_inputs(self, thing: Any) -> int:
        return len(thing.held["graph"]["inputs"])

    def INetworkDefinition_get_num_outputs(self, thing: Any) -> int:
        return len(thing.held["graph"]["outputs"])

    def INetworkDefinition_get_num_layers(self, thing: Any) -> int:
        return 1

    def INetworkDefinition_get_input(self, thing: Any, index: int) -> Any:
        return self._tensor(thing.held["graph"]["inputs"][index])

    def INetworkDefinition_get_output(self, thing: Any, index: int) -> Any:
        return self._tensor(thing.held["graph"]["outputs"][index])

    def _tensor(self, port: list[Any]) -> Any:
        name, dtype, shape = port
        return self._make("ITensor", name=name, dtype=self.DataType[dtype], shape=tuple(shape))

    def IOptimizationProfile_set_shape(self, thing: Any, name: str, least: Any, best: Any, most: Any) -> None:
        thing.held["shapes"][name] = [list(least), list(best), list(most)]

    def IBuilderConfig_set_flag(self, thing: Any, flag: Any) -> None:
        thing.held["flags"].add(flag)

    def IBuilderConfig_clear_flag(self, thing: Any, flag: Any) -> None:
        thing.held["flags"].discard(flag)

    def IBuilderConfig_add_optimization_profile(self, thing: Any, profile: Any) -> int:
        thing.held["profiles"].append(profile.held["shapes"])
        return len(thing.held["profiles"]) - 1

    def IBuilderConfig_create_timing_cache(self, thing: Any, data: bytes) -> Any:
        return self._make("ITimingCache", data=bytes(data))

    def IBuilderConfig_set_timing_cache(self, thing: Any, cache: Any, ignore_mismatch: bool) -> bool:
        if cache.held["data"].startswith(b"foreign"):
            return False
        thing.held["timing"] = cache
        return True

    def IBuilderConfig_get_timing_cache(self, thing: Any) -> Any:
        return thing.held["timing"]

    def ITimingCache_serialize(self, thing: Any) -> HostMemory:
        return HostMemory(thing.held["data"] + b"+")

    def Runtime_get_engine_validity(self, thing: Any, plan: bytes) -> tuple[Any, int]:
        if self.refused is None:
            return self.EngineValidity.VALID, 0
        return self.EngineValidity.INVALID, sum(self.EngineInvalidityDiagnostics[name] for name in self.refused)

    def Runtime_deserialize_cuda_engine(self, thing: Any, plan: bytes) -> Any:
        if self.refused is not None:
            for text in self.refused:
                self._error(text)
            return None
        return self._make("ICudaEngine", **json.loads(bytes(plan)))

    def ICudaEngine_get_num_io_tensors(self, thing: Any) -> int:
        return len(thing.held["inputs"] + thing.held["outputs"])

    def ICudaEngine_get_tensor_name(self, thing: Any, index: int) -> str:
        return (thing.held["inputs"] + thing.held["outputs"])[index][0]

    def ICudaEngine_get_tensor_mode(self, thing: Any, name: str) -> Any:
        return self.TensorIOMode.INPUT if _port(thing, "inputs", name) else self.TensorIOMode.OUTPUT

    def ICudaEngine_get_tensor_shape(self, thing: Any, name: str) -> tuple[int, ...]:
        return tuple((_port(thing, "inputs", name) or _port(thing, "outputs", name))[2])

    def ICudaEngine_get_tensor_dtype(self, thing: Any, name: str) -> Any:
        return self.DataType[(_port(thing, "inputs", name) or _port(thing, "outputs", name))[1]]

    def ICudaEngine_get_tensor_location(self, thing: Any, name: str) -> Any:
        return self.TensorLocation.DEVICE

    def ICudaEngine_get_num_optimization_profiles(self, thing: Any) -> int:
        return max(1, len(thing.held["profiles"]))

    def ICudaEngine_get_tensor_profile_shape(self, thing: Any, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in thing.held["profiles"][index][name]]

    def ICudaEngine_get_device_memory_size_v2(self, thing: Any) -> int:
        return self.scratch

    def ICudaEngine_get_refittable(self, thing: Any) -> bool:
        return thing.held["refittable"]

    def ICudaEngine_create_execution_context(self, thing: Any, config: Any = None) -> Any:
        return self._make("IExecutionContext", engine=thing, profile=0, shapes={}, addresses={}, config=config)

    def ICudaEngine_serialize_with_config(self, thing: Any, config: Any) -> HostMemory:
        plan = dict(thing.held)
        if self.SerializationFlag.INCLUDE_REFIT not in config.held.get("flags", ()):
            plan["refittable"] = False
        return HostMemory(json.dumps(plan).encode())

    def ISerializationConfig_set_flag(self, thing: Any, flag: Any) -> bool:
        thing.held.setdefault("flags", set()).add(flag)
        return True

    def EngineInspector_get_engine_information(self, thing: Any, form: Any) -> str:
        return "{}"

    def IRuntimeCache_deserialize(self, thing: Any, data: bytes) -> bool:
        thing.held["data"] = bytes(data)
        return not bytes(data).startswith(b"foreign")

    def IRuntimeCache_serialize(self, thing: Any) -> HostMemory:
        return HostMemory(b"kernels")

    def IExecutionContext_get_active_optimization_profile(self, thing: Any) -> int:
        return thing.held["profile"]

    def IExecutionContext_set_optimization_profile_async(self, thing: Any, index: int, stream: int) -> bool:
        thing.held["profile"] = index
        return True

    def IExecutionContext_set_input_shape(self, thing: Any, name: str, shape: Any) -> bool:
        thing.held["shapes"][name] = tuple(shape)
        return True

    def IExecutionContext_infer_shapes(self, thing: Any) -> list[str]:
        return [name for name, _, _ in thing.held["engine"].held["inputs"] if name not in thing.held["shapes"]]

    def IExecutionContext_get_tensor_shape(self, thing: Any, name: str) -> tuple[int, ...]:
        built = _port(thing.held["engine"], "outputs", name)
        return thing.held["shapes"].get(name) or _output_shape(thing, built[2])

    def IExecutionContext_update_device_memory_size_for_shapes(self, thing: Any) -> int:
        return int(sum(np.prod(shape) for shape in thing.held["shapes"].values()))

    def IExecutionContext_set_tensor_address(self, thing: Any, name: str, address: int) -> bool:
        thing.held["addresses"][name] = address
        return address != 0

    def IExecutionContext_set_device_memory(self, thing: Any, address: int, size: int) -> None:
        thing.held["scratch"] = (address, size)

    def IExecutionContext_execute_async_v3(self, thing: Any, stream: int) -> bool:
        engine, addresses = thing.held["engine"].held, thing.held["addresses"]
        if "scratch" not in thing.held:
            self._error("no device memory")
            return False
        if self.compute is not None:
            sides = ({port[0]: _at(addresses, port, thing) for port in engine[side]} for side in ("inputs", "outputs"))
            self.compute(engine["title"], *sides)
            return True
        first = _at(addresses, engine["inputs"][0], thing)
        for port in engine["outputs"]:
            values = first.astype(np.float64) * np.prod(list(engine["weights"].values()))
            _at(addresses, port, thing)[...] = values
        return True

    def Refitter_init(self, thing: Any, engine: Any, logger: Any) -> None:
        assert engine.held["refittable"]
        thing.held |= {"engine": engine, "new": {}}

    def Refitter_get_all_weights(self, thing: Any) -> list[str]:
        return list(thing.held["engine"].held["weights"])

    def Refitter_get_weights_prototype(self, thing: Any, name: str) -> Any:
        dtype = self.DataType[thing.held["engine"].held["weight_type"]]
        return self._make("Weights", dtype=dtype, size=1)

    def Weights_init(self, thing: Any, dtype: Any, address: int, count: int) -> None:
        thing.held |= {"dtype": dtype, "address": address, "size": count}

    def Refitter_set_named_weights(self, thing: Any, name: str, weights: Any) -> bool:
        thing.held["new"][name] = weights
        return True

    def Refitter_get_missing_weights(self, thing: Any) -> list[str]:
        given = set(thing.held["new"]) & set(self.needs_together)
        return sorted(set(self.needs_together) - given) if given else []

    def Refitter_refit_cuda_engine(self, thing: Any) -> bool:
        if self.refit_fails:
            self._error("refit failed")
            return False
        for name, weights in thing.held["new"].items():
            held = weights.held if isinstance(weights, Thing) else None
            thing.held["engine"].held["weights"][name] = (
                weights if held is None else float(_memory(held["address"], NUMPY[held["dtype"].name], 1)[0])
            )
        return True

    def OnnxParserRefitter_init(self, thing: Any, refitter: Any, logger: Any) -> None:
        thing.held["refitter"] = refitter

    def OnnxParserRefitter_get_num_errors(self, thing: Any) -> int:
        return len(thing.held.get("errors", []))

    def OnnxParserRefitter_get_error(self, thing: Any, index: int) -> Any:
        return self._make("ParserError", desc=thing.held["errors"][index])

    def OnnxParserRefitter_refit_from_file(self, thing: Any, path: str) -> bool:
        weights, refitter = _read(path)["weights"], thing.held["refitter"]
        if set(weights) != set(refitter.held["engine"].held["weights"]):
            thing.held["errors"] = [f"weights {', '.join(weights)} are not the engine's"]
            return False
        refitter.held["new"] |= weights
        return True


def _split(text: str) -> list[str]:
    """Parameters of a signature; commas within <...> and [...] do not part them."""
    return [part.strip() for part in re.split(r",\s*(?![^<\[]*[>\]])", text)]


def _read(path: str) -> dict[str, Any]:
    import onnx

    graph = onnx.load(path).graph
    sides = lambda value: [s.dim_value or -1 for s in value.type.tensor_type.shape.dim]  # noqa: E731
    ports = lambda values: [[v.name, ONNX[v.type.tensor_type.elem_type], sides(v)] for v in values]  # noqa: E731
    weights = {w.name: float(onnx.numpy_helper.to_array(w).reshape(-1)[0]) for w in graph.initializer}
    kinds = [ONNX[w.data_type] for w in graph.initializer]
    return {
        "title": graph.name,
        "inputs": ports(graph.input),
        "outputs": ports(graph.output),
        "weights": weights,
        "weight_type": kinds[0] if kinds else "FLOAT",
    }


def _port(engine: Any, side: str, name: str) -> list[Any] | None:
    return next((port for port in engine.held[side] if port[0] == name), None)


def _output_shape(context: Any, built: list[int]) -> tuple[int, ...]:
    """An output's open sizes are those of the first input."""
    first = next(iter(context.held["shapes"].values()))
    return tuple(first[at] if side == -1 else side for at, side in enumerate(built))


def _memory(address: int, dtype: str, count: int) -> np.ndarray:
    raw = (ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, dtype, count)


def _at(addresses: dict[str, int], port: list[Any], context: Any) -> np.ndarray:
    shape = context.held["shapes"].get(port[0]) or _output_shape(context, port[2])
    return _memory(addresses[port[0]], NUMPY[port[1]], int(np.prod(shape))).reshape(shape)
