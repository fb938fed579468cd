"""Loading: what is read, what is refused in which words, and that nothing but safetensors is opened."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ddengine.errors import InputError, ModelError
from ddengine.models import cache, embedded, hub, text
from ddengine.models.load import Model, load_model
from ddengine.models.readout import ReadoutHead
from ddengine.models.readout_io import save_readout, tap_dims
from ddengine.models.text import TextEncoder, embedding_bytes
from ddengine.models.unet import unet_forward


def load(folder: Path | str, **options: Any) -> Model:
    return load_model(folder, **{"device": "cpu", "dtype": "float32", **options})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def test_a_stable_diffusion_folder_loads_as_diffusers_itself_loads_it(sd15: Path) -> None:
    model = load(sd15)
    reference = UNet2DConditionModel.from_pretrained(sd15 / "unet").eval()
    latent = torch.randn(1, 4, 9, 13, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = reference(latent, 621, model.empty_context).sample
        found = unet_forward(model.unet, latent, 621, model.empty_context).noise
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    vae = AutoencoderKL.from_pretrained(sd15 / "vae")
    torch.testing.assert_close(model.vae.state_dict(), vae.state_dict(), rtol=0, atol=0)
    assert model.size == 128
    assert model.empty_context.shape == (1, 77, 12)
    assert model.text is not None
    assert model.readout is None
    assert any("readout" in note for note in model.notes)
    assert model.schedule.alphas_cumprod[741].item() == pytest.approx(0.060356, abs=1e-6)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_weights_are_frozen_and_in_eval_mode(sd15: Path) -> None:
    model = load(sd15)
    for module in (model.unet, model.vae):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(value.is_meta for value in module.state_dict().values())


def test_attention_names_of_early_diffusers_are_understood(sd15: Path) -> None:
    wanted = load(sd15).vae.state_dict()
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(sd15 / VAE)
    names = {name: re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: early[m[0]], name) for name in tensors}
    renamed = {names[name]: value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, sd15 / VAE)
    torch.testing.assert_close(load(sd15).vae.state_dict(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_leaves_a_bfloat16_autoencoder_in_float32(sd15: Path, dtype: str) -> None:
    model = load(sd15, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert model.dtype == wanted
    assert {p.dtype for p in model.unet.parameters()} == {wanted}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32 if dtype == "bfloat16" else wanted}


def test_fp16_variant_files_are_read_where_they_are_all_there_is(sd15: Path) -> None:
    wanted = load(sd15).unet.conv_in.weight
    for name in (UNET, VAE, "text_encoder/model.safetensors"):
        tensors = load_file(sd15 / name)
        (sd15 / name).unlink()
        half = (sd15 / name).with_suffix(".fp16.safetensors")
        save_file({key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}, half)
    model = load(sd15)
    torch.testing.assert_close(model.unet.conv_in.weight, wanted.half().float(), rtol=0, atol=0)
    assert model.empty_context.dtype == torch.float32


def test_the_digest_follows_the_weights_and_not_the_place(sd15: Path, tmp_path: Path) -> None:
    digest = load(sd15).digest
    moved = Path(shutil.copytree(sd15, tmp_path / "elsewhere"))
    assert load(moved).digest == digest == load(moved, dtype="float16").digest
    tensors = load_file(moved / UNET)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, moved / UNET)
    changed = load(moved).digest
    assert changed != digest
    shutil.copytree(moved / "vae", tmp_path / "vae")
    edit_json(tmp_path / "vae" / "config.json", scaling_factor=0.2)
    other = load(moved, vae=tmp_path / "vae")
    assert other.vae.config.scaling_factor == 0.2
    assert other.digest not in (digest, changed)
    assert any(str(tmp_path / "vae") in note for note in other.notes)
    assert load(moved, vae=moved).digest == changed  # a whole model's folder: its autoencoder is meant


def test_the_empty_prompt_is_encoded_once_and_kept_under_its_weights(
    sd15: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    original = TextEncoder._load
    monkeypatch.setattr(TextEncoder, "_load", lambda self: loads.append(1) or original(self))
    first = load(sd15).empty_context
    torch.testing.assert_close(load(sd15).empty_context, first, rtol=0, atol=0)
    assert len(loads) == 1
    [cached] = own_cache.rglob("*.safetensors")
    cached.write_bytes(b"cut")
    torch.testing.assert_close(load(sd15).empty_context, first, rtol=0, atol=0)
    assert len(loads) == 2
    weights = sd15 / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value * 1.5 for name, value in tensors.items()}, weights, {"format": "pt"})
    assert not torch.allclose(load(sd15).empty_context, first)
    assert len(loads) == 3


def test_digests_of_large_files_are_remembered_until_the_file_changes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    original = cache.sha256_file
    monkeypatch.setattr(cache, "_REMEMBER_ABOVE", 0)
    monkeypatch.setattr(cache, "sha256_file", lambda path: hashed.append(path) or original(path))
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = cache.file_digest(file)
    assert cache.file_digest(file) == first == original(file)
    assert len(hashed) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert cache.file_digest(file) == original(file) != first
    (own_cache / "digests.json").write_text("[broken")
    assert cache.file_digest(file) == original(file)


def test_a_cache_that_cannot_be_written_is_no_error(sd15: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "file" / "cache"))
    assert load(sd15).empty_context.shape == (1, 77, 12)


def test_a_long_prompt_is_cut_and_the_encoder_does_not_stay(sd15: Path, caplog: Any) -> None:
    encoder = load(sd15).text
    assert encoder is not None
    assert encoder.encode("cat " * 100).shape == (1, 77, 12)
    assert "77" in caplog.text
    assert not any(isinstance(value, torch.nn.Module) for value in vars(encoder).values())


@pytest.fixture
def packed(sd15: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the embedded model's layout: with readout head and embedding, without text encoder."""
    model = load(sd15)
    (sd15 / "empty_embedding.safetensors").write_bytes(embedding_bytes(torch.full((1, 2, 12), 0.5)))
    head = ReadoutHead(*tap_dims(model.unet), projection=16, groups=4)
    save_readout(head.half(), sd15 / "readout.safetensors", {"made_by": "test"})
    (sd15 / "model.json").write_text('{"size": 96, "name": "small"}')
    shutil.rmtree(sd15 / "text_encoder")
    shutil.rmtree(sd15 / "tokenizer")
    monkeypatch.setattr(text.TextEncoder, "__init__", lambda *_: pytest.fail("no text encoder may be needed"))
    return sd15


