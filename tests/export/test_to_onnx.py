"""ONNX graphs of the passes: valid, named, documented, free of constants' arithmetic, and the same numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from ddengine.backends.eager import EagerPasses
from ddengine.backends.graphs import PassGraph, PassShape, pass_graph
from ddengine.errors import BackendUnavailable, Cancelled, InputError, ModelError
from ddengine.export import to_onnx
from ddengine.export.count import count_graph
from ddengine.export.to_onnx import GRAPH, WEIGHTS, GraphRequest, check_graph, export_graph, needed_shape, stored_graph
from ddengine.models.load import Model, load_model
from ddengine.store import ArtefactStore

ROOT = Path(__file__).resolve().parents[2]
SHAPE = PassShape((48, 64), readout_hw=(6, 8), prompt_tokens=5)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def eager(model: Model) -> EagerPasses:
    return EagerPasses(model)


@pytest.fixture(scope="module")
def walk(model: Model, eager: EagerPasses) -> PassGraph:
    return pass_graph("reference", model, eager.network, SHAPE)


@pytest.fixture(scope="module")
def written(walk: PassGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference pass with a readout map, for a prompt: the graph that has everything."""
    folder = tmp_path_factory.mktemp("walk")
    export_graph(walk, folder)
    return folder / GRAPH


