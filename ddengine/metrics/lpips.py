"""IF = 1 - LPIPS over AlexNet at 224 x 224, from two safetensors files and without torchvision.

LPIPS (Zhang et al. 2018, version 0.1):  d(a, b) = Σ_l mean_yx w_l · (f̂_l(a) − f̂_l(b))²,  f_l the five ReLU maps of
AlexNet's features and f̂ = f / (‖f‖ + 1e-10) over the channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddengine.artifacts import StrPath
from ddengine.errors import InputError, ModelError
from ddengine.image import resize, to_tensor
from ddengine.models.files import check_names, read_tensors

SIZE = 224
FEATURES, HEADS = "alexnet.safetensors", "lpips_alex.safetensors"

# Index in torchvision's `features`, channels in and out, kernel, stride, padding; pooled before the map is taken.
_LAYERS = (
    (0, 3, 64, 11, 4, 2, False),
    (3, 64, 192, 5, 1, 2, True),
    (6, 192, 384, 3, 1, 1, True),
    (8, 384, 256, 3, 1, 1, False),
    (10, 256, 256, 3, 1, 1, False),
)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation for [-1, 1]

# The heads were saved on a GPU, hence map_location; weights_only=True runs nothing of a file.
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('{}', map_location='cpu', weights_only=True), '{}')\""
)
_SOURCES = {
    FEATURES: "torchvision's AlexNet, alexnet-owt-7be5be79.pth",
    HEADS: "the lpips package's weights/v0.1/alex.pth",
}


@dataclass(frozen=True)
class Lpips:
    """The distance's weights: a convolution's weight and bias, and a head [C], for each of five layers."""

    convolutions: tuple[tuple[Tensor, Tensor], ...]
    heads: tuple[Tensor, ...]

    @classmethod
    def load(cls, folder: StrPath, device: torch.device | str = "cpu") -> Lpips:
        """Read `alexnet.safetensors` (torchvision's names) and `lpips_alex.safetensors` (lpips') of a folder, float32.

        AlexNet's classifier may be in the file and is not read. ModelError names a missing file and how to make it.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for index, into, out, size, *_ in _LAYERS:
            shapes |= {f"features.{index}.weight": (out, into, size, size), f"features.{index}.bias": (out,)}
        wanted: dict[str, tuple[int, ...]] = {
            f"lin{k}.model.1.weight": (1, out, 1, 1) for k, (_, _, out, *_) in enumerate(_LAYERS)
        }
        folder = Path(folder).expanduser()
        body, heads = _read(folder / FEATURES, shapes, device), _read(folder / HEADS, wanted, device)
        return cls(
            tuple((body[f"features.{k}.weight"], body[f"features.{k}.bias"]) for k, *_ in _LAYERS),
            tuple(heads[name].flatten() for name in wanted),
        )

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS [B] of two pictures [B,3,H,W] in [-1, 1], at the size they have; 0 for equal ones."""
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3 or min(a.shape[2:]) < 63:
            raise InputError(
                f"pictures {list(a.shape)} and {list(b.shape)} cannot be compared; give both [B,3,H,W], one size, "
                f"sides of at least 63"
            )
        reference = self.heads[0]
        maps = zip(self._maps(a.to(reference)), self._maps(b.to(reference)), self.heads, strict=True)
        parts = [torch.einsum("c,bchw->b", head, (x - y).square()) / x[0, 0].numel() for x, y, head in maps]
        return torch.stack(parts).sum(0)

    def fidelity(self, original: Image.Image, result: Image.Image) -> float:
        """IF of two RGB pictures of one size: 1 - LPIPS after enlarging or shrinking both to 224 x 224.

        Bilinear over four neighbours, without antialiasing, as published (method specification, section 13).
        """
        a, b = (resize(to_tensor(each), (SIZE, SIZE), "bilinear") for each in (original, result))
        return 1.0 - float(self.distance(a, b))

    def _maps(self, x: Tensor) -> Iterator[Tensor]:
        x = (x - x.new_tensor(_SHIFT)[:, None, None]) / x.new_tensor(_SCALE)[:, None, None]
        for (weight, bias), (*_, stride, padding, pooled) in zip(self.convolutions, _LAYERS, strict=True):
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _read(path: Path, wanted: dict[str, tuple[int, ...]], device: torch.device | str) -> dict[str, Tensor]:
    """The wanted tensors of a file, float32."""
    if not path.is_file():
        source = _SOURCES[path.name]
        remedy = f"make it once from {source}: {_CONVERT.format(source.split('/')[-1].split()[-1], path)}"
        raise ModelError(f"{path}: not found; {remedy}")
    tensors = {name: value for name, value in read_tensors(path)[0].items() if not name.startswith("classifier.")}
    check_names(path, wanted, {name: tuple(value.shape) for name, value in tensors.items()})
    return {name: value.to(device, torch.float32, copy=True) for name, value in tensors.items()}
