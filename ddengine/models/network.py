"""The network of an edit: a UNet and its readout head under one conditioning, with all constants folded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ddengine.models.readout import ReadoutHead
from ddengine.models.unet import KeyValue, cross_key_values, time_embedding, time_terms, unet_forward


class Observation(NamedTuple):
    """What one call of the network yields.

    noise: prediction [B,4,h,w]. feature: drag feature map [B,C,h,w]. appearance: the readout head's maps [B,P,g,g'],
    one for each of its times (none where not asked for). kv: keys and values [B,tokens,C] of the self-attentions of
    the last two up blocks, in order (none where not asked for).
    """

    noise: Tensor
    feature: Tensor
    appearance: tuple[Tensor, ...]
    kv: tuple[KeyValue, ...]


class Network(nn.Module):
    """A frozen UNet and readout head for one conditioning; weights are shared with the modules it is given.

    A prompt's embedding reaches the UNet through the keys and values of its cross-attentions alone, and the time
    through one vector a resnet (and one a readout layer): both are computed once, as buffers `cross_key_*`,
    `cross_value_*` [1,n,C] and `time_table` [T, sum of C], a row for each of the T training times.
    """

    def __init__(self, unet: Any, head: ReadoutHead | None, context: Tensor, times: int) -> None:
        """context: text embedding [1,n,D] in the UNet's dtype; times: number of training times."""
        super().__init__()
        self.unet, self.head = unet, head
        self.dtype = context.dtype
        with torch.no_grad():
            pairs = cross_key_values(unet, context)
            for number, (key, value) in enumerate(pairs):
                self.register_buffer(f"cross_key_{number}", key, persistent=False)
                self.register_buffer(f"cross_value_{number}", value, persistent=False)
            embedding = time_embedding(unet, torch.arange(times), context)
            terms = time_terms(unet, embedding)
            read = () if head is None else head.time_terms(embedding)
            self.register_buffer("time_table", torch.cat([*terms, *(t for t in read if t is not None)], 1), False)
        self._cross_attentions = len(pairs)
        self._resnet_widths = [term.shape[1] for term in terms]
        self._readout_widths = [0 if term is None else term.shape[1] for term in read]

    def cross_kv(self) -> tuple[KeyValue, ...]:
        """Keys and values of every cross-attention, in order of execution."""
        return tuple(
            (getattr(self, f"cross_key_{number}"), getattr(self, f"cross_value_{number}"))
            for number in range(self._cross_attentions)
        )

    def forward(
        self,
        latent: Tensor,
        timestep: int | Tensor,
        *,
        kv: bool = False,
        reference_kv: Sequence[KeyValue] | None = None,
        readout_hw: tuple[int, int] | None = None,
        readout_times: Sequence[int | Tensor] | None = None,
        cross_kv: Sequence[KeyValue] | None = None,
    ) -> Observation:
        """One walk at a time in 0 ... T-1 (an int or int64 tensor [1]), of a latent [B,4,h,w] in the UNet's dtype.

        readout_hw: grid of the appearance map, None for no map. readout_times: the times the head is told, by default
        the walk's own. reference_kv: see `unet_forward`. cross_kv: another prompt's in place of the folded ones.
        """
        time, read = self._time(timestep)
        taps = readout_hw is not None
        out = unet_forward(
            self.unet,
            latent,
            timestep,
            self.cross_kv() if cross_kv is None else cross_kv,
            taps=taps,
            kv=kv,
            reference_kv=reference_kv,
            time=time,
        )
        appearance: tuple[Tensor, ...] = ()
        if readout_hw is not None:
            assert self.head is not None, "the model has no readout head"
            told = [read] if readout_times is None else [self._time(t)[1] for t in readout_times]
            appearance = tuple(self.head.read(out.taps, terms, readout_hw) for terms in told)
        assert out.noise is not None
        return Observation(out.noise, out.feature, appearance, out.kv)

    def _time(self, timestep: int | Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """The terms of all resnets and all readout layers at a time, [1,C] each."""
        table = cast(Tensor, self.time_table)
        row = table[timestep : timestep + 1] if isinstance(timestep, int) else table[timestep.reshape(1)]
        parts = list(row.split([*self._resnet_widths, *self._readout_widths], dim=1))
        count = len(self._resnet_widths)
        return parts[:count], [part if part.shape[1] else None for part in parts[count:]]
