"""Batches of drawn scenes as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddengine.scenes.scene import random_scene


def to_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> float32 [B, 3, H, W] in -1..1."""
    stack = np.stack([np.asarray(p, np.float32) for p in pictures])
    return torch.from_numpy(stack).permute(0, 3, 1, 2) / 127.5 - 1


def scenes(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """`count` fresh random scenes, float32 [count, 3, size, size] in -1..1."""
    return to_batch([random_scene(rng).render(size) for _ in range(count)])


def random_crops(pictures: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """One random `size` x `size` crop of every picture: [B, 3, H, W] -> [B, 3, size, size]."""
    rows = rng.integers(0, pictures.shape[2] - size + 1, len(pictures))
    columns = rng.integers(0, pictures.shape[3] - size + 1, len(pictures))
    return torch.stack([p[:, r : r + size, c : c + size] for p, r, c in zip(pictures, rows, columns, strict=True)])


def save_grid(rows: Sequence[Tensor], file: Path, scale: int = 2) -> None:
    """Write rows of pictures ([B, 3, H, W] in -1..1 each) as one PNG."""
    lines = [torch.cat(list(row), dim=2) for row in rows]
    grid = torch.cat(lines, dim=1).clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(file)
