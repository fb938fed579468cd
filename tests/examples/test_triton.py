"""The model repository for NVIDIA Triton Inference Server: its files agree, its model edits where a server is faked."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

from ddengine.config import DirectDragConfig

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "triton" / "ddengine"
NUMPY = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
FEW = DirectDragConfig.preset("preview", n_inference_step=3, drag_end_step=1, track_per_step=1)


def message(name: str, *fields: tuple[str, int, str], repeated: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {"name": name, "field": [_field(*one, one[0] in repeated) for one in fields], **more}


def _field(name: str, number: int, kind: str, repeated: bool) -> dict[str, Any]:
    about = {"name": name, "number": number, "label": "LABEL_REPEATED" if repeated else "LABEL_OPTIONAL"}
    named = {"Kind", "DataType"} & {kind.rpartition(".")[2]}
    if kind.islower():
        return {**about, "type": f"TYPE_{kind.upper()}"}
    return {**about, "type": "TYPE_ENUM" if named else "TYPE_MESSAGE", "type_name": f".inference.{kind}"}


def enum(name: str, **values: int) -> dict[str, Any]:
    return {"name": name, "value": [{"name": key, "number": number} for key, number in values.items()]}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """config.pbtxt, read by protobuf's own parser as what the server calls a ModelConfig, its fields used here."""
    data_type = enum("DataType", TYPE_INVALID=0, TYPE_UINT8=2, TYPE_INT64=9, TYPE_FP32=11, TYPE_STRING=13)
    kind = enum("Kind", KIND_AUTO=0, KIND_GPU=1, KIND_CPU=2, KIND_MODEL=3)
    tensor = [("name", 1, "string"), ("data_type", 2, "DataType")]
    entry = message(
        "ParametersEntry", ("key", 1, "string"), ("value", 2, "ModelParameter"), options={"map_entry": True}
    )
    messages = [
        message("ModelInput", *tensor, ("dims", 4, "int64"), ("optional", 8, "bool"), repeated=("dims",)),
        message("ModelOutput", *tensor, ("dims", 3, "int64"), repeated=("dims",)),
        message("ModelInstanceGroup", ("count", 2, "int32"), ("kind", 4, "ModelInstanceGroup.Kind"), enum_type=[kind]),
        message("ModelParameter", ("string_value", 1, "string")),
        message(
            "ModelConfig",
            ("name", 1, "string"),
            ("max_batch_size", 4, "int32"),
            ("input", 5, "ModelInput"),
            ("output", 6, "ModelOutput"),
            ("instance_group", 7, "ModelInstanceGroup"),
            ("parameters", 14, "ModelConfig.ParametersEntry"),
            ("backend", 17, "string"),
            repeated=("input", "output", "instance_group", "parameters"),
            nested_type=[entry],
        ),
    ]
    file = {"name": "model_config.proto", "package": "inference", "syntax": "proto3"}
    made = json_format.ParseDict(
        {**file, "message_type": messages, "enum_type": [data_type]}, descriptor_pb2.FileDescriptorProto()
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(made)
    parsed = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    text_format.Parse((FOLDER / "config.pbtxt").read_text(encoding="utf-8"), parsed)
    return json_format.MessageToDict(
        parsed, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


# A stand-in for the module that the server gives its Python models.


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "internal", "invalid", "unavailable", "cancelled"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Response:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Request:
    tensors: dict[str, np.ndarray]
    config: str | None = None
    looks: int | None = None  # cancelled from this look on
    looked: int = 0

    def parameters(self) -> str:
        return "" if self.config is None else json.dumps({"config": self.config})

    def is_cancelled(self) -> bool:
        self.looked += 1
        return self.looks is not None and self.looked >= self.looks


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.tensors[name]) if name in request.tensors else None


@pytest.fixture
def model(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's model, initialised as the server would on a machine without a GPU."""
    fake = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.TritonError, fake.InferenceResponse = Tensor, TritonError, Response
    fake.get_input_tensor_by_name = get_input_tensor_by_name
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    spec = importlib.util.spec_from_file_location("triton_model", FOLDER / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    made.initialize({"model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    return made


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset `preview` with three steps: what a request may name, at a test's cost."""
    from ddengine import config as module

    monkeypatch.setitem(module.PRESETS, "preview", {**module.PRESETS["preview"], **_changes()})


def _changes() -> dict[str, Any]:
    return {name: getattr(FEW, name) for name in ("n_inference_step", "drag_end_step", "track_per_step")}


def picture() -> np.ndarray:
    ramp = np.linspace(0, 255, 80, dtype=np.uint8)
    return np.ascontiguousarray(np.stack(np.broadcast_arrays(ramp[:64, None], ramp[None], 90), -1).astype(np.uint8))


def test_the_configuration_is_one(config: dict[str, Any]) -> None:
    assert config["name"] == FOLDER.name and config["backend"] == "python" and config["max_batch_size"] == 0
    assert [one["name"] for one in config["input"] if not one.get("optional")] == ["image", "drags"]
    assert {"model", "backend", "dtype"} == set(config["parameters"])


def test_the_protocol_s_own_server_has_the_same_tensors(model: Any, config: dict[str, Any]) -> None:
    """What `ddengine serve` says of its model at /v2 is what config.pbtxt declares, so one client serves both."""
    pytest.importorskip("fastapi")
    from ddengine.serve import inference
    from ddengine.serve.app import create_app
    from ddengine.serve.limits import Limits
    from ddengine.serve.service import Service

    asked = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(service=Service(None, Limits(), config["name"]))))
    found = asyncio.run(inference.model(asked, config["name"]))
    for mine, theirs in ((config["input"], found.inputs), (config["output"], found.outputs)):
        assert [(one["name"], one["data_type"], [int(n) for n in one["dims"]]) for one in mine] == [
            (one.name, f"TYPE_{one.datatype}", one.shape) for one in theirs
        ]
    assert sys.modules[type(model).__module__].STAGES == inference.STAGES
    assert create_app(None).state.service.name == config["name"]


def test_it_edits_as_the_engine_does(model: Any, config: dict[str, Any], few_steps: None) -> None:
    module = sys.modules[type(model).__module__]
    image, drags = picture(), np.array([[20, 30, 34, 30], [50, 20, 50, 32]], np.float32)
    whole = Request({"image": image, "drags": drags, "seed": np.array([3])}, config="preview")
    bad = Request({"image": image, "drags": np.array([[20, 30, 3400, 30]], np.float32)})
    first, refused, second = model.execute([whole, bad, whole])
    assert refused.error.code == TritonError.INVALID_ARG and "3400" in str(refused.error)

    expected = model.engine.edit(
        image, [((20, 30), (34, 30)), ((50, 20), (50, 32))], config=DirectDragConfig.preset("preview"), seed=3
    )
    assert whole.looked > 2  # a look a step
    for response in (first, second):
        assert response.error is None
        found = {tensor.name: tensor.array for tensor in response.output_tensors}
        declared = {one["name"]: one for one in config["output"]}
        assert found.keys() == declared.keys()
        for name, array in found.items():
            dims = [int(number) for number in declared[name]["dims"]]
            assert array.dtype == NUMPY[declared[name]["data_type"]] and array.ndim == len(dims)
            assert all(want in (-1, got) for want, got in zip(dims, array.shape, strict=True))
        np.testing.assert_array_equal(found["image"], np.asarray(expected.image))
        np.testing.assert_allclose(found["points"], expected.handles, atol=1e-4)
        assert found["timings"][list(module.STAGES).index("drag")] > 0


@pytest.mark.parametrize("looks", [1, 4])
def test_a_cancelled_request_stops_at_the_next_step(model: Any, few_steps: None, looks: int) -> None:
    request = Request({"image": picture(), "drags": np.array([[20, 30, 34, 30]], np.float32)}, looks=looks)
    (response,) = model.execute([request])
    assert response.error.code == TritonError.CANCELLED and request.looked == looks


@pytest.mark.parametrize("fault", [RuntimeError("CUDA error: secret"), MemoryError("secret"), KeyError("secret")])
def test_what_nobody_expected_is_an_answer_and_a_line_in_the_log(
    model: Any, few_steps: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    edit = model.engine.edit

    def fail_once(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(model.engine, "edit", edit)
        raise fault

    monkeypatch.setattr(model.engine, "edit", fail_once)
    request = Request({"image": picture(), "drags": np.array([[20, 30, 34, 30]], np.float32)}, config="preview")
    failed, made = model.execute([request, request])
    assert failed.error.code == TritonError.INTERNAL and type(fault).__name__ in str(failed.error)
    assert "secret" not in str(failed.error) and "secret" in caplog.text
    assert made.error is None and made.output_tensors


def test_an_unknown_preset_is_the_requests_own_fault(model: Any) -> None:
    request = Request({"image": picture(), "drags": np.zeros((1, 4), np.float32)}, config="nothing")
    (response,) = model.execute([request])
    assert response.error.code == TritonError.INVALID_ARG and "nothing" in str(response.error)
    model.finalize()
