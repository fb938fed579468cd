"""Turn the name of a model into a local folder, through the hub's client where it is a hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ddengine.errors import ModelError
from ddengine.models.files import refuse_pickle

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_SMALL = ["*.json", "*/*.json", "tokenizer/*.txt", "empty_embedding.safetensors", "readout.safetensors"]


def local_folder(name: str | Path, weights: Sequence[str], what: str = "model", *, prefer_fp16: bool = False) -> Path:
    """The folder that a local path or a hub id `owner/name` stands for.

    From the hub come the configs and, of each stem in `weights` (such as `unet/diffusion_pytorch_model`), the
    .safetensors file, full precision or fp16. A name that is neither is a `ModelError`.
    """
    path = Path(name).expanduser()
    if str(name).strip() and path.is_dir():
        return path
    if path.is_file():
        refuse_pickle(path)
        raise ModelError(
            f"{path}: a single file, expected a folder in diffusers' layout; convert a single-file "
            f"checkpoint once with diffusers: "
            f"`StableDiffusionPipeline.from_single_file('{path.name}').save_pretrained(NEW_FOLDER)`"
        )
    if isinstance(name, str) and _HUB_ID.match(name):
        return _download(name, weights, what, prefer_fp16)
    raise ModelError(
        f"{what} {str(name)!r}: no such folder, and not a hub id either; give an existing folder in "
        f"diffusers' layout or an id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def _download(repo_id: str, weights: Sequence[str], what: str, prefer_fp16: bool) -> Path:
    suffixes = [".safetensors", ".fp16.safetensors"]
    for suffix in reversed(suffixes) if prefer_fp16 else suffixes:
        try:
            folder = Path(_snapshot(repo_id, _SMALL + [stem + suffix for stem in weights]))
        except Exception as error:  # the client raises its own, its transport's, and plain OS errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{what} {repo_id!r}: no such local folder, and the hub could not give it ({reason}); go "
                f"online once, or download it on another machine and give the folder; model='embedded' needs "
                f"no network"
            ) from error
        if all((folder / (stem + suffix)).is_file() for stem in weights):
            break
    return folder


def _snapshot(repo_id: str, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, allow_patterns=patterns)
