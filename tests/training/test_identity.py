"""Fitting an identity: it learns the picture, repeats itself, stops when told and touches nothing of the model's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine import BackendUnavailable, Cancelled, Engine, InputError, LoRA, ModelError
from ddengine.image import to_tensor
from ddengine.models.load import Model, load_model
from ddengine.scenes.scene import true_drag
from ddengine.training import identity
from ddengine.training.augment import augmented
from ddengine.training.diffusion import noised

PICTURE = true_drag(np.random.default_rng(4)).scene.render(128)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load()


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.unet.state_dict().items()}


@torch.no_grad()
def error(model: Model, picture: Image.Image) -> float:
    """Mean square error of the noise prediction on the picture, at times and noise that no fit has seen."""
    generator = torch.Generator().manual_seed(99)
    clean = model.vae.encode(to_tensor(picture)).latent_dist.mean * model.vae.config.scaling_factor
    noise = torch.randn(32, *clean.shape[1:], generator=generator)
    times = torch.arange(20, 820, 25)
    z = noised(clean.expand(32, -1, -1, -1), noise, times, model.schedule)
    return float((model.unet(z, times, model.empty_context.expand(32, -1, -1)).sample - noise).square().mean())


def test_it_learns_the_picture_and_leaves_the_model_alone(engine):
    before, unfitted, told = weights_of(engine.model), error(engine.model, PICTURE), []
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.inference_mode():  # whatever the caller's mode
        lora = engine.fit_identity(PICTURE, steps=40, progress=lambda at: told.append((at.stage, at.step, at.total)))
    assert torch.equal(torch.rand(3), expected)
    assert error(lora.fused(engine.model), PICTURE) < 0.93 * unfitted
    assert told == [("identity", step, 40) for step in range(1, 41)]
    assert len(lora.losses) == 40 and np.isfinite(lora.losses).all()
    assert (lora.rank, lora.base, len(lora.weights)) == (16, engine.model.digest, 160)
    assert all(
        name.partition(".")[0] == "unet" and value.dtype == torch.float32 for name, value in lora.weights.items()
    )
    after = weights_of(engine.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in engine.model.unet.parameters())


def test_equal_seeds_give_equal_identities_and_files(engine, tmp_path):
    first, second, other = (engine.fit_identity(PICTURE, 2, 4, seed=seed) for seed in (7, 7, 8))
    assert first.digest == second.digest != other.digest
    assert first.losses == second.losses
    assert LoRA.load(first.save(tmp_path / "identity.safetensors")).digest == first.digest


@pytest.mark.parametrize("at_step", [1, 3])
def test_cancel_leaves_nothing(engine, tmp_path, at_step, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, seen = weights_of(engine.model), []

    def progress(at):
        seen.append(at.step)
        if at.step == at_step:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        engine.fit_identity(PICTURE, 5, 4, progress=progress)
    assert seen == list(range(1, at_step + 1))
    after = weights_of(engine.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.iterdir())


def test_refusals_come_first(engine, monkeypatch):
    for name, value in (("steps", 0), ("steps", 10_001), ("rank", 257), ("rank", 1.0), ("rank", True)):
        with pytest.raises(InputError, match=rf"{name} is {value}.*from 1 to"):
            engine.fit_identity("no such picture", **{name: value})
    with pytest.raises(InputError, match="seed"):
        engine.fit_identity(PICTURE, seed=-1)
    with pytest.raises(ModelError, match="text encoder"):
        engine.fit_identity(PICTURE, 1, prompt="a cat")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendUnavailable, match=r'PEFT.*pip install "ddengine\[identity\]"'):
        engine.fit_identity("no such picture")


def tiny_losses(folder: Path, dtype: str) -> np.ndarray:
    model = load_model(folder, device="cpu", dtype=dtype)
    lora = identity.fit(model, PICTURE.resize((200, 150)), steps=4, rank=4)
    assert all(value.abs().max() > 1e-4 for value in lora.weights.values())  # every layer has had its updates
    return np.array(lora.losses)


def test_half_precision_models_learn_in_float32(sd15):
    wanted = tiny_losses(sd15, "float32")
    for dtype in ("bfloat16", "float16"):
        assert tiny_losses(sd15, dtype) == pytest.approx(wanted, rel=0.02), dtype


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_the_next_fit_has_it_already(engine, monkeypatch):
    """Captured, forward and backward, without a break; what code is made of it then is torch's affair."""
    graphs, compiled = [], torch.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, **given: compiled(f, backend=counted, fullgraph=True, **given))
    eager = engine.fit_identity(PICTURE, 2, 4)
    assert engine.fit_identity(PICTURE, 2, 4, compile=False).digest == eager.digest and not graphs
    for _ in range(2):
        assert engine.fit_identity(PICTURE, 2, 4, compile=True).losses == pytest.approx(eager.losses, rel=1e-5)
        assert len(graphs) == 1


def test_variations_are_of_the_picture():
    """Every variation is the picture or its mirror but for a little colour and, in one of five, a grey box."""
    plain = to_tensor(PICTURE)
    boxes, mirrored, distances = 0, 0, []
    for seed in range(60):
        found = augmented(PICTURE, 128, np.random.default_rng(seed))
        assert found.shape == (1, 3, 128, 128) and found.abs().max() <= 1
        grey = (found == 0).all(1)[0]
        kept = ~grey
        either = [(found - side)[0][:, kept].abs().mean().item() for side in (plain, plain.flip(3))]
        distances.append(min(either))
        mirrored += either[1] < either[0]
        if grey.any():
            boxes += 1
            rows, columns = grey.any(1).nonzero(), grey.any(0).nonzero()
            box = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.all() and 0.015 < box.numel() / 128**2 < 0.11
    assert 0.01 < np.mean(distances) < max(distances) < 0.15
    assert 18 <= mirrored <= 42 and 4 <= boxes <= 22


def test_variations_of_a_long_picture_are_crops_of_its_whole_length():
    ramp = np.zeros((64, 256, 3), np.uint8)
    ramp[..., 1] = np.arange(256)
    starts = {
        int(augmented(Image.fromarray(ramp), 64, np.random.default_rng(seed))[0, 1].mean() * 8) for seed in range(40)
    }
    assert len(starts) > 6  # from the dark end to the bright
