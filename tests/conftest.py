"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

SHARED = Path(os.environ.get("DDENGINE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
GOLDEN, PHOTOGRAPHS = SHARED / "golden", SHARED / "dragbench"

# No deadline: machines that run tests are busy. The same examples each run: a red build can be run again.
settings.register_profile("ddengine", deadline=None, derandomize=True, database=None)
settings.load_profile("ddengine")


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """Folders of real photographs with drags beside the checkout; tests that need them are skipped where absent."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs at {PHOTOGRAPHS}")
    return sorted(path.parent for path in PHOTOGRAPHS.glob("*/*/drag_instruction.json"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden tensors beside the checkout; tests that need it are skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data at {GOLDEN}")
    return GOLDEN


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts with an empty user cache."""
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def fake_tensorrt() -> ModuleType:
    """The module of recording TensorRTs, backends/fake_tensorrt.py: `FakeTensorRT(version)`, `VERSIONS`."""
    path = Path(__file__).parent / "backends" / "fake_tensorrt.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_sd(golden: Path, tmp_path: Path) -> Path:
    """A writable copy of the golden Stable Diffusion folder."""
    folder = tmp_path / "tiny-sd"
    for source in (golden / "tiny-sd").rglob("*"):  # not copytree: the original may be read-only
        if source.is_file():
            target = folder / source.relative_to(golden / "tiny-sd")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return folder


@pytest.fixture(scope="session")
def sd15_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers saves Stable Diffusion 1.5: full topology, random weights, a few channels."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sd15"
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 24, 24),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=2,
        norm_num_groups=2,
        sample_size=128,
    ).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    letters = [letter + end for letter in "act" for end in ("", "</w>")]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters]
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    ids = {token: number for number, token in enumerate(vocabulary)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ids))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    settings = {"bos_token": vocabulary[0], "eos_token": vocabulary[1], "unk_token": vocabulary[1]}
    settings |= {"pad_token": vocabulary[1], "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def sd15(sd15_original: Path, tmp_path: Path) -> Path:
    """A copy of `sd15_original` to change."""
    return Path(shutil.copytree(sd15_original, tmp_path / "sd15"))
