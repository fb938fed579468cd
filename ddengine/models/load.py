"""Load a model to edit with: UNet, autoencoder, schedule, empty-prompt embedding and readout head."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.drags import VAE_REDUCTION
from ddengine.errors import InputError, ModelError
from ddengine.models.cache import combined_digest, file_digest
from ddengine.models.embedded import embedded_folder
from ddengine.models.family import check_scheduler, check_unet, check_vae
from ddengine.models.files import find_weights, load_weights, read_json
from ddengine.models.hub import local_folder
from ddengine.models.lora import find_lora, fuse_lora
from ddengine.models.place import resolve_device, resolve_dtype
from ddengine.models.readout_io import load_readout, tap_dims
from ddengine.models.text import EMPTY_EMBEDDING, TextEncoder, read_embedding
from ddengine.schedule import Schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddengine.models.readout import ReadoutHead

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"
READOUT = "readout.safetensors"


@dataclass(frozen=True)
class Model:
    """Everything of a model that an edit reads; weights are frozen, in eval mode, on one device.

    `unet` and `readout` hold `dtype`; `vae` holds it too, except that bfloat16 (8 bits of mantissa, visible
    banding) leaves it in float32. `empty_context`: embedding of the empty prompt [1, n, D]. `text`: None
    where the folder has no text encoder; it loads nothing before a prompt asks for it. `size`: working long
    side in pixels. `digest`: sha256 over the weight files and configs that were read, the same wherever
    they lie. `notes`: what a user should know about this model, in sentences.
    """

    name: str
    unet: Any
    vae: Any
    schedule: Schedule
    empty_context: Tensor
    readout: ReadoutHead | None
    text: TextEncoder | None
    size: int
    digest: str
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.empty_context.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.empty_context.dtype


def load_model(
    model: str | Path = "embedded",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    readout: str | Path | None = None,
    lora: str | Path | None = None,
    vae: str | Path | None = None,
    size: int | None = None,
) -> Model:
    """Load "embedded", a local folder in diffusers' layout or a hub id of the Stable Diffusion 1.5 family.

    `device`: "auto" is the first CUDA device, else the CPU. `dtype`: "auto" is float16 on CUDA and float32
    elsewhere. `readout`: a readout head in our safetensors format; None takes the folder's
    `readout.safetensors` if it has one. `lora`: file or folder, fused into the UNet. `vae`: folder or hub id
    of an autoencoder to use instead of the model's. Only .safetensors files are read. A folder may also hold
    `empty_embedding.safetensors` (then no text encoder is needed) and `model.json` with `{"size": pixels}`.
    `size`: another working long side, a multiple of 8 from 64 to 4096.

    Errors: `InputError` for an unknown device or dtype; `ModelError` for everything wrong with files, each
    naming the file, what was expected and the remedy.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    on = resolve_device(device)
    compute = resolve_dtype(dtype, on)
    # Everything small is read and checked first: a wrong model is refused before gigabytes are read.
    files = _find(model, readout, lora, vae, prefer_fp16=compute == torch.float16)
    schedule = Schedule.from_config(files.scheduler_config)
    size = _working_size(files.folder, files.unet_config, size)
    text = TextEncoder(files.folder) if (files.folder / "text_encoder" / "config.json").is_file() else None
    context, context_digest = _empty_context(files, text)

    unet = load_weights(UNet2DConditionModel, files.unet_config, files.unet, on, compute)
    notes = []
    if files.lora is not None:
        notes.append(f"LoRA {files.lora.name} is fused into {fuse_lora(unet, files.lora)} layers")
    vae_dtype = torch.float32 if compute == torch.bfloat16 else compute
    autoencoder = load_weights(AutoencoderKL, files.vae_config, files.vae, on, vae_dtype)
    if vae is not None:
        notes.append(f"the autoencoder is {vae}")
    head = None
    if files.readout is not None:
        head = load_readout(files.readout, *tap_dims(unet)).to(device=on, dtype=compute)
    else:
        notes.append("the model has no readout head: the readout term is off")
    digest = combined_digest([*files.digests(), ("context", context_digest)])
    log.info("loaded %s on %s in %s, working size %d, digest %.12s", model, on, compute, size, digest)
    return Model(
        name=str(model),
        unet=unet,
        vae=autoencoder,
        schedule=schedule,
        empty_context=context.to(device=on, dtype=compute),
        readout=head,
        text=text,
        size=size,
        digest=digest,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Files:
    """Which files a model is made of; their configs are read and of the right family."""

    folder: Path
    vae_folder: Path
    unet_config: dict[str, Any]
    vae_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    unet: Path
    vae: Path
    lora: Path | None
    readout: Path | None

    def digests(self) -> list[tuple[str, str]]:
        """(role, sha256) of every file."""
        named = {
            "unet/config": self.folder / "unet" / "config.json",
            "vae/config": self.vae_folder / "config.json",
            "scheduler": self.folder / "scheduler" / "scheduler_config.json",
            "unet": self.unet,
            "vae": self.vae,
            "lora": self.lora,
            "readout": self.readout,
        }
        return [(role, file_digest(path)) for role, path in named.items() if path is not None]


def _find(
    model: str | Path,
    readout: str | Path | None,
    lora: str | Path | None,
    vae: str | Path | None,
    *,
    prefer_fp16: bool,
) -> _Files:
    stems = (f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model")
    folder = embedded_folder() if str(model) == "embedded" else local_folder(model, stems, prefer_fp16=prefer_fp16)
    unet_config = read_json(folder / "unet" / "config.json")
    check_unet(folder / "unet" / "config.json", unet_config)
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    check_scheduler(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    vae_folder = folder / "vae"
    if vae is not None:
        vae_folder = local_folder(vae, (WEIGHTS,), "vae", prefer_fp16=prefer_fp16)
        if (vae_folder / "vae" / "config.json").is_file():  # a whole model's folder: its autoencoder is meant
            vae_folder = vae_folder / "vae"
    vae_config = read_json(vae_folder / "config.json")
    check_vae(vae_folder / "config.json", vae_config)
    return _Files(
        folder=folder,
        vae_folder=vae_folder,
        unet_config=unet_config,
        vae_config=vae_config,
        scheduler_config=scheduler_config,
        unet=find_weights(folder / "unet", WEIGHTS, prefer_fp16=prefer_fp16),
        vae=find_weights(vae_folder, WEIGHTS, prefer_fp16=prefer_fp16),
        lora=find_lora(lora) if lora is not None else None,
        readout=_find_readout(folder, readout),
    )


def _find_readout(folder: Path, readout: str | Path | None) -> Path | None:
    if readout is None:
        return folder / READOUT if (folder / READOUT).is_file() else None
    path = Path(readout).expanduser()
    if not path.is_file():
        raise ModelError(
            f"{path}: no such readout head; give a .safetensors file, or leave `readout` out to edit without"
        )
    return path


def _empty_context(files: _Files, text: TextEncoder | None) -> tuple[Tensor, str]:
    """The empty prompt's embedding [1, n, D] float32, and the digest of what it came from."""
    path = files.folder / f"{EMPTY_EMBEDDING}.safetensors"
    width = files.unet_config["cross_attention_dim"]
    if text is not None and text.width != width:
        raise ModelError(
            f"{files.folder / 'text_encoder'}: its embeddings have {text.width} channels, the UNet's "
            f"cross_attention_dim is {width}; point to a folder whose parts belong together"
        )
    if path.is_file():
        return read_embedding(path, width), file_digest(path)
    if text is None:
        raise ModelError(
            f"{files.folder}: has neither {path.name} nor text_encoder/config.json, so the empty prompt has "
            f"no embedding; add one of them"
        )
    return text.empty(), text.digest


def _working_size(folder: Path, unet_config: dict[str, Any], asked: int | None) -> int:
    """Working long side in pixels: the one asked for, else `model.json`'s, else what the UNet was trained at."""
    if asked is not None:
        if not isinstance(asked, int) or isinstance(asked, bool) or not 64 <= asked <= 4096 or asked % VAE_REDUCTION:
            raise InputError(f"size {asked!r} is not a multiple of {VAE_REDUCTION} from 64 to 4096; for example 512")
        return asked
    if (folder / "model.json").is_file():
        origin, size = folder / "model.json", read_json(folder / "model.json").get("size")
    else:
        origin, cells = folder / "unet" / "config.json", unet_config.get("sample_size") or 64
        size = cells * VAE_REDUCTION if isinstance(cells, int) else cells
    if not isinstance(size, int) or isinstance(size, bool) or not 64 <= size <= 4096 or size % VAE_REDUCTION:
        raise ModelError(
            f"{origin}: the working size is {size!r}, expected a multiple of {VAE_REDUCTION} from 64 to 4096; "
            f"write one there"
        )
    return size