def run(path: Path, inputs: tuple[torch.Tensor, ...], graph: PassGraph) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {one.name: tensor.numpy() for one, tensor in zip(graph.spec.inputs, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def close(found: list[torch.Tensor], wanted: tuple[torch.Tensor, ...], share: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=share * float(theirs.abs().max()))


@pytest.mark.parametrize("time", [0, 421, 999])
def test_a_walk_gives_the_same_numbers(walk: PassGraph, written: Path, time: int) -> None:
    inputs = list(walk.make_inputs(torch.Generator().manual_seed(time)))
    inputs[1] = torch.tensor([time])
    close(run(written, tuple(inputs), walk), walk(*inputs), 1e-5)


def test_a_graph_says_what_it_takes_and_gives_and_nothing_of_this_machine(walk: PassGraph, written: Path) -> None:
    found = onnx.load(written)
    assert {one.key: one.value for one in found.metadata_props}["pass"] == "reference"
    described = {one.key: json.loads(one.value) for one in found.metadata_props if one.key in ("inputs", "outputs")}
    for side, values, specs in (
        ("inputs", found.graph.input, walk.spec.inputs),
        ("outputs", found.graph.output, walk.spec.outputs),
    ):
        assert [(value.name, value.doc_string) for value in values] == [(one.name, one.meaning) for one in specs]
        assert [tuple(one["shape"]) for one in described[side]] == [one.shape for one in specs]
        assert all(one.meaning for one in specs)
    text = str(found.graph.node) + str(found.graph.value_info) + str(found.metadata_props)
    assert "site-packages" not in text and str(ROOT) not in text and ".py" not in text


def test_no_folded_layer_is_left(model: Model, eager: EagerPasses, walk: PassGraph, written: Path) -> None:
    """What the graph holds is what the layers that ran hold, and the table of times."""
    ran: dict[str, torch.nn.Module] = {}
    hooks = []
    for name, module in walk.named_modules():
        hooks.append(module.register_forward_hook(lambda m, *_, name=name: ran.update({name: m})))
    walk(*walk.make_inputs())
    for hook in hooks:
        hook.remove()
    folded = ("attn2.to_k", "attn2.to_v", "time_emb_proj", "time_embedding", "emb_layers")
    assert not [name for name in ran if any(part in name for part in folded)]
    found = onnx.load(written)
    names = [weight.name for weight in found.graph.initializer]
    assert not [name for name in names if any(part in name for part in folded)]
    held = sum(np.prod(weight.dims) for weight in found.graph.initializer if weight.data_type == TensorProto.FLOAT)
    wanted = sum(p.numel() for module in ran.values() for p in module.parameters(recurse=False))
    wanted += eager.network.time_table.numel()
    assert abs(held - wanted) < 1e-3 * wanted  # equal scales are held once, axes and sizes are a few numbers more
    assert check_graph(written, walk).constant_nodes == 0


def test_a_smaller_pass_is_cut_out_of_a_larger_one(
    model: Model, eager: EagerPasses, written: Path, tmp_path: Path
) -> None:
    graph = pass_graph("predict", model, eager.network, SHAPE)
    cut = export_graph(graph, tmp_path, larger=written)
    inputs = graph.make_inputs(torch.Generator().manual_seed(1))
    close(run(tmp_path / GRAPH, inputs, graph), graph(*inputs), 1e-5)
    whole = count_graph(written)
    assert cut.count.nodes < whole.nodes - 100  # the readout head is gone
    assert cut.count.flops < whole.flops and not {"Relu", "ReduceSum"} & cut.count.by_op.keys()
    assert onnx.load(tmp_path / GRAPH).graph.name == "predict"


def test_halves_are_normalised_in_float32(model: Model, tmp_path: Path) -> None:
    half = load_model("embedded", device="cpu", dtype="float16")
    network = EagerPasses(half).network
    graph, wide = pass_graph("encode", half, network, SHAPE), pass_graph("encode", model, network, SHAPE)
    export_graph(graph, tmp_path)
    found = onnx.load(tmp_path / GRAPH)
    kinds = {weight.name: weight.data_type for weight in found.graph.initializer}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in found.graph.value_info}
    norms = [node for node in found.graph.node if "Normalization" in node.op_type]
    convolutions = [node for node in found.graph.node if node.op_type == "Conv"]
    assert norms and {kinds[name] for node in norms for name in node.input} == {TensorProto.FLOAT}
    assert {kinds[name] for node in convolutions for name in node.input[1:]} == {TensorProto.FLOAT16}
    inputs = graph.make_inputs(torch.Generator().manual_seed(0))
    close(run(tmp_path / GRAPH, inputs, graph), wide(*inputs), 5e-3)
    assert next(half.vae.parameters()).dtype == torch.float16  # the model itself is as it was
    assert all(p.dtype == torch.float16 for m in half.vae.modules() for p in m.parameters(recurse=False))


def test_brain_floats_take_the_first_opset_that_has_them(model: Model) -> None:
    half = load_model("embedded", device="cpu", dtype="bfloat16")
    assert GraphRequest.of("predict", half, SHAPE).opset == 22
    assert GraphRequest.of("encode", half, SHAPE).opset == 20  # its autoencoder computes in float32
    assert GraphRequest.of("predict", model, SHAPE, opset=18).opset == 18
    with pytest.raises(InputError, match="opset 17 is not written; use 18 to 23"):
        GraphRequest.of("predict", model, SHAPE, opset=17)


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_a_batch_may_be_left_open(name: str, model: Model, eager: EagerPasses, tmp_path: Path) -> None:
    graph = pass_graph(name, model, eager.network, PassShape((48, 64), batch=2))
    export_graph(graph, tmp_path, dynamic_batch=True)
    for batch in (1, 3):
        other = pass_graph(name, model, eager.network, PassShape((48, 64), batch=batch))
        inputs = other.make_inputs(torch.Generator().manual_seed(batch))
        close(run(tmp_path / GRAPH, inputs, other), other(*inputs), 1e-5)


def test_the_newest_opset_has_group_normalisation_as_one_operator(
    model: Model, eager: EagerPasses, tmp_path: Path
) -> None:
    graph = pass_graph("encode", model, eager.network, SHAPE)
    found = export_graph(graph, tmp_path, opset=23).count
    assert found.by_op["GroupNormalization"] == 13 and "InstanceNormalization" not in found.by_op
    inputs = graph.make_inputs(torch.Generator().manual_seed(0))
    close(run(tmp_path / GRAPH, inputs, graph), graph(*inputs), 1e-5)


def small_graph(tmp_path: Path) -> tuple[Path, onnx.ModelProto]:
    """A product of two weights, and its product with the input."""
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [4, 4], [1.0] * 16) for name in ("a", "b")]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y")]
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("MatMul", ["x", "c"], ["y"])]
    inside = [helper.make_tensor_value_info("c", TensorProto.FLOAT, [4, 4])]
    graph = helper.make_graph(nodes, "g", [ports[0]], [ports[1]], weights, value_info=inside)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return tmp_path / GRAPH, model


def test_a_graph_that_computes_from_constants_or_has_other_ports_is_refused(
    model: Model, eager: EagerPasses, tmp_path: Path
) -> None:
    path, bad = small_graph(tmp_path)
    onnx.save(bad, path)
    with pytest.raises(ModelError, match="1 nodes compute from constants alone"):
        check_graph(path)
    graph = pass_graph("encode", model, eager.network, SHAPE)
    export_graph(graph, tmp_path)
    with pytest.raises(ModelError, match=r"'image', 1, \(1, 3, 48, 64\).*should"):
        check_graph(tmp_path / GRAPH, pass_graph("encode", model, eager.network, PassShape((64, 64))))
    broken = onnx.load(tmp_path / GRAPH)
    del broken.graph.node[3]
    onnx.save(broken, tmp_path / GRAPH)
    with pytest.raises(ModelError, match="is not valid ONNX"):
        check_graph(tmp_path / GRAPH)


