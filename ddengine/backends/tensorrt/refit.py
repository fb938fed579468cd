"""New weights in an engine that stands: for LoRA and other weights fused before export, without building again.

The engine must have been built `refittable`, for which TensorRT gives up folding and rearranging some weights. What
refitting costs, in seconds and in speed after it, depends on the GPU and has not been measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.backends.tensorrt.flavour import Flavour
from ddengine.backends.tensorrt.session import deserialize
from ddengine.errors import EngineMismatch, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int8": "INT8", "int32": "INT32"}


def refit_plan(plan: bytes, flavour: Flavour, weights: Arrays | None = None, onnx_path: Path | None = None) -> bytes:
    """The bytes of the same engine with other weights, refittable again; needs the GPU it was built for.

    Give either `weights`, arrays in host memory under the graph's initialiser names, or `onnx_path`, a graph that
    differs in its weights alone. Errors as `refit_engine` and for engines that are refused.
    """
    if (weights is None) == (onnx_path is None):
        raise ValueError("give either weights or onnx_path")
    runtime = flavour.trt.Runtime(flavour.logger)
    engine = deserialize(runtime, plan, flavour, "the engine to refit")
    if weights is not None:
        refit_engine(engine, flavour, weights)
    else:
        refit_from_onnx(engine, flavour, Path(str(onnx_path)))
    config = engine.create_serialization_config()
    config.set_flag(flavour.trt.SerializationFlag.INCLUDE_REFIT)
    return bytes(engine.serialize_with_config(config))


def refit_engine(engine: Any, flavour: Flavour, weights: Arrays) -> None:
    """Replace weights in an engine that no stream is running; its contexts stay valid, graphs are captured again.

    ModelError for weights it does not know, of another size or type, or without others they depend on: then the
    engine is as it was. EngineMismatch for an engine that was not built refittable, or that is left half changed.
    """
    trt = flavour.trt
    refitter = _refitter(engine, flavour)
    known = set(refitter.get_all_weights())
    unknown = sorted(weights.keys() - known)
    if unknown:
        raise ModelError(f"the engine has no weights {_few(unknown)}; it has {len(known)}, as {_few(sorted(known))}")
    with flavour.listening() as errors:
        for name, array in weights.items():
            wanted = refitter.get_weights_prototype(name)
            given = _TYPES.get(str(array.dtype), str(array.dtype))
            if wanted.size != array.size or wanted.dtype.name != given or not array.flags.c_contiguous:
                raise ModelError(
                    f"weights {name!r} are {array.size} numbers of {given}, the engine has {wanted.size} of "
                    f"{wanted.dtype.name}; export the graph as it was, with contiguous arrays"
                )
            # By address: the library knows no NumPy bfloat16. The caller's arrays outlive the refit.
            view = trt.Weights(getattr(trt.DataType, given), array.ctypes.data, array.size)
            if not refitter.set_named_weights(name, view):
                raise ModelError(f"weights {name!r} are refused: {'; '.join(errors) or 'no reason given'}; build again")
        missing = refitter.get_missing_weights()
        if missing:
            raise ModelError(f"these weights need others that go with them, {_few(missing)}; give all of them")
        if not refitter.refit_cuda_engine():
            raise _half_done(errors)


def refit_from_onnx(engine: Any, flavour: Flavour, path: Path) -> None:
    """Take all weights from an ONNX file that was exported as the engine's own was. Errors as `refit_engine`."""
    refitter = _refitter(engine, flavour)
    parser = flavour.trt.OnnxParserRefitter(refitter, flavour.logger)
    with flavour.listening() as errors:
        if not parser.refit_from_file(str(path)):
            said = [parser.get_error(index).desc() for index in range(parser.num_errors)] or list(errors)
            raise ModelError(f"{path} does not fit the engine: {'; '.join(said)}; export it as before, or build again")
        if not refitter.refit_cuda_engine():
            raise _half_done(errors)


def _refitter(engine: Any, flavour: Flavour) -> Any:
    if not engine.refittable:
        raise EngineMismatch("the engine was not built refittable; build it with refittable=True")
    return flavour.trt.Refitter(engine, flavour.logger)


def _half_done(errors: Iterable[str]) -> EngineMismatch:
    reasons = "; ".join(errors) or "no reason given"
    return EngineMismatch(
        f"refitting failed and may have changed some weights ({reasons}); load or build the engine again"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
