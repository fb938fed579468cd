"""The networks as the published code calls them: prompt, time and weight casts anew in every call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddengine.backends.eager import EagerPasses
from ddengine.bench.savings import Structure
from ddengine.models.load import Model
from ddengine.models.unet import UNetOutput, time_embedding, time_terms, unet_forward


class Networks:
    """A model's UNet, readout head and autoencoder, called with some savings made."""

    def __init__(self, model: Model, structure: Structure, half: torch.dtype | None) -> None:
        """half: what weights are cast to in every call of drag and denoising; None computes in their own precision."""
        self.model, self.structure = model, structure
        self._half = None if structure.cast_once else half
        self.passes = EagerPasses(model)
        self._table: dict[int, Any] = {}

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """For one edit: weights without gradients from before, and ready to get new ones unless they are frozen."""
        for module in self._modules():
            module.zero_grad(set_to_none=True)
            module.requires_grad_(not self.structure.frozen)
        try:
            yield
        finally:
            for module in self._modules():
                module.requires_grad_(False)

    def gradients(self) -> int:
        """How many weights hold a gradient."""
        return sum(weight.grad is not None for module in self._modules() for weight in module.parameters())

    def _modules(self) -> list[nn.Module]:
        return [module for module in (self.model.unet, self.model.readout) if module is not None]

    def walk(self, latent: Tensor, t: int, *, taps: bool = False, early: bool = False) -> UNetOutput:
        """One walk of the UNet; early: of inversion or reference, which the published code runs in float32."""
        with self._casting(early):
            context = self.passes.network.cross_kv() if self.structure.constant_cross else self._context(len(latent))
            time = self._row(t)[0] if self.structure.time_table else None
            return unet_forward(self.model.unet, latent.to(self.model.dtype), t, context, taps=taps, time=time)

    def read(self, taps: Sequence[Tensor], t: int, grid: tuple[int, int]) -> Tensor:
        """The readout head's map at a time, of taps enlarged first or, native, of taps as they are."""
        head = self.model.readout
        assert head is not None
        with self._casting(early=False):
            if not self.structure.native_readout:
                taps = [F.interpolate(tap, size=grid, mode="bilinear", align_corners=False) for tap in taps]
            if self.structure.time_table:
                return head.read(taps, self._row(t)[1], grid)
            return head(taps, time_embedding(self.model.unet, t, self.model.empty_context), grid)

    def _casting(self, early: bool) -> Any:
        if self._half is None or (early and not self.structure.half):
            return nullcontext()
        return torch.autocast(self.model.device.type, self._half)

    def _context(self, rows: int) -> Tensor:
        return self.model.empty_context.expand(rows, -1, -1)

    def _row(self, t: int) -> Any:
        if t not in self._table:
            with torch.no_grad():
                embedding = time_embedding(self.model.unet, t, self.model.empty_context)
                head = self.model.readout
                read = None if head is None else head.time_terms(embedding)
                self._table[t] = time_terms(self.model.unet, embedding), read
        return self._table[t]


@contextmanager
def mutual(unet: Any) -> Iterator[None]:
    """For a while the last two up blocks' self-attentions give both rows the first row's keys and values (MasaCtrl)."""
    layers = [
        layer.attn1
        for block in unet.up_blocks[-2:]
        for transformer in block.attentions
        for layer in transformer.transformer_blocks
    ]
    hooks = [
        part.register_forward_hook(lambda module, given, result: result[:1])
        for layer in layers
        for part in (layer.to_k, layer.to_v)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
