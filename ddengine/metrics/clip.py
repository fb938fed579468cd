"""CLIP similarity: the cosine of two pictures' embeddings under CLIP ViT-B/32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddengine.artifacts import StrPath
from ddengine.errors import ModelError
from ddengine.models.files import find_weights, read_json

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BASE_32 = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}


@dataclass(frozen=True)
class Clip:
    """CLIP's picture half. size: the side of the square it sees. notes: how it differs from the published metric's."""

    model: Any
    size: int
    notes: tuple[str, ...]

    @classmethod
    def load(cls, folder: StrPath, device: torch.device | str = "cpu") -> Clip:
        """Read a local folder in transformers' layout (config.json, model.safetensors), float32.

        Published values came from OpenAI's own loader, which on a GPU computes in half precision. ModelError names what
        is missing, and pickles, which are not read.
        """
        folder = Path(folder).expanduser()
        config = read_json(folder / "config.json")
        find_weights(folder, "model")
        from transformers import CLIPVisionModelWithProjection

        try:
            with _quiet():
                loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
                )
        except Exception as error:  # whatever the library says about a broken folder
            raise ModelError(f"{folder}: cannot be loaded as CLIP ({error}); fetch the folder again") from error
        model, report = loaded
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if wrong or config.get("model_type") not in ("clip", "clip_vision_model"):
            what = f"lacks {wrong[:4]}" if wrong else f"is a {config.get('model_type')!r}"
            raise ModelError(f"{folder}: {what}, expected CLIP ViT-B/32; fetch openai/clip-vit-base-patch32 there")
        vision = model.config
        other = [
            f"{name} {getattr(vision, name)}" for name, value in _BASE_32.items() if getattr(vision, name) != value
        ]
        notes = (f"CLIP in {folder} is not ViT-B/32 ({', '.join(other)})",) if other else ()
        return cls(model.to(device).requires_grad_(False).eval(), vision.image_size, notes)

    @torch.no_grad()
    def similarity(self, original: Image.Image, result: Image.Image) -> float:
        """The cosine, -1 to 1, of two RGB pictures' projected embeddings (method specification, section 13)."""
        # One after the other: the pictures of a set have many sizes, and the square they are cut to has one.
        a, b = (self.model(pixel_values=self.pixels(each)).image_embeds[0].double() for each in (original, result))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    def pixels(self, picture: Image.Image) -> Tensor:
        """What CLIP sees of a picture, [1,3,size,size]: short side to `size` (bicubic, antialiased), middle cut out.

        OpenAI's preprocessing, step by step: transformers' own goes through another resize where torchvision is there.
        """
        width, height = picture.size
        short = min(width, height)
        # Truncated, where rounding to nearest would be usual: it is how the published pipeline sizes the long side.
        scaled = picture.resize((self.size * width // short, self.size * height // short), Image.Resampling.BICUBIC)
        left, top = (round((side - self.size) / 2) for side in scaled.size)
        square = scaled.crop((left, top, left + self.size, top + self.size))
        values = torch.from_numpy(np.array(square, dtype=np.float32)).to(self.model.device) / 255
        values = (values - values.new_tensor(MEAN)) / values.new_tensor(DEVIATION)
        return values.permute(2, 0, 1)[None]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar, and without its report of two hundred lines on the text half, which is not read."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