def test_counting(tmp_path: Path) -> None:
    path, model = small_graph(tmp_path)
    onnx.save(model, path)
    found = count_graph(path)
    assert (found.nodes, found.constant_nodes, found.unknown_shapes) == (2, 1, 0)
    assert found.flops_by_op == {"MatMul": 2 * 4 * 4 * 4 + 2 * 2 * 4 * 4}
    ports = {"x": [1, 6, 8, 8], "y": [1, 9, 4, 4], "q": [1, 2, 5, 3], "k": [1, 2, 7, 3], "o": [1, 2, 5, 3], "m": [3, 5]}
    ports |= {"n": [2, 5], "t": [1, 3, 16, 16]}
    named = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in ports.items()}
    sides = {"w": [9, 2, 3, 3], "v": [3, 2], "u": [6, 3, 2, 2]}
    weights = [helper.make_tensor(name, 1, s, [0.0] * int(np.prod(s))) for name, s in sides.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], group=3, strides=[2, 2]),
        helper.make_node("Attention", ["q", "k", "k"], ["o"]),
        helper.make_node("Gemm", ["v", "m"], ["n"], transA=1),
        helper.make_node("ConvTranspose", ["x", "u"], ["t"], strides=[2, 2]),
    ]
    graph = helper.make_graph(nodes, "g", [named[n] for n in "xqkm"], [named[n] for n in "yont"], weights)
    assert count_graph(helper.make_model(graph)).flops_by_op == {
        "Conv": 2 * (9 * 4 * 4) * 2 * 9,
        "Attention": 2 * 2 * 5 * 7 * 3 * 2,
        "Gemm": 2 * 2 * 5 * 3,
        "ConvTranspose": 2 * 6 * 64 * 3 * 4,
    }


def test_a_key_holds_what_a_pass_depends_on_and_nothing_else(model: Model) -> None:
    def key(name: str = "predict", **changes: object) -> str:
        options = {"opset": changes.pop("opset")} if "opset" in changes else {}
        shape = PassShape(**{"image_hw": (48, 64), **changes})
        return json.dumps(GraphRequest.of(name, model, shape, **options).facts())

    assert key() == key(readout_hw=(6, 8)) == key(image_hw=(55, 71))
    assert key("encode") == key("encode", prompt_tokens=4) != key("encode", image_hw=(55, 71))
    different = [key(), key("denoise"), key(image_hw=(64, 48)), key(batch=2), key(prompt_tokens=4), key(opset=23)]
    different += [key("reference"), key("reference", readout_hw=(6, 8)), key("reference", readout_hw=(8, 8))]
    assert len(set(different)) == len(different)
    assert needed_shape("decode", PassShape((83, 70), 2, (4, 4), 3)) == PassShape((80, 64), 2)


def test_a_graph_is_exported_once_and_kept_whole(
    model: Model, eager: EagerPasses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told = ArtefactStore(tmp_path), []
    monkeypatch.setattr(to_onnx, "_INSIDE", 0)  # weights in a file of their own

    def stop(at: object) -> None:
        told.append(at)
        if at.step == 3:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        stored_graph(store, model, eager.network, "encode", SHAPE, progress=stop)
    assert told and not list(tmp_path.rglob(GRAPH))
    first = stored_graph(store, model, eager.network, "encode", SHAPE, check=lambda *_: {"found": 1})
    assert {GRAPH, WEIGHTS} == first.files.keys()
    assert first.facts["weights"] == model.digest and first.about["found"] == 1
    assert first.about["versions"]["onnx"] == onnx.__version__ and first.about["flops"] > 1e8
    assert to_onnx.stored_spec(first) == pass_graph("encode", model, eager.network, SHAPE).spec
    monkeypatch.setattr(to_onnx, "export_graph", None)
    assert stored_graph(store, model, eager.network, "encode", SHAPE) == first
    graph = pass_graph("encode", model, eager.network, SHAPE)
    inputs = graph.make_inputs(torch.Generator().manual_seed(0))
    close(run(first.path(GRAPH), inputs, graph), graph(*inputs), 1e-5)


def test_what_a_check_refuses_is_not_kept(model: Model, eager: EagerPasses, tmp_path: Path) -> None:
    def refuse(*_: object) -> dict[str, float]:
        raise ModelError("too far off; do not use it")

    store = ArtefactStore(tmp_path)
    with pytest.raises(ModelError, match="too far off"):
        stored_graph(store, model, eager.network, "encode", SHAPE, check=refuse)
    assert store.entries() == []


def test_without_the_exporter_it_says_what_to_install(
    walk: PassGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"onnx and onnxscript; pip install 'ddengine\[onnx\]'"):
        export_graph(walk, tmp_path)
