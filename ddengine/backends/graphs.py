"""The gradient-free passes as graphs of named tensors with fixed shapes: what is exported, built and run by engines."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddengine.errors import InputError, ModelError

if TYPE_CHECKING:
    from ddengine.models.load import Model
    from ddengine.models.network import Network
    from ddengine.models.unet import KeyValue

PASSES = ("encode", "predict", "reference", "denoise", "decode")


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a pass: its shape, its dtype and what it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    meaning: str


@dataclass(frozen=True)
class PassSpec:
    """A pass's name and its tensors in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class PassShape:
    """The sizes a pass is made for.

    image_hw: working picture (rows, columns) in pixels, at least 16 a side. batch: edits at once. readout_hw: grid of
    the appearance map, None to leave it out. prompt_tokens: None folds the empty prompt in; a number turns the keys and
    values of the cross-attentions, of that many tokens, into inputs.
    """

    image_hw: tuple[int, int]
    batch: int = 1
    readout_hw: tuple[int, int] | None = None
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if min(self.image_hw) < 16 or self.batch < 1 or (self.prompt_tokens is not None and self.prompt_tokens < 1):
            raise InputError(f"{self}: a pass needs 16 pixels a side, a batch of 1 and a prompt of 1 token at least")

    @property
    def latent_hw(self) -> tuple[int, int]:
        """The latent's grid: eight pixels a cell, a rest at the border left out."""
        return self.image_hw[0] // 8, self.image_hw[1] // 8


