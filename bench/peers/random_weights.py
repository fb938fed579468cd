"""Stable Diffusion 1.5 as a folder of random weights, for peers that read one: speed needs no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def write(folder: Path, channels: Sequence[int] = (320, 640, 1280, 1280), *, seed: int = 0) -> tuple[Path, Path]:
    """Write weights as diffusers saves them, and a readout head of the published shape; (folder, head).

    channels: of the UNet's levels; the autoencoder, the text encoder and the head shrink with fewer. What is complete
    already is kept. The tokenizer knows letters alone.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from ddengine.models.readout import ReadoutHead
    from ddengine.models.readout_io import save_readout, tap_dims

    head = folder / "readout.safetensors"
    if (folder / "model_index.json").is_file():
        return folder, head
    torch.manual_seed(seed)
    full = channels[0] == 320
    width = 768 if full else 32
    unet = UNet2DConditionModel(
        sample_size=64 if full else 16, block_out_channels=tuple(channels), cross_attention_dim=width,
        attention_head_dim=8 if full else 2, norm_num_groups=32 if full else 4,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512) if full else (8, 8, 16, 16), layers_per_block=2,
        norm_num_groups=32 if full else 4, sample_size=512 if full else 128,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    start, end = len(letters), len(letters) + 1
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12 if full else 1,
            num_attention_heads=12 if full else 2, bos_token_id=start, eos_token_id=end, pad_token_id=end,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": words[start], "eos_token": words[end], "unk_token": words[end], "pad_token": words[end]}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    save_readout(ReadoutHead(*tap_dims(unet), projection=384 if full else 128), head)
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.24.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))  # last: what has it is complete
    return folder, head
