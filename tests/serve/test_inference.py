"""The Open Inference Protocol: metadata, tensors as JSON and as binary data, refusals in its own form."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serve_fakes import PICTURE, FakeEngine, serving

from ddengine.serve import inference, tensors
from ddengine.serve.faults import Fault
from ddengine.serve.schemas import read_json
from ddengine.serve.tensors import InferIn, read_tensors, split

PIXELS = np.asarray(Image.open(BytesIO(PICTURE)).convert("RGB"))
PATH = "/v2/models/ddengine/infer"


def tensor(name, values, kind, **more):
    return {"name": name, "shape": list(np.shape(values)), "datatype": kind, "data": np.ravel(values).tolist(), **more}


def asked(image=None, drags=None, **more):
    image = tensor("image", PIXELS, "UINT8") if image is None else image
    drags = tensor("drags", [[20, 30, 40, 30]], "FP32") if drags is None else drags
    return {"inputs": [image, drags], **more}


async def test_what_the_server_and_the_model_say_of_themselves(intake):
    async with serving(intake=intake) as it:
        server = (await it.http.get("/v2")).json()
        assert server["name"] == "ddengine" and server["extensions"] == ["binary_tensor_data"]
        model = (await it.http.get("/v2/models/ddengine")).json()
        assert [one["name"] for one in model["inputs"]] == ["image", "drags", "seed"]
        assert [(one["name"], one["datatype"]) for one in model["outputs"]] == [
            ("image", "UINT8"), ("points", "FP32"), ("timings", "FP32"),
        ]  # fmt: skip
        assert (await it.http.get("/v2/models/ddengine/ready")).json() == {"name": "ddengine", "ready": True}
        for path in ("/v2/models/other", "/v2/models/other/ready", "/v2/models/..%2Fx", "/v2/models/a/versions/1"):
            answer = await it.http.get(path)
            assert answer.status_code == 404 and isinstance(answer.json()["error"], str)
        answer = await it.http.post("/v2/models/stable-diffusion/infer", json=asked())
        assert answer.status_code == 404 and it.engine.edits == []


async def test_an_edit_as_json_and_as_binary_data(intake):
    expected = PIXELS.copy()
    expected[30, 40] = (255, 0, 9)
    async with serving(intake=intake) as it:
        seed = tensor("seed", [9], "INT64")
        request = asked(id="abc", parameters={"config": "fast"})
        request["inputs"].append(seed)
        answer = (await it.http.post(PATH, json=request)).json()
        assert (answer["model_name"], answer["id"]) == ("ddengine", "abc")
        image, points, timings = answer["outputs"]
        assert (image["datatype"], image["shape"]) == ("UINT8", [64, 80, 3])
        np.testing.assert_array_equal(np.reshape(image["data"], image["shape"]), expected)
        assert points["data"] == [40, 30] and points["shape"] == [1, 2]
        stages = timings["parameters"]["stages"].split(",")
        assert dict(zip(stages, timings["data"], strict=True))["drag"] == 0.5
        assert it.engine.seen[-1][2].n_inference_step == 25

        # The same as binary data, inputs and outputs, and nested lists for the drags.
        raw = {"name": "image", "shape": list(PIXELS.shape), "datatype": "UINT8"}
        request = asked(
            {**raw, "parameters": {"binary_data_size": PIXELS.nbytes}}, parameters={"binary_data_output": True}
        )
        request["inputs"][1]["data"] = [[20, 30, 40, 30]]
        request["inputs"].append(seed)
        request["outputs"] = [{"name": "points", "parameters": {"binary_data": False}}, {"name": "image"}]
        text = json.dumps(request).encode()
        headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
        answer = await it.http.post(PATH, content=text + PIXELS.tobytes(), headers=headers)
        length = int(answer.headers["inference-header-content-length"])
        points, image = json.loads(answer.content[:length])["outputs"]
        assert points["data"] == [40, 30] and image["parameters"]["binary_data_size"] == PIXELS.nbytes
        np.testing.assert_array_equal(
            np.frombuffer(answer.content[length:], np.uint8).reshape(expected.shape), expected
        )


@pytest.mark.parametrize(
    ("request_json", "status"),
    [
        ({}, 422), ({"inputs": []}, 422), (asked(outputs=[{"name": "other"}]), 422),
        (asked(parameters={"config": "other"}), 422), (asked(parameters={"model": "x"}), 422),
        (asked(drags=tensor("drags", [[20, 30, 40]], "FP32")), 422),
        (asked(drags=tensor("drags", [[20, 30, 400, 30]], "FP32")), 422),
        (asked(drags=tensor("drags", [[20, 30, 40, 30]] * 33, "FP32")), 422),
        (asked(drags=tensor("drags", [[20, 30, 1e39, 30]], "FP32")), 422),
        (asked(drags=tensor("drags", [["a", "b", "c", "d"]], "FP32")), 422),
        (asked(drags=tensor("drags", [20, 30, 40, 30], "FP32")), 422),
        (asked(drags={**tensor("drags", [[20, 30, 40, 30]], "FP32"), "shape": [1, 5]}), 422),
        (asked(drags={**tensor("drags", [[20, 30, 40, 30]], "FP32"), "shape": [-1, -4]}), 422),
        (asked(drags={**tensor("drags", [[20, 30, 40, 30]], "FP32"), "data": [[1, 2], [3]]}), 422),
        (asked(drags={**tensor("drags", [[20, 30, 40, 30]], "FP32"), "parameters": {"binary_data_size": 16}}), 422),
        (asked(tensor("image", PIXELS + 0.5, "UINT8")), 422), (asked(tensor("image", PIXELS * 2 - 1, "INT64")), 422),
        (asked(tensor("image", PIXELS + 200.0, "UINT8")), 422), (asked(tensor("image", PIXELS[:63], "UINT8")), 422),
        (asked({"name": "image", "shape": [1 << 20] * 3, "datatype": "UINT8", "data": []}), 422),
        (asked({**tensor("image", PIXELS, "UINT8"), "name": "drags"}), 422),
        (asked(tensor("image", PIXELS[..., 0], "UINT8")), 422), ("nonsense", 422),
    ],
    ids=range(23),
)  # fmt: skip
async def test_requests_that_are_none(intake, request_json, status):
    async with serving(intake=intake) as it:
        answer = await it.http.post(PATH, json=request_json)
        assert answer.status_code == status and answer.json()["code"] == "invalid", answer.text[:300]
        assert isinstance(answer.json()["error"], str) and it.engine.edits == [] and it.service.jobs.open == 0


async def test_limits_hold_here_too(intake):
    async with serving(intake=intake, pixels=80 * 64 - 1) as it:
        answer = await it.http.post(PATH, json=asked())
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        headers = {"Inference-Header-Content-Length": "99999999"}
        assert (await it.http.post(PATH, json=asked(), headers=headers)).status_code == 400
        assert (await it.http.post(PATH, content=b"[" * 90_000)).status_code == 400


async def test_json_is_for_small_pictures(intake, monkeypatch):
    async with serving(intake=intake) as it:
        limit = tensors.JSON_BYTES
        raw = {"name": "image", "shape": list(PIXELS.shape), "datatype": "UINT8"}
        raw["parameters"] = {"binary_data_size": PIXELS.nbytes}

        async def status(request, pad: int = 0):
            text = json.dumps(request).encode()
            text += b" " * (pad - len(text))
            headers = {"Inference-Header-Content-Length": str(len(text))}
            answer = await it.http.post(PATH, content=text + PIXELS.tobytes(), headers=headers)
            return answer.status_code, answer.content

        assert (await status(asked(raw), limit))[0] == 200
        for answer in (await status(asked(raw), limit + 1), await status(asked(raw), 3 * limit)):
            assert answer[0] == 413 and b'"too_large"' in answer[1] and f"{limit}; send".encode() in answer[1]
        plain = await it.http.post(PATH, content=b"[" * (limit + 1))
        assert plain.status_code == 413 and "binary" in plain.json()["error"]

        edits = len(it.engine.edits)
        monkeypatch.setattr(inference, "JSON_VALUES", PIXELS.size - 1)
        for more in ({}, {"outputs": [{"name": "image"}]}, {"parameters": {"binary_data_output": False}}):
            code, body = await status(asked(raw, **more))
            assert code == 413 and b"binary_data_output" in body and str(PIXELS.size - 1).encode() in body, more
        assert len(it.engine.edits) == edits, "it ran, and nobody gets it"
        binary = {"name": "image", "parameters": {"binary_data": True}}
        for more in (
            {"parameters": {"binary_data_output": True}},
            {"outputs": [binary]},
            {"outputs": [{"name": "points"}]},
        ):
            assert (await status(asked(raw, **more)))[0] == 200, more


def test_a_picture_of_512_x_512_may_come_and_go_as_json():
    pixels = np.full((512, 512, 3), 255, np.uint8)
    assert len(json.dumps(asked(tensor("image", pixels, "UINT8"))).encode()) <= tensors.JSON_BYTES
    assert pixels.size <= tensors.JSON_VALUES


def test_the_stages_are_the_engine_s():
    from ddengine import engine

    assert (*engine.STAGES, "total") == inference.STAGES


async def test_an_edit_that_fails_is_found_in_the_log_by_its_id(intake, caplog):
    engine = FakeEngine()
    engine.error = RuntimeError("a bug")
    async with serving(engine, intake) as it:
        with caplog.at_level("INFO"):
            assert (await it.http.post(PATH, json=asked())).status_code == 500
    told = {record.name.rpartition(".")[2]: record.facts for record in caplog.records if hasattr(record, "facts")}
    assert {"running", "jobs", "access"} <= told.keys()
    assert len({told[name]["edit"] for name in ("running", "jobs", "access")}) == 1


@settings(max_examples=60)
@given(
    st.lists(st.integers(-2, 4) | st.just(1 << 19), min_size=1, max_size=3),
    st.sampled_from(["UINT8", "FP32", "INT64"]),
    st.none() | st.integers(-1, 70),
    st.none()
    | st.recursive(st.integers(-1, 256) | st.floats() | st.text(max_size=2) | st.none(), st.lists, max_leaves=8),
    st.binary(max_size=64),
)
def test_tensors_of_anything(shape, kind, size, data, binary):
    """Whatever is sent: arrays of the shape and type said, or a refusal."""
    one = {"name": "drags", "shape": shape, "datatype": kind, "data": data if isinstance(data, list) else None}
    if size is not None:
        one["parameters"] = {"binary_data_size": size}
    status, found = 200, {}
    try:
        _, rest = split(json.dumps({"inputs": [one, one]}).encode() + binary, None)
        assert rest == b""
        form = read_json(json.dumps({"inputs": [one, one]}).encode(), InferIn, "request")
        found = read_tensors(form.inputs[:1], binary)
    except Fault as fault:
        status = fault.status
    assert status in (200, 400, 422)
    for values in found.values():
        assert list(values.shape) == shape and min(shape) > 0
