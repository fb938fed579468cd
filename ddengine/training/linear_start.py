"""Start an autoencoder as 8 x 8 colour averaging, so that training adds detail instead of searching for colour.

Group normalisation hides a picture's mean colour from a randomly initialised autoencoder, which then spends thousands
of steps in grey. Here every level carries each colour q in four channels of normalisation group q: +q, -q and the
constants +k, -k. The pair keeps the group's mean at zero and the constants keep its deviation known; after the
normalisation SiLU(x) - SiLU(-x) = x undoes the non-linearity exactly. All residual branches start at zero.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

COLOURS = 3
CONSTANT = 3.0


@torch.no_grad()
def start_linear(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """Initialise in place: latent channels 0..2 = mean RGB of a cell, channel 3 free. Needs 4 channels a group."""
    groups = autoencoder.config.norm_num_groups
    encoder, decoder = autoencoder.encoder, autoencoder.decoder

    _enter(encoder.conv_in, groups)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            _pass_resnet(resnet, groups)
        for sampler in block.downsamplers or ():
            _carry(sampler.conv, groups, _kernel(0.25, slice(0, 2)))  # padded right and below: the cell is rows 0 and 1
    for resnet in encoder.mid_block.resnets:
        _pass_resnet(resnet, groups)
    _leave(encoder.conv_norm_out, encoder.conv_out)

    for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.out_channels)[:, :, None, None])
        conv.bias.zero_()
    logvar = slice(autoencoder.config.latent_channels, None)
    autoencoder.quant_conv.weight[logvar] = 0  # almost no noise at first: it would hide what little the latent says
    autoencoder.quant_conv.bias[logvar] = -5

    _enter(decoder.conv_in, groups)
    for resnet in decoder.mid_block.resnets:
        _pass_resnet(resnet, groups)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            _pass_resnet(resnet, groups)
        for sampler in block.upsamplers or ():
            _carry(sampler.conv, groups, _kernel(1.0, slice(1, 2)))
    _leave(decoder.conv_norm_out, decoder.conv_out)
    return autoencoder


def _slots(width: int, groups: int, colour: int) -> list[int]:
    """The four channels (+q, -q, +k, -k) that carry `colour` at a level of `width` channels."""
    first = colour * (width // groups)
    return [first, first + 1, first + 2, first + 3]


def _kernel(value: float, window: slice) -> Tensor:
    kernel = torch.zeros(3, 3)
    kernel[window, window] = value
    return kernel


def _enter(conv: nn.Conv2d, groups: int) -> None:
    assert conv.bias is not None
    for q in range(COLOURS):
        plus, minus, *_ = rows = _slots(conv.out_channels, groups, q)
        conv.weight[rows] = 0
        conv.weight[plus, q, 1, 1] = 1
        conv.weight[minus, q, 1, 1] = -1
        conv.bias[rows] = torch.tensor([0.0, 0.0, CONSTANT, -CONSTANT])


def _carry(conv: nn.Conv2d, groups: int, kernel: Tensor) -> None:
    assert conv.bias is not None
    for q in range(COLOURS):
        sources, rows = _slots(conv.in_channels, groups, q), _slots(conv.out_channels, groups, q)
        conv.weight[rows] = 0
        conv.bias[rows] = 0
        for source, row in zip(sources, rows, strict=True):
            conv.weight[row, source] = kernel


def _pass_resnet(resnet: Any, groups: int) -> None:
    resnet.conv2.weight.zero_()
    resnet.conv2.bias.zero_()
    if resnet.conv_shortcut is not None:
        _carry(resnet.conv_shortcut, groups, torch.ones(1, 1))


def _leave(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
    # Two of a group's channels are +-k and the rest are small: the deviation is about k sqrt(2 / channels).
    assert conv.bias is not None
    deviation = CONSTANT * (2 / (norm.num_channels // norm.num_groups)) ** 0.5
    for q in range(COLOURS):
        plus, minus, *_ = _slots(norm.num_channels, norm.num_groups, q)
        conv.weight[q] = 0
        conv.bias[q] = 0
        conv.weight[q, plus, 1, 1] = deviation
        conv.weight[q, minus, 1, 1] = -deviation
