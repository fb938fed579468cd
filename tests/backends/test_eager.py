"""The eager passes against the golden numbers, their gradients, their dtypes, and the choice of a backend."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddengine.backends import available_backends, create_passes, select_backend
from ddengine.backends.eager import EagerPasses, prompt_context
from ddengine.backends.passes import Passes
from ddengine.errors import BackendUnavailable, InputError, ModelError
from ddengine.models.load import Model, load_model


@pytest.fixture(scope="module")
def model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    head = golden / "tiny-readout-appearance.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_model(golden / "tiny-sd", device="cpu", dtype="float32", readout=head)


@pytest.fixture(scope="module")
def passes(model: Model) -> EagerPasses:
    return EagerPasses(model)


def unit(golden: Path, name: str) -> dict[str, Tensor]:
    data: Mapping[str, np.ndarray] = np.load(golden / "units" / f"{name}.npz")
    return {key: torch.from_numpy(np.asarray(data[key])) for key in data}


def close(found: Tensor, wanted: Tensor, share: float) -> None:
    """Equal within a share of the largest wanted value."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * float(wanted.abs().max()))


def test_image_and_text_match_the_golden_numbers(model: Model, passes: EagerPasses, golden: Path) -> None:
    data = unit(golden, "vae_text")
    image = data["image_u8"].permute(2, 0, 1)[None] / 127.5 - 1.0
    latent = passes.encode(image)
    torch.testing.assert_close(latent, data["latent"], rtol=0, atol=1e-4)
    decoded = (passes.decode(data["latent"]) / 2 + 0.5).clamp(0, 1)[:, :, 64:192, 64:192]
    torch.testing.assert_close(decoded, data["decoded_01_crop_y64_192_x64_192"], rtol=0, atol=2e-5)
    torch.testing.assert_close(model.empty_context, data["text_emb_empty"], rtol=0, atol=1e-5)
    prompted = prompt_context(model, "the cat and dog")
    torch.testing.assert_close(prompted, data["text_emb_prompt"], rtol=0, atol=1e-5)


def test_the_unet_passes_match_the_golden_numbers(passes: EagerPasses, golden: Path) -> None:
    data = unit(golden, "unet_forward")
    latent, t = data["latent"], int(data["timestep"])
    out = passes.reference(latent, t)
    close(passes.predict(latent, t), data["eps"], 1e-5)
    close(passes.predict(latent, torch.tensor([t])), data["eps"], 1e-5)
    close(out.noise, data["eps"], 1e-5)
    close(out.feature, data["intermediate3"], 1e-5)
    mutual = unit(golden, "masactrl_unet")
    source, target = mutual["latents"].split(1)
    t = int(mutual["timestep"])
    wanted = mutual["eps_mutual"]
    close(passes.denoise(target, t, passes.reference(source, t).kv), wanted[1:], 1e-5)


def test_supervise_differentiates_to_the_latent_alone(passes: EagerPasses, golden: Path) -> None:
    data = unit(golden, "unet_vjp")
    latent = data["latent"].clone().requires_grad_()
    with torch.no_grad():  # the caller's mode does not matter
        out = passes.supervise(latent, int(data["timestep"]), readout_hw=(32, 32))
    [gradient] = torch.autograd.grad(out.feature, latent, data["cot_feature3"], retain_graph=True)
    close(gradient, data["grad_from_feature3"], 2e-5)
    [gradient] = torch.autograd.grad(out.noise, latent, data["cot_eps"], retain_graph=True)
    close(gradient, data["grad_from_eps"], 2e-5)
    out.appearance[0].square().mean().backward()
    assert latent.grad is not None
    assert latent.grad.abs().max() > 0
    modules = (passes.model.unet, passes.model.vae, passes.model.readout)
    assert all(p.grad is None for module in modules if module is not None for p in module.parameters())


def test_the_other_passes_keep_no_graph(passes: EagerPasses) -> None:
    latent = torch.randn(1, 4, 8, 8).requires_grad_()
    out = passes.reference(latent, 1, readout_hw=(8, 8))
    found = [passes.predict(latent, 1), passes.denoise(latent, 1, out.kv), passes.decode(latent)]
    found += [
        passes.encode(torch.zeros(1, 3, 64, 64).requires_grad_()),
        *out.appearance,
        out.feature,
        *(k for k, _ in out.kv),
    ]
    assert not any(value.requires_grad for value in found)


