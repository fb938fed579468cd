"""LPIPS: the formula in float64, the lpips package's own value, and files that are missing or of another network."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ddengine.errors import InputError, ModelError
from ddengine.metrics.lpips import FEATURES, HEADS, Lpips

SHAPES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def waves(*shape: int, seed: float) -> Tensor:
    """Numbers that look random, from arithmetic alone: the same for every version of every library."""
    count = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return ((torch.sin(count * 12.9898 + seed) * 43758.5453).frac()).reshape(shape)


@cache
def weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stand-ins for both files: torchvision's names and lpips' names."""
    body, heads = {}, {}
    for k, (index, (out, into, size)) in enumerate(SHAPES.items()):
        scale = (into * size * size) ** -0.5
        body[f"features.{index}.weight"] = (2 * scale * waves(out, into, size, size, seed=k)).float()
        body[f"features.{index}.bias"] = (0.1 * waves(out, seed=10 + k)).float()
        heads[f"lin{k}.model.1.weight"] = waves(1, out, 1, 1, seed=20 + k).abs().float()
    return body, heads


def pictures(size: int = 64) -> tuple[Tensor, Tensor]:
    a = waves(2, 3, size, size, seed=0.5).float()
    return a, (0.7 * a + 0.3 * waves(2, 3, size, size, seed=0.7).float())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    body, heads = weights()
    # The classifier that torchvision's file also holds is not read.
    save_file({**body, "classifier.1.weight": torch.zeros(2, 2)}, folder / FEATURES)
    save_file(heads, folder / HEADS)
    return folder


@pytest.fixture(scope="module")
def lpips(folder: Path) -> Lpips:
    return Lpips.load(folder)


def formula(a: Tensor, b: Tensor) -> Tensor:
    """The paper's formula written out once more, in float64, layer by layer in torchvision's order."""
    body, heads = weights()
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).reshape(1, 3, 1, 1)
    x, total = (torch.cat([a, b]).double() - shift) / scale, 0
    for k, index in enumerate(SHAPES):
        if index in (3, 6):
            x = F.max_pool2d(x, kernel_size=3, stride=2)
        stride, padding = {0: (4, 2), 3: (1, 2)}.get(index, (1, 1))
        weight, bias = body[f"features.{index}.weight"].double(), body[f"features.{index}.bias"].double()
        x = F.conv2d(x, weight, bias, stride=stride, padding=padding).clamp_min(0)
        one, other = (y / (y.norm(dim=1, keepdim=True) + 1e-10) for y in x.chunk(2))
        total = total + F.conv2d((one - other) ** 2, heads[f"lin{k}.model.1.weight"].double()).mean((1, 2, 3))
    return total


def test_the_formula(lpips: Lpips) -> None:
    a, b = (each[:, :, :64] for each in pictures(71))
    expected = formula(a, b)
    torch.testing.assert_close(lpips.distance(a, b).double(), expected, rtol=1e-5, atol=0)
    assert (expected > 0.01).all() and expected[0] != expected[1]
    assert torch.equal(lpips.distance(a, a), torch.zeros(2))
    torch.testing.assert_close(lpips.distance(b, a), lpips.distance(a, b))


def test_the_value_of_the_lpips_package(lpips: Lpips) -> None:
    """What version 0.1.4 of the package computed, in float64, with these weights for these pictures."""
    expected = torch.tensor([0.09271250105482612, 0.12763384808630546], dtype=torch.float64)
    torch.testing.assert_close(lpips.distance(*pictures()).double(), expected, rtol=1e-5, atol=0)


def test_the_lpips_package_itself(lpips: Lpips) -> None:
    try:
        import lpips as package
    except Exception as error:  # it needs torchvision, which fails in many ways beside another build of torch
        pytest.skip(f"the lpips package does not import here: {error}")
    theirs = package.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    fill(theirs)
    a, b = pictures()
    torch.testing.assert_close(lpips.distance(a, b), theirs(a, b).detach().flatten(), rtol=1e-5, atol=0)


def fill(theirs: Any) -> None:
    """Give the package's network our weights, by its names: net.sliceK.N.weight."""
    body, heads = weights()
    own = theirs.state_dict()
    for name in own:
        index = name.split(".")[-2]
        if name.startswith("net.slice"):
            own[name] = body[f"features.{index}.{name.rpartition('.')[2]}"]
        elif name.split(".")[0][:3] == "lin" and name.split(".")[0] != "lins":
            own[name] = heads[name]
        elif name.startswith("lins."):
            own[name] = heads[f"lin{name.split('.')[1]}.model.1.weight"]
    theirs.load_state_dict(own)


def test_fidelity_is_taken_at_224(lpips: Lpips) -> None:
    one, other = (Image.effect_noise((300, 170), sigma).convert("RGB") for sigma in (20, 90))
    small = [
        F.interpolate(
            torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].float() / 127.5 - 1,
            (224, 224),
            mode="bilinear",
            align_corners=False,
        )
        for each in (one, other)
    ]
    assert lpips.fidelity(one, other) == pytest.approx(1 - float(formula(*small)), abs=1e-5)
    assert lpips.fidelity(one, one) == 1.0


def test_torchvision_is_never_imported(lpips: Lpips) -> None:
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("name", [FEATURES, HEADS])
def test_a_missing_file_is_named_with_its_remedy(folder: Path, tmp_path: Path, name: str) -> None:
    for other in {FEATURES, HEADS} - {name}:
        (tmp_path / other).symlink_to(folder / other)
    with pytest.raises(ModelError, match=rf"{name}: not found; make it once from .*\.pth.*weights_only=True"):
        Lpips.load(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    body, heads = weights()
    save_file(body, tmp_path / FEATURES)
    save_file({**heads, "lin0.model.1.weight": torch.zeros(1, 7, 1, 1)}, tmp_path / HEADS)
    with pytest.raises(ModelError, match="do not fit"):
        Lpips.load(tmp_path)
    save_file({**body, "features.12.weight": torch.zeros(1)}, tmp_path / FEATURES)
    with pytest.raises(ModelError, match=r"unexpected features\.12"):
        Lpips.load(tmp_path)


def test_pictures_that_cannot_be_compared_are_refused(lpips: Lpips) -> None:
    a, b = pictures()
    for one, other in ((a, b[:1]), (a[:, :1], b[:, :1]), (a[..., :40], b[..., :40])):
        with pytest.raises(InputError, match="cannot be compared"):
            lpips.distance(one, other)