def test_a_folder_in_the_embedded_layout_needs_no_text_encoder(packed: Path) -> None:
    model = load(packed)
    assert model.text is None
    assert model.size == 96
    assert model.readout is not None
    assert next(model.readout.parameters()).dtype == torch.float32
    assert model.notes == ()
    assert torch.equal(model.empty_context, torch.full((1, 2, 12), 0.5))


def test_embedded_is_the_folder_inside_the_package(packed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(embedded.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match="train-embedded"):
        load("embedded")
    shutil.copytree(packed, tmp_path / "embedded_weights")
    model = load("embedded")
    assert (model.name, model.digest) == ("embedded", load(packed).digest)


def rewrite(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return apply


def as_pickle(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename((folder / name).with_suffix(".bin")) and None


def config(part: str, **changes: Any) -> Callable[[Path], None]:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda folder: edit_json(folder / part / name, **changes)


def removed(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


REFUSED = {
    "pickled unet": (as_pickle(UNET), r"unet.*\.bin: .*pickle.*safe_serialization"),
    "pickled vae": (as_pickle(VAE), r"vae.*\.bin: .*pickle"),
    "pickled text": (as_pickle("text_encoder/model.safetensors"), r"text_encoder.*model\.bin: .*pickle"),
    "no unet": (removed("unet"), r"unet.config\.json: not found"),
    "no unet weights": (removed(UNET), r"diffusion_pytorch_model\.safetensors: not found"),
    "no scheduler": (removed("scheduler"), r"scheduler_config\.json: not found"),
    "no text at all": (removed("text_encoder"), r"neither empty_embedding\.safetensors nor text_encoder"),
    "no tokenizer": (removed("tokenizer"), r"tokenizer.vocab\.json: not found"),
    "broken config": (written("unet/config.json", b'{"in_ch'), r"unet.config\.json: cannot be read as JSON"),
    "config no object": (written("vae/config.json", b"[]"), r"vae.config\.json: holds a list"),
    "zero bytes": (written(UNET, b""), r"cannot be read as safetensors"),
    "a pickle renamed": (written(VAE, b"\x80\x02}q\x00." * 99), r"vae.*cannot be read as safetensors"),
    "cut file": (
        lambda f: written(UNET, (f / UNET).read_bytes()[:-100])(f),
        r"unet.*cannot be read as safet",
    ),
    "a tensor missing": (rewrite(UNET, lambda t: t.pop("conv_in.weight")), r"unet.*missing conv_in\.weight"),
    "a tensor more": (rewrite(UNET, lambda t: t.update(x=torch.ones(1))), r"unet.*unexpected x"),
    "a tensor's shape": (
        rewrite(VAE, lambda t: t.update({"quant_conv.bias": torch.ones(3)})),
        r"vae.*quant_conv\.bias is \[3\], expected \[8\]",
    ),
    "SDXL": (
        config("unet", cross_attention_dim=2048),
        r"cross_attention_dim is 2048 \(Stable Diffusion XL\).*1\.5",
    ),
    "SD 2": (config("unet", cross_attention_dim=1024), r"1024 \(Stable Diffusion 2\), expected at most 768"),
    "SDXL blocks": (config("unet", down_block_types=["DownBlock2D"] * 3), r"down_block_types is .*expected"),
    "SDXL embedding": (
        config("unet", addition_embed_type="text_time"),
        r"addition_embed_type is 'text_time'",
    ),
    "inpainting": (config("unet", in_channels=9), r"in_channels is 9, expected 4"),
    "v-prediction": (
        config("scheduler", prediction_type="v_prediction"),
        r"'v_prediction', expected 'epsilon'",
    ),
    "zero terminal": (config("scheduler", rescale_betas_zero_snr=True), r"rescale_betas_zero_snr"),
    "16 latent channels": (config("vae", latent_channels=16), r"latent_channels is 16, expected 4"),
    "small autoencoder": (
        config("vae", _class_name="AutoencoderTiny"),
        r"AutoencoderTiny, expected AutoencoderKL",
    ),
    "4x autoencoder": (config("vae", block_out_channels=[4, 4, 8]), r"reduction 4x\), expected 4 \(8x\)"),
    "other width": (config("unet", cross_attention_dim=16), r"have 12 channels, .*cross_attention_dim is 16"),
    "bad size": (written("model.json", b'{"size": 100}'), r"model\.json: the working size is 100"),
    "other embedding": (
        written("empty_embedding.safetensors", embedding_bytes(torch.ones(1, 3, 5))),
        r"empty_embedding is \[1, 3, 5\], expected \[1, n, 12\]",
    ),
    "no number": (
        written("empty_embedding.safetensors", embedding_bytes(torch.full((1, 3, 12), torch.nan))),
        r"not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_edited_with_is_refused_by_name(sd15: Path, case: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    change, message = REFUSED[case]
    change(sd15)
    with pytest.raises(ModelError, match=message):
        load(sd15)


def test_files_and_names_that_are_no_folder(sd15: Path, tmp_path: Path) -> None:
    for name, message in (
        (sd15 / UNET, "single file, expected a folder.*from_single_file"),
        (tmp_path / "nothing", "no such folder, and not a hub id"),
        ("", "no such folder"),
        ("a/b/c", "not a hub id"),
    ):
        with pytest.raises(ModelError, match=message):
            load(name)
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"model\.ckpt: a pickle"):
        load(tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=r"r\.safetensors: no such readout head"):
        load(sd15, readout=tmp_path / "r.safetensors")
    with pytest.raises(ModelError, match=r"vae '.*nothing': no such folder"):
        load(sd15, vae=str(tmp_path / "nothing"))


def test_unknown_devices_and_dtypes(sd15: Path) -> None:
    for options, message in (
        ({"dtype": "float64"}, "float32, float16, bfloat16"),
        ({"dtype": torch.int8}, "torch.int8"),
        ({"device": "gpu"}, "'auto', 'cpu', 'cuda'"),
        ({"device": "cuda:99"}, "CUDA devices are visible"),
        ({"device": "meta"}, "not supported"),
    ):
        with pytest.raises(InputError, match=message):
            load(sd15, **options)


def test_a_hub_id_brings_safetensors_alone(sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot(repo_id: str, patterns: list[str]) -> str:
        assert repo_id == "someone/model-1.5"
        asked.append(patterns)
        return str(sd15)

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    assert load("someone/model-1.5").name == "someone/model-1.5"
    assert len(asked) == 1
    assert UNET in asked[0]
    assert all(pattern.endswith((".json", ".txt", ".safetensors")) for pattern in asked[0])
    (sd15 / UNET).rename(sd15 / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert load("someone/model-1.5").dtype == torch.float32
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked[-1]


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo_id: str, patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nlong story")

    monkeypatch.setattr(hub, "_snapshot", snapshot)
    with pytest.raises(ModelError, match=r"someone/model.*\(no route to host\).*embedded") as caught:
        load("someone/model")
    assert "long story" not in str(caught.value)


def test_the_golden_folder_with_its_readout_head(golden: Path, tiny_sd: Path) -> None:
    plain = load(tiny_sd)
    model = load(tiny_sd, readout=golden / "tiny-readout-appearance.safetensors")
    assert model.size == 256
    assert model.readout is not None
    assert model.notes == ()
    assert model.digest != plain.digest
