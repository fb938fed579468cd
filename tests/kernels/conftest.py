"""Both versions of each operator: the reference here, the Triton source in its interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddengine.kernels.dispatch import interpreted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With TRITON_INTERPRET=1 only the Triton cases of this folder: see test_interpreter.py."""
    if not interpreted():
        return
    here = Path(__file__).parent
    other = [
        item
        for item in items
        if here in item.path.parents
        and getattr(getattr(item, "callspec", None), "params", {}).get("kernels") != "triton"
    ]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if item not in other]


@pytest.fixture(scope="session", params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The version under test, for the argument `kernels` of each operator; its tensors go to `device`."""
    if request.param == "triton" and not (interpreted() or torch.cuda.is_available()):
        pytest.skip("Triton kernels run in test_interpreter.py, or on a GPU")
    return request.param


@pytest.fixture(scope="session")
def device(kernels: str) -> str:
    return "cuda" if kernels == "triton" and not interpreted() else "cpu"


def _enlarged_first(feature: Tensor, centres: Tensor, radius: int, size_hw: tuple[int, int], border: str) -> Tensor:
    whole = F.interpolate(feature, size=size_hw, mode="bilinear", align_corners=False)
    pad, side = radius + 40, 2 * radius + 1
    whole = F.pad(whole, (pad,) * 4, **({"mode": "replicate"} if border == "clamp" else {}))
    patches = []
    for centre in centres:
        low = centre.floor()
        (fy, fx), (y, x) = (centre - low).tolist(), (low.long() + pad - radius).tolist()
        patches.append(
            sum(
                wy * wx * whole[0, :, y + dy : y + dy + side, x + dx : x + dx + side]
                for dy, wy in ((0, 1 - fy), (1, fy))
                for dx, wx in ((0, 1 - fx), (1, fx))
            )
        )
    return torch.stack(patches)


@pytest.fixture(scope="session")
def enlarged_first() -> Callable[..., Tensor]:
    """Patches [n,C,P,P] of one map the plain way: the whole enlarged map and four integer-shifted windows a point."""
    return _enlarged_first
