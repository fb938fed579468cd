"""Edits with an identity: its own weights for them alone, sources that remember it, strangers refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import ddengine
from ddengine import DirectDragConfig, Engine, InputError, LoRA, ModelError
from ddengine import engine as module
from ddengine.models.identity import LAYERS
from ddengine.scenes.scene import true_drag

QUICK = DirectDragConfig.preset(
    "default", n_inference_step=6, drag_end_step=1, track_per_step=2, max_drag_per_track=1, reach=0
)
DRAG = true_drag(np.random.default_rng(4))
PICTURE = DRAG.scene.render(128)
ARROW = tuple((x * 128, y * 128) for x, y in (DRAG.handle, DRAG.target))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load()


@pytest.fixture(scope="module")
def identities(engine) -> list[LoRA]:
    """Two that change every layer a good deal; no fit, so that these tests need no PEFT."""
    return [made(engine, seed) for seed in (1, 2)]


def made(engine: Engine, seed: int) -> LoRA:
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, layer in engine.model.unet.named_modules():
        if name.endswith(LAYERS):
            out, fan_in = layer.weight.shape
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, fan_in, generator=generator) / fan_in**0.5
            weights[f"unet.{name}.lora_B.weight"] = 0.05 * torch.randn(out, 2, generator=generator)
    return LoRA(weights, 2, engine.model.digest)


def pixels(result) -> bytes:
    return result.image.tobytes()


def test_an_edit_with_an_identity_uses_it_and_leaves_the_engine_as_it_was(engine, identities):
    plain = engine.edit(PICTURE, [ARROW], config=QUICK)
    weights = {name: value.clone() for name, value in engine.model.unet.state_dict().items()}
    first, second = (engine.edit(PICTURE, [ARROW], config=QUICK, identity=lora) for lora in identities)
    assert len({pixels(plain), pixels(first), pixels(second)}) == 3
    assert "an identity of rank 2 is fused into 80 layers" in first.notes and plain.notes == engine.model.notes
    again = engine.edit(PICTURE, [ARROW], config=QUICK)
    assert pixels(again) == pixels(plain) and again.notes == plain.notes
    assert pixels(engine.edit(PICTURE, [ARROW], config=QUICK, identity=identities[0])) == pixels(first)
    assert pixels(engine.edit(PICTURE, [ARROW], config=QUICK, identity=identities[0].scaled(0))) == pixels(plain)
    after = engine.model.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_an_edit_with_an_identity_is_that_of_a_model_loaded_with_it(engine, identities, tmp_path):
    file = identities[0].save(tmp_path / "identity.safetensors")
    loaded = Engine.load(lora=file).edit(PICTURE, [ARROW], config=QUICK)
    for lora in (identities[0], LoRA.load(file)):
        assert pixels(engine.edit(PICTURE, [ARROW], config=QUICK, identity=lora)) == pixels(loaded)


def test_a_source_is_edited_with_the_identity_it_was_prepared_with(engine, identities):
    wanted = [pixels(engine.edit(PICTURE, [ARROW], config=QUICK, identity=lora)) for lora in (*identities, None)]
    sources = [engine.prepare(PICTURE, config=QUICK, identity=lora) for lora in (*identities, None)]
    assert [source.model for source in sources] == [*(lora.model_digest for lora in identities), engine.model.digest]
    assert [pixels(engine.edit(source, [ARROW], config=QUICK)) for source in sources] == wanted
    named = engine.edit(sources[0], [ARROW], config=QUICK, identity=replace(identities[0]))
    assert pixels(named) == wanted[0]
    for source, lora in [(sources[0], identities[1]), (sources[2], identities[0])]:
        with pytest.raises(InputError, match=r"not prepared with this identity .*; prepare it with identity="):
            engine.edit(source, [ARROW], config=QUICK, identity=lora)


def test_another_engine_needs_the_identity_itself(engine, identities):
    source = engine.prepare(PICTURE, config=QUICK, identity=identities[0])
    wanted = pixels(engine.edit(source, [ARROW], config=QUICK))
    other = Engine.load()
    with pytest.raises(InputError, match="pass the identity it was prepared with: identity="):
        other.edit(source, [ARROW], config=QUICK)
    assert pixels(other.edit(source, [ARROW], config=QUICK, identity=identities[0])) == wanted


def test_strangers_are_refused(engine, identities):
    stranger = replace(identities[0], base="0" * 64)
    for call in (
        lambda **k: engine.edit(PICTURE, [ARROW], config=QUICK, **k),
        lambda **k: engine.prepare(PICTURE, **k),
    ):
        with pytest.raises(ModelError, match=r"belongs to model 000000000000.*fit one with this model"):
            call(identity=stranger)
        with pytest.raises(InputError, match=r"identity is a str; pass what fit_identity returned, or LoRA.load"):
            call(identity="identity.safetensors")


def test_one_fused_copy_at_a_time(identities):
    engine = Engine.load()
    engine.prepare(PICTURE, config=QUICK)
    engine.prepare(PICTURE, config=QUICK, identity=identities[0])
    first = weakref.ref(engine._fused.unet)
    engine.prepare(PICTURE, config=QUICK, identity=identities[1])
    gc.collect()
    assert first() is None
    assert set(engine._passes) == {engine.model.digest, identities[1].model_digest}
    for number in range(module.KNOWN_IDENTITIES):
        engine._model_with(identities[0].scaled(0.1 * number))
    assert len(engine._identities) == module.KNOWN_IDENTITIES
    assert identities[1].model_digest not in engine._identities


def test_the_public_name():
    assert ddengine.LoRA is LoRA