class PassGraph(nn.Module):
    """One pass as a module of flat tensors, in the order of its `spec`; shares the model's weights.

    Latents, images and noise are float32 on both sides; feature, appearance, keys and values have the network's dtype.
    `timestep` is int64 [1]. Built by `pass_graph`.
    """

    spec: PassSpec

    def make_inputs(self, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Random inputs on the CPU that fit the spec: normal numbers, and a time in the middle of the schedule."""
        return tuple(
            torch.full(one.shape, 421, dtype=one.dtype)
            if one.dtype == torch.int64
            else torch.randn(one.shape, generator=generator).to(one.dtype)
            for one in self.spec.inputs
        )


class _Encode(PassGraph):
    def __init__(self, model: Model, shape: PassShape) -> None:
        super().__init__()
        self.encoder, self.quant_conv = model.vae.encoder, model.vae.quant_conv
        self.scale, self.dtype = float(model.vae.config.scaling_factor), next(model.vae.parameters()).dtype
        image = TensorSpec("image", (shape.batch, 3, *shape.image_hw), torch.float32, "picture in -1..1, RGB")
        self.spec = PassSpec("encode", (image,), (_latent(shape, "latent", "scaled posterior mean"),))

    def forward(self, image: Tensor) -> tuple[Tensor]:
        moments = self.encoder(image.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return (self.scale * moments.chunk(2, dim=1)[0].float(),)


class _Decode(PassGraph):
    def __init__(self, model: Model, shape: PassShape) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = model.vae.decoder, model.vae.post_quant_conv
        self.scale, self.dtype = float(model.vae.config.scaling_factor), next(model.vae.parameters()).dtype
        height, width = shape.latent_hw
        image = TensorSpec("image", (shape.batch, 3, 8 * height, 8 * width), torch.float32, "picture, not clamped")
        self.spec = PassSpec("decode", (_latent(shape, "latent", "scaled latent"),), (image,))

    def forward(self, latent: Tensor) -> tuple[Tensor]:
        scaled = (latent / self.scale).to(self.dtype)
        if self.post_quant_conv is not None:
            scaled = self.post_quant_conv(scaled)
        return (self.decoder(scaled).float(),)


class _Walk(PassGraph):
    """What `predict`, `reference` and `denoise` share: the network, and the order of their tensors."""

    def __init__(self, name: str, network: Network, shape: PassShape) -> None:
        super().__init__()
        self.network, self.name, self.readout_hw = network, name, shape.readout_hw
        self.cross = 2 * len(network.cross_kv()) if shape.prompt_tokens is not None else 0
        timestep = TensorSpec("timestep", (1,), torch.int64, "training time, 0 for the cleanest")
        inputs = [_latent(shape, "latent", "scaled latent"), timestep]
        outputs = [_latent(shape, "noise", "predicted noise")]
        dtype = network.dtype
        # The shapes inside follow from the modules; a walk without numbers finds them.
        with torch.device("meta"), torch.no_grad():
            found = _on_meta(network)(
                torch.empty(outputs[0].shape, dtype=dtype),
                torch.empty(1, dtype=torch.int64),
                kv=True,
                readout_hw=shape.readout_hw if name == "reference" else None,
            )
        pairs = [
            TensorSpec(f"{kind}_{number}", tuple(tensor.shape), dtype, f"{kind} of decoder self-attention {number}")
            for number, pair in enumerate(found.kv)
            for kind, tensor in zip(("key", "value"), pair, strict=True)
        ]
        if name == "reference":
            outputs.append(TensorSpec("feature", tuple(found.feature.shape), dtype, "drag feature map"))
            outputs += [
                TensorSpec("appearance", tuple(found_map.shape), dtype, "readout head's map")
                for found_map in found.appearance
            ]
            outputs += pairs
        if name == "denoise":
            inputs += pairs
        if shape.prompt_tokens is not None:
            inputs += [
                TensorSpec(
                    f"cross_{kind}_{number}",
                    (1, shape.prompt_tokens, tensor.shape[2]),
                    dtype,
                    f"the prompt's {kind} in cross-attention {number}",
                )
                for number, pair in enumerate(network.cross_kv())
                for kind, tensor in zip(("key", "value"), pair, strict=True)
            ]
        self.spec = PassSpec(name, tuple(inputs), tuple(outputs))

    def forward(self, latent: Tensor, timestep: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own, cross = rest[: len(rest) - self.cross], rest[len(rest) - self.cross :]
        out = self.network(
            latent.to(self.network.dtype),
            timestep,
            kv=self.name == "reference",
            reference_kv=_pairs(own) if self.name == "denoise" else None,
            readout_hw=self.readout_hw if self.name == "reference" else None,
            cross_kv=_pairs(cross) if self.cross else None,
        )
        if self.name != "reference":
            return (out.noise.float(),)
        return (out.noise.float(), out.feature, *out.appearance, *(tensor for pair in out.kv for tensor in pair))


def pass_graph(name: str, model: Model, network: Network, shape: PassShape) -> PassGraph:
    """The pass `name` of `PASSES` at fixed sizes, on the model's device.

    predict: (latent, timestep) -> (noise). reference: the same -> (noise, feature[, appearance], key_0, value_0, ...).
    denoise: (latent, timestep, key_0, value_0, ...) -> (noise). encode: (image) -> (latent). decode: the way back.
    Raises InputError for another name and ModelError for a readout grid without a head.
    """
    if name not in PASSES:
        raise InputError(f"pass {name!r} is unknown; use one of {', '.join(PASSES)}")
    if shape.readout_hw is not None and network.head is None:
        raise ModelError(f"model {model.name!r} has no readout head to make a {shape.readout_hw} map with; set none")
    if name == "encode":
        return _Encode(model, shape)
    if name == "decode":
        return _Decode(model, shape)
    return _Walk(name, network, shape)


def _latent(shape: PassShape, name: str, meaning: str) -> TensorSpec:
    return TensorSpec(name, (shape.batch, 4, *shape.latent_hw), torch.float32, meaning)


def _pairs(tensors: Sequence[Tensor]) -> list[KeyValue]:
    return list(zip(tensors[0::2], tensors[1::2], strict=True))


def _on_meta(network: Network) -> nn.Module:
    """The network with shapes and no numbers; the real one is not touched."""
    memo = {id(tensor): tensor.detach().to("meta") for tensor in (*network.parameters(), *network.buffers())}
    for tensor in network.parameters():
        memo[id(tensor)] = nn.Parameter(memo[id(tensor)], requires_grad=False)
    return copy.deepcopy(network, memo)
