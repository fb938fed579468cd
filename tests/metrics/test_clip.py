"""CLIP similarity through a tiny stand-in of the same architecture: OpenAI's preprocessing, cosine, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from ddengine.errors import ModelError
from ddengine.metrics.clip import Clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8, "projection_dim": 12},
        text_config=text,
        projection_dim=12,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip.load(folder)


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_the_cosine_of_the_whole_models_embeddings(folder: Path, clip: Clip) -> None:
    one, other = noise(50, 40, 0), noise(50, 40, 1)
    whole = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        both = torch.cat([clip.pixels(one), clip.pixels(other)])
        a, b = whole.visual_projection(whole.vision_model(both).pooler_output).double()
    assert clip.similarity(one, other) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
    assert clip.similarity(one, other) < 0.999
    assert clip.similarity(one, one) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (57, 40), (40, 95), (32, 33)])
def test_openai_preprocessing_written_out(clip: Clip, size: tuple[int, int]) -> None:
    """torchvision's Resize(32, bicubic), CenterCrop(32), ToTensor, Normalize, by their definitions."""
    picture, (width, height) = noise(*size, 2), size
    scaled = (32, int(32 * height / width)) if width <= height else (int(32 * width / height), 32)
    pixels = np.asarray(picture.resize(scaled, Image.BICUBIC)).astype(np.float64) / 255
    top, left = round((scaled[1] - 32) / 2.0), round((scaled[0] - 32) / 2.0)
    pixels = pixels[top : top + 32, left : left + 32]
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    found = clip.pixels(picture)
    assert found.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(found[0].permute(1, 2, 0), pixels, atol=1e-5)


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Clip.load(folder)
    assert capfd.readouterr() == ("", "")


def test_a_stand_in_is_called_one(clip: Clip) -> None:
    assert len(clip.notes) == 1 and "is not ViT-B/32 (hidden_size 16, " in clip.notes[0]


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        Clip.load(tmp_path)
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(ModelError, match=r"model\.safetensors: not found"):
        Clip.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: these weights are a pickle"):
        Clip.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be loaded as CLIP"):
        Clip.load(tmp_path)


def test_a_text_encoder_is_refused(tmp_path: Path) -> None:
    text = CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    CLIPTextModel(text).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        Clip.load(tmp_path)
