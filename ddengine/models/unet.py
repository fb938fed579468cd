"""diffusers' conditional UNet, walked explicitly so that one forward returns everything the method needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


class UNetOutput(NamedTuple):
    """What one walk of the UNet yields (a named tuple, so that it can be traced, compiled and exported).

    noise: the noise prediction [B,4,h,w], or None when it was not asked for.
    feature: the drag feature map [B,C,h,w], the output of one up block after its upsampler.
    taps: hidden state of every up-block resnet after its second convolution, before the residual is added.
    kv: keys and values [B,tokens,C] of the self-attentions of the last two up blocks, in order of execution.
    """

    noise: Tensor | None
    feature: Tensor
    taps: tuple[Tensor, ...]
    kv: tuple[KeyValue, ...]


def unet_forward(
    unet: Any,
    latent: Tensor,
    timestep: int | Tensor,
    context: Tensor | Sequence[KeyValue],
    *,
    feature_block: int = 2,
    taps: bool = False,
    kv: bool = False,
    noise: bool = True,
    reference_kv: Sequence[KeyValue] | None = None,
    time: Sequence[Tensor] | None = None,
) -> UNetOutput:
    """Walk a `UNet2DConditionModel` and return its noise prediction with the inner tensors the method reads.

    latent: [B,4,h,w] of any h, w (the up blocks resize to their skips). timestep: an int or a 0- or 1-element tensor.
    context: text embedding [1,n,D], the same for the whole batch, or what `cross_key_values` made of it. feature_block:
    the up block whose output is the drag feature. noise=False stops after that block unless taps or kv need the rest.
    reference_kv: keys and values of another row, which then replace this row's own in the self-attentions of the last
    two up blocks (mutual self-attention, MasaCtrl). time: what `time_terms` made of the timestep, which is then not
    read. Equals diffusers' own forward up to rounding. No hooks and nothing patched.
    """
    if time is None:
        time = time_terms(unet, time_embedding(unet, timestep, latent))
    cross = cross_key_values(unet, context) if isinstance(context, Tensor) else context
    walk = _Walk(list(time), list(cross), taps, kv, None if reference_kv is None else list(reference_kv))

    x = unet.conv_in(latent)
    skips = [x]
    for block in unet.down_blocks:
        for index, resnet in enumerate(block.resnets):
            x = walk.resnet(resnet, x)
            if attentions := getattr(block, "attentions", None):
                x = walk.transformer(attentions[index], x)
            skips.append(x)
        for downsampler in block.downsamplers or ():
            x = downsampler(x)
            skips.append(x)

    x = walk.resnet(unet.mid_block.resnets[0], x)
    for attention, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True):
        x = walk.resnet(resnet, walk.transformer(attention, x))

    feature = None
    last = len(unet.up_blocks) - 1
    for number, block in enumerate(unet.up_blocks):
        mutual = number >= last - 1
        for index, resnet in enumerate(block.resnets):
            x = walk.resnet(resnet, torch.cat([x, skips.pop()], dim=1), tap=True)
            if attentions := getattr(block, "attentions", None):
                x = walk.transformer(attentions[index], x, mutual=mutual)
        for upsampler in block.upsamplers or ():
            x = upsampler.conv(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        if number == feature_block:
            feature = x
            if not (noise or taps or kv):
                break

    assert feature is not None, f"the UNet has no up block {feature_block}"
    prediction = unet.conv_out(F.silu(unet.conv_norm_out(x))) if noise else None
    return UNetOutput(prediction, feature, tuple(walk.taps), tuple(walk.kv))


def time_embedding(unet: Any, timesteps: int | Tensor, like: Tensor) -> Tensor:
    """The UNet's embedding [T,D] of one or T times, in the dtype and on the device of `like`."""
    times = torch.as_tensor(timesteps, device=like.device).reshape(-1)
    return unet.time_embedding(unet.time_proj(times).to(like.dtype))


def time_terms(unet: Any, embedding: Tensor) -> tuple[Tensor, ...]:
    """What a time embedding [T,D] adds to every resnet's hidden state, in order of execution: [T,C] each."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    activated = F.silu(embedding)
    return tuple(resnet.time_emb_proj(activated) for block in blocks for resnet in block.resnets)


class _Walk:
    """What stays the same along one walk, and what it collects."""

    def __init__(
        self, time: list[Tensor], cross: list[KeyValue], taps: bool, kv: bool, reference_kv: list[KeyValue] | None
    ) -> None:
        self.time, self.cross = time, cross
        self.want_taps, self.want_kv, self.reference_kv = taps, kv, reference_kv
        self.taps: list[Tensor] = []
        self.kv: list[KeyValue] = []

    def resnet(self, block: Any, x: Tensor, tap: bool = False) -> Tensor:
        hidden = block.conv1(F.silu(block.norm1(x)))
        hidden = hidden + self.time.pop(0)[:, :, None, None]
        hidden = block.conv2(F.silu(block.norm2(hidden)))
        if tap and self.want_taps:
            self.taps.append(hidden)
        shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
        return (shortcut + hidden) / block.output_scale_factor

    def transformer(self, block: Any, x: Tensor, mutual: bool = False) -> Tensor:
        batch, _, height, width = x.shape
        hidden = block.norm(x)
        if not block.use_linear_projection:
            hidden = block.proj_in(hidden)
        hidden = hidden.flatten(2).transpose(1, 2)
        if block.use_linear_projection:
            hidden = block.proj_in(hidden)
        for layer in block.transformer_blocks:
            hidden = hidden + self.self_attention(layer.attn1, layer.norm1(hidden), mutual)
            hidden = hidden + attention(layer.attn2, layer.norm2(hidden), *self.cross.pop(0))
            hidden = hidden + layer.ff(layer.norm3(hidden))
        if block.use_linear_projection:
            hidden = block.proj_out(hidden)
        hidden = hidden.transpose(1, 2).reshape(batch, -1, height, width)
        if not block.use_linear_projection:
            hidden = block.proj_out(hidden)
        return hidden + x

    def self_attention(self, block: Any, x: Tensor, mutual: bool) -> Tensor:
        if mutual and self.reference_kv is not None:
            key, value = self.reference_kv.pop(0)
        else:
            key, value = key_value(block, x)
        if mutual and self.want_kv:
            self.kv.append((key, value))
        return attention(block, x, key, value)


def cross_key_values(unet: Any, context: Tensor) -> tuple[KeyValue, ...]:
    """Keys and values of every cross-attention in order of execution: constants of a conditioning [1,n,D]."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    transformers = (transformer for block in blocks for transformer in getattr(block, "attentions", None) or ())
    return tuple(key_value(layer.attn2, context) for module in transformers for layer in module.transformer_blocks)


def key_value(block: Any, source: Tensor) -> KeyValue:
    """Keys and values [B,tokens,C] that an attention block makes from its source tokens."""
    return block.to_k(source), block.to_v(source)


def attention(block: Any, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v by heads; x [B,n,C], key and value [B or 1,m,C]."""

    def heads(tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (block.heads, -1)).transpose(1, 2).expand(x.shape[0], -1, -1, -1)

    mixed = F.scaled_dot_product_attention(heads(block.to_q(x)), heads(key), heads(value))
    return block.to_out[0](mixed.transpose(1, 2).flatten(2))
