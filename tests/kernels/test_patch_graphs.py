"""Compilers and function transforms take the operators on patches whole: no graph break, the same gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ddengine.kernels import dispatch
from ddengine.kernels.drag_loss import drag_loss
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.track import track

OPERATORS = {f"ddengine.{name}.default" for name in ("drag_loss", "sample_patches", "sample_patches_backward", "track")}
SIZE = (12, 8)


@pytest.fixture
def steps(
    kernels: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Something like a drag step, two ways: the gradient of a loss of two features, and the handles found in one."""
    interpreted = dispatch.interpreted()  # reads the environment through what a compiler cannot follow
    monkeypatch.setattr(dispatch, "interpreted", lambda: interpreted)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    reference, template = drawn(2, 1, 3, 3, 3), drawn(2, 1, 3)
    moving = torch.tensor([[True], [False]], device=device)

    def loss(latent: Tensor, handles: Tensor) -> tuple[Tensor, Tensor]:
        feature = latent.sin()
        patches = sample_patches(latent.cos(), handles, 1, SIZE, border="zero", kernels=kernels)
        drag = drag_loss(feature, handles + 0.3, reference, moving, 9.0, 1, SIZE, kernels=kernels)
        return drag.sum() + patches.square().sum(), feature

    def by_autograd(latent: Tensor, handles: Tensor) -> tuple[Tensor, Tensor]:
        latent = latent.detach().requires_grad_()
        value, feature = loss(latent, handles)
        (gradient,) = torch.autograd.grad(value, latent)
        return gradient, track(feature.detach(), template, handles, 2, SIZE, valid=moving, kernels=kernels)

    def by_transform(latent: Tensor, handles: Tensor) -> tuple[Tensor, Tensor]:
        gradient, (_, feature) = torch.func.grad_and_value(loss, has_aux=True)(latent, handles)
        return gradient, track(feature, template, handles, 2, SIZE, valid=moving, kernels=kernels)

    return {"autograd": by_autograd, "transform": by_transform}


@pytest.mark.parametrize("way", ["autograd", "transform"])
def test_one_graph_and_the_same_gradient(steps, kernels: str, device: str, way: str) -> None:
    latent = torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(1)).to(device)
    handles = torch.tensor([[[3.2, 4.1]], [[-0.4, 7.9]]], device=device)
    gradient, found = steps["autograd"](latent, handles)
    graph = make_fx(steps[way])(latent, handles)
    targets = {str(node.target) for node in graph.graph.nodes if str(node.target).startswith("ddengine")}
    assert targets == (OPERATORS if kernels == "triton" else set())
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(steps[way], fullgraph=True, backend="aot_eager")
        answers = [steps[way](latent, handles), graph(latent, handles), compiled(latent, handles)]
    torch._dynamo.reset()
    for other_gradient, other_found in answers:
        assert torch.allclose(other_gradient, gradient, rtol=1e-5, atol=1e-6)
        assert torch.equal(other_found, found)