def test_keys_and_values_of_the_conditioning_are_made_once(model: Model) -> None:
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    passes, latent = EagerPasses(model), torch.randn(1, 4, 8, 8)
    assert len(calls) == len(set(calls)) == len(hooks) > 0
    calls.clear()
    out = passes.reference(latent, 1)
    passes.predict(latent, 1)
    passes.denoise(latent, 1, out.kv)
    passes.supervise(latent, 1)
    for hook in hooks:
        hook.remove()
    assert not calls


@pytest.mark.parametrize("size", [(88, 72), (83, 70)])
def test_sizes_are_floored_to_whole_latent_cells(passes: EagerPasses, size: tuple[int, int]) -> None:
    latent = passes.encode(torch.zeros(2, 3, *size))
    h, w = size[0] // 8, size[1] // 8
    assert latent.shape == (2, 4, h, w)
    assert passes.predict(latent, 741).shape == (2, 4, h, w)
    assert passes.decode(latent).shape == (2, 3, 8 * h, 8 * w)


def converted(model: Model, dtype: torch.dtype, vae_dtype: torch.dtype) -> Model:
    """A deep copy in another dtype."""
    unet, vae, readout = (copy.deepcopy(module) for module in (model.unet, model.vae, model.readout))
    assert readout is not None
    return dataclasses.replace(model, unet=unet.to(dtype), vae=vae.to(vae_dtype), readout=readout.to(dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_latents_keep_their_dtype_whatever_the_model_computes_in(
    model: Model, passes: EagerPasses, dtype: torch.dtype, tolerance: float
) -> None:
    vae_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    other = EagerPasses(converted(model, dtype, vae_dtype))
    assert other.dtype == dtype
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    out = other.supervise(latent.requires_grad_(), 621, readout_hw=(16, 16))
    assert out.noise.dtype == torch.float32
    assert out.feature.dtype == dtype
    close(out.noise.detach(), passes.predict(latent, 621), tolerance)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded = other.encode(image)
    assert encoded.dtype == torch.promote_types(vae_dtype, torch.float32)
    close(encoded.float(), passes.encode(image), tolerance)
    assert other.decode(encoded).dtype == encoded.dtype
    assert out.appearance[0].dtype == dtype


def test_a_prompt_conditions_and_needs_a_text_encoder(model: Model, passes: EagerPasses) -> None:
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompted = create_passes("eager", model, "the cat")
    assert (prompted.predict(latent, 621) - passes.predict(latent, 621)).abs().max() > 1e-4
    mute = dataclasses.replace(model, text=None)
    same = create_passes("auto", mute).predict(latent, 621)
    torch.testing.assert_close(same, passes.predict(latent, 621), rtol=0, atol=0)
    with pytest.raises(ModelError, match="has no text encoder, so the prompt 'the cat'"):
        create_passes("eager", mute, "the cat")
    with pytest.raises(ModelError, match=r"\[1, 77, 8\], this model takes \[1, n, 32\]"):
        EagerPasses(model, torch.zeros(1, 77, 8))


def test_without_a_readout_head(model: Model, passes: EagerPasses) -> None:
    assert passes.has_readout
    bare = EagerPasses(dataclasses.replace(model, readout=None))
    assert not bare.has_readout
    assert bare.reference(torch.zeros(1, 4, 8, 8), 1).appearance == ()
    with pytest.raises(ModelError, match=r"no readout head; load one with readout=.*readout_guidance=False"):
        bare.reference(torch.zeros(1, 4, 8, 8), 1, readout_hw=(8, 8))


def test_the_choice_of_a_backend(passes: EagerPasses) -> None:
    offered: Passes = passes
    assert offered.schedule is passes.model.schedule
    names = [backend.name for backend in available_backends()]
    assert names == ["eager", "compile", "onnxruntime", "tensorrt"]
    assert select_backend("eager").name == "eager"
    assert select_backend("auto").name == select_backend().name == "auto"
    for backend in available_backends():
        assert backend.reason
        if not backend.available:
            with pytest.raises(BackendUnavailable, match=f"'{backend.name}' cannot run.*backend='eager'"):
                select_backend(backend.name)
    with pytest.raises(InputError, match="'cuda' is unknown; use one of auto, eager, compile, onnxruntime"):
        select_backend("cuda")


def test_importing_the_backends_package_is_light() -> None:
    code = "import sys, ddengine.backends as b; b.select_backend(); assert 'torch' not in sys.modules"
    result: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
