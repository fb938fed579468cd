"""Readout heads on disk: our format, the published checkpoint, and every refusal."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddengine.errors import InputError, ModelError
from ddengine.models.readout import ReadoutHead
from ddengine.models.readout_io import ReadoutShape, convert_readout, load_readout, save_readout

DIMS = (48,) * 6 + (32,) * 3 + (16,) * 3  # of the golden folder's UNet
SHAPE = ReadoutShape(dims=DIMS, time_dim=64, projection=128, bottleneck=32, groups=32)


def outputs(head: ReadoutHead, golden: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The head on the golden features, with the golden outputs with and without the time embedding."""
    data = np.load(golden / "units" / "aggregation.npz")
    taps = torch.from_numpy(data["feats_bchw"]).split(DIMS, dim=1)
    with torch.no_grad():
        found = head(taps, torch.from_numpy(data["emb"]), (16, 16))
    return found, data["out"], data["out_no_emb"]


def test_the_golden_head_loads_and_computes(golden: Path) -> None:
    head = load_readout(golden / "tiny-readout-appearance.safetensors", DIMS, 64)
    found, wanted, _ = outputs(head, golden)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5 * float(np.abs(wanted).max()))
    assert not head.training
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_the_published_checkpoint_converts_to_the_same_tensors(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "head.safetensors"
    assert convert_readout(golden / "tiny-readout-appearance.pt", out) == SHAPE
    torch.testing.assert_close(
        load_file(out), load_file(golden / "tiny-readout-appearance.safetensors"), rtol=0, atol=0
    )
    with safe_open(out, "pt") as file:
        assert '"save_timestep": [0]' in file.metadata()["config"]
    load_readout(out, DIMS, 64)


@pytest.fixture
def checkpoint(golden: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(golden / "tiny-readout-appearance.pt", weights_only=True)
    return loaded


def test_the_sequential_layout_ignores_the_time_embedding(
    golden: Path, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint["aggregation_network"] = {
        re.sub(r"^(bottleneck_layers\.\d+)\.", r"\1.0.", name): value
        for name, value in checkpoint["aggregation_network"].items()
    }
    torch.save(checkpoint, tmp_path / "sequential.pt")
    shape = convert_readout(tmp_path / "sequential.pt", tmp_path / "head.safetensors")
    assert shape == ReadoutShape(DIMS, None, 128, 32, 32)
    found, _, wanted = outputs(load_readout(tmp_path / "head.safetensors", DIMS, 64), golden)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("time_dim", [None, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_head_comes_back(tmp_path: Path, time_dim: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = ReadoutHead((6, 4), time_dim, projection=12, bottleneck=6, groups=3).to(dtype)
    save_readout(head, tmp_path / "head.safetensors", {"trained_on": "scenes"})
    back = load_readout(tmp_path / "head.safetensors", (6, 4), 10)
    assert (back.dims, back.time_dim, back.projection) == ((6, 4), time_dim, 12)
    assert (back.bottleneck, back.groups) == (6, 3)
    for name, value in head.state_dict().items():
        assert torch.equal(back.state_dict()[name], value.float())
    assert load_file(tmp_path / "head.safetensors")["mixing_weights"].dtype == dtype


class Hostile:
    """Unpickled the careless way, this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old_format", [False, True])
def test_a_hostile_pickle_is_refused_and_runs_nothing(
    checkpoint: dict[str, Any], tmp_path: Path, old_format: bool
) -> None:
    target, bad, out = tmp_path / "owned", tmp_path / "bad.pt", tmp_path / "out.safetensors"
    checkpoint["config"]["prompt"] = Hostile(target)
    torch.save(checkpoint, bad, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ModelError, match=r"bad\.pt: not a torch checkpoint of tensors and plain containers"):
        convert_readout(bad, out)
    bad.write_bytes(pickle.dumps(Hostile(target)))
    with pytest.raises(ModelError, match="not a torch checkpoint"):
        convert_readout(bad, out)
    assert not target.exists()
    assert not out.exists()
    pickle.loads(bad.read_bytes())
    assert target.exists()  # the file was dangerous indeed


def network(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(checkpoint: dict[str, Any]) -> None:
        change(checkpoint["aggregation_network"])

    return apply


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing": (
        network(lambda t: t.pop("bottleneck_layers.3.conv2.norm.bias")),
        r"missing bottleneck_layers\.3\.conv2\.norm\.bias",
    ),
    "unknown": (network(lambda t: t.update(extra=torch.ones(1))), "unexpected extra"),
    "spatial": (
        network(lambda t: t.update({"output_head.0.weight": torch.ones(1)})),
        r"spatial readout head .*expected an appearance head",
    ),
    "timesteps": (network(lambda t: t.update(mixing_weights=torch.ones(24))), "24 entries for 12 layers"),
    "a shape": (
        network(lambda t: t.update({"bottleneck_layers.1.conv3.weight": torch.ones(128, 31, 1, 1)})),
        r"conv3\.weight is \[128, 31, 1, 1\], expected \[128, 32, 1, 1\]",
    ),
    "both layouts": (
        network(lambda t: t.update({"bottleneck_layers.0.0.conv1.weight": torch.ones(1)})),
        r"holds bottleneck_layers\.0\.conv1\.weight twice",
    ),
    "no head": (network(lambda t: t.clear()), "this is no readout head"),
    "not finite": (
        network(lambda t: t["mixing_weights"].fill_(torch.nan)),
        "mixing_weights holds .*not finite",
    ),
    "no tensors": (lambda c: c.pop("aggregation_network"), "expected the dicts 'aggregation_network'"),
    "no tensor": (network(lambda t: t.update(mixing_weights=3)), "are not tensors"),
    "config": (lambda c: c["config"].update(projection_dim=384), "config says projection_dim = 384.*say 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_are_read_strictly(checkpoint: dict[str, Any], tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "in.pt")
    with pytest.raises(ModelError, match=message):
        convert_readout(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_paths(golden: Path, tmp_path: Path) -> None:
    source = golden / "tiny-readout-appearance.pt"
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        convert_readout(source, tmp_path / "out.pt")
    with pytest.raises(InputError, match="no folder"):
        convert_readout(source, tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(ModelError, match="not found"):
        convert_readout(tmp_path / "nothing.pt", tmp_path / "out.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ModelError, match="not a torch checkpoint"):
        convert_readout(tmp_path / "text.pt", tmp_path / "out.safetensors")
    with pytest.raises(ModelError, match=r"convert-readout tiny-readout-appearance\.pt"):
        load_readout(source, DIMS, 64)
    with pytest.raises(ModelError, match=r"HEAD\.PT: a pickle.*convert-readout"):
        load_readout(tmp_path / "HEAD.PT", DIMS, 64)


def test_a_head_for_another_unet_is_refused_naming_both(golden: Path, tmp_path: Path) -> None:
    head = golden / "tiny-readout-appearance.safetensors"
    with pytest.raises(ModelError, match=r"\[48, .*16\], the UNet's are \[320, 320\]"):
        load_readout(head, (320, 320), 64)
    with pytest.raises(ModelError, match="time embedding of 64, the UNet's has 1280"):
        load_readout(head, DIMS, 1280)
    save_file(load_file(head), tmp_path / "head.safetensors", {"config": "{"})
    with pytest.raises(ModelError, match="metadata is not JSON"):
        load_readout(tmp_path / "head.safetensors", DIMS, 64)
    save_file(load_file(head), tmp_path / "head.safetensors", {"config": '{"groups": 7}'})
    with pytest.raises(ModelError, match="groups=7"):
        load_readout(tmp_path / "head.safetensors", DIMS, 64)
