"""Count what a network call does from the call itself: it runs on meta tensors, and every operator is written down.

FLOPs are torch's own formulas (`torch.utils.flop_counter`): convolutions, matrix products and attention, a
multiply-add being 2; normalisations, activations and resizes by interpolation are not counted.

Attention is counted as fused kernels run it. On meta tensors `scaled_dot_product_attention` would fall apart into its
two products and their scores; here it stays one operator, whose backward makes the scores once more: 2.5 times its
forward instead of twice. Those FLOPs stand apart (`Cost.recomputed`), since a plain backward does without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

T = TypeVar("T")
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


@dataclass(frozen=True)
class Cost:
    """What a call does.

    flops: by (stage, kind). recomputed: FLOPs on top that fused attention's backward spends on scores it has made
    before and on gradients of constant keys and values. weights: bytes of parameters and constants read, each once;
    parameters: how many values those are. handed: bytes of other tensors given in and out. kept: bytes of activations
    that a forward leaves for its backward. traffic: bytes in and out of every counted operator without weights: what
    memory moves if nothing but these operators touches it and no cache helps. operators: all that compute something,
    fused attention being one. host: bytes over the link to the host's memory.
    """

    flops: Mapping[tuple[str, str], int] = field(default_factory=dict)
    recomputed: int = 0
    weights: int = 0
    parameters: int = 0
    handed: int = 0
    kept: int = 0
    traffic: int = 0
    operators: int = 0
    host: int = 0

    @property
    def arithmetic(self) -> int:
        """FLOPs that the mathematics asks for."""
        return sum(self.flops.values())

    @property
    def executed(self) -> int:
        """FLOPs that fused attention kernels execute for it."""
        return self.arithmetic + self.recomputed

    @property
    def memory(self) -> int:
        """Bytes that no implementation of this call avoids: weights, inputs and outputs, each once."""
        return self.weights + self.handed

    def by(self, part: str) -> dict[str, int]:
        """FLOPs by "stage" or by "kind"."""
        index = ("stage", "kind").index(part)
        found: dict[str, int] = {}
        for key, flops in self.flops.items():
            found[key[index]] = found.get(key[index], 0) + flops
        return found

    def __add__(self, other: Cost) -> Cost:
        flops = {key: self.flops.get(key, 0) + other.flops.get(key, 0) for key in {**self.flops, **other.flops}}
        return Cost(flops, *(getattr(self, name) + getattr(other, name) for name in _NUMBERS))

    def __mul__(self, count: int) -> Cost:
        flops = {key: count * value for key, value in self.flops.items()}
        return Cost(flops, *(count * getattr(self, name) for name in _NUMBERS))


_NUMBERS = [name for name in Cost.__dataclass_fields__ if name != "flops"]


class Counter:
    """Counts calls of some networks; their parameters say which stage and kind of layer an operator belongs to."""

    def __init__(self, **modules: nn.Module) -> None:
        """Modules by the role that heads their parameters' names: unet, vae, readout; last, constants for the rest."""
        self._modules = modules  # held: storages are known by their addresses
        self._names: dict[int, str] = {}
        for role, module in modules.items():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                self._names.setdefault(_storage(tensor), f"{role}.{name}")

    def forward(self, call: Callable[..., T], *inputs: Any, **options: Any) -> tuple[T, Cost]:
        """Run a call on meta tensors; its result and its cost."""
        with self._counting() as log:
            result = call(*inputs, **options)
        return result, log.cost(_size(tree_leaves((inputs, options))) + _size(tree_leaves(result)))

    def both(self, call: Callable[..., Any], *leaves: Tensor, wrt: Iterable[Tensor] = ()) -> tuple[Cost, Cost]:
        """Costs of `call(*leaves)`, tensors in any structure, and of its backward to those leaves and to `wrt`."""
        sources = [*(leaf for leaf in leaves if leaf.requires_grad), *wrt]
        saved: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in self._names:
                saved.setdefault(_storage(tensor), tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.enable_grad(), hooks, self._counting() as log:
            out = [tensor for tensor in tree_leaves(call(*leaves)) if tensor.requires_grad]
        forward = log.cost(_size([*leaves, *out]), sum(_bytes(tensor) for tensor in saved.values()))
        seeds = [torch.empty_like(tensor) for tensor in out]
        with self._counting(log.constant_keys) as log:
            torch.autograd.grad(out, sources, seeds, allow_unused=True)
        return forward, log.cost(_size([*out, *sources]))

    @contextmanager
    def _counting(self, constant_keys: Mapping[int, Tensor] | None = None) -> Iterator[_Log]:
        log = _Log(self._names, constant_keys or {})
        with _FusedAttention(log), log:
            yield log


class _Log(TorchDispatchMode):
    """Writes down every operator that is run. constant_keys: keys of attentions that need no gradient, by storage."""

    def __init__(self, names: Mapping[int, str], constant_keys: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.constant_keys = dict(constant_keys)  # held: storages are known by their addresses
        self._names, self._last = names, ""
        self._flops: dict[tuple[str, str], int] = {}
        self._read: dict[int, tuple[int, int]] = {}  # storage: bytes and values
        self._recomputed = self._traffic = self._operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        self._operators += 1
        formula = flop_registry.get(func._overloadpacket)
        weight: Tensor | None = None
        for tensor in _tensors((args, kwargs)):
            storage = _storage(tensor)
            if storage in self._names:
                size = min(_values(tensor), _bytes(tensor))
                known = self._read.get(storage, (0, 0))
                self._read[storage] = max(known, (size, size // tensor.element_size()))
                if tensor.dim() > 1 and not self._names[storage].startswith("constants."):
                    weight, self._last = tensor, self._names[storage]
            elif formula is not None:
                self._traffic += _values(tensor)
        if formula is not None:
            self._traffic += sum(map(_values, _tensors(out)))
            flops = formula(*args, **kwargs, out_val=out)
            if func._overloadpacket is _ATTENTION_BACKWARD:
                # Five products of one size: the scores again, and the gradients of their exponentials, of queries, keys
                # and values. A plain backward makes the last four, or two where keys and values are constants.
                needed = flops * (2 if _storage(args[2]) in self.constant_keys else 4) // 5
                flops, self._recomputed = needed, self._recomputed + flops - needed
            attends = func._overloadpacket in (_ATTENTION, _ATTENTION_BACKWARD)
            key = _stage(self._last), _kind(self._last, attends, weight)
            self._flops[key] = self._flops.get(key, 0) + flops
        return out

    def cost(self, handed: int, kept: int = 0) -> Cost:
        """What was written down; handed: bytes of the call's inputs and outputs."""
        return Cost(
            flops=self._flops,
            recomputed=self._recomputed,
            weights=sum(size for size, _ in self._read.values()),
            parameters=sum(n for storage, (_, n) in self._read.items() if "constants." not in self._names[storage]),
            handed=handed,
            kept=kept,
            traffic=self._traffic,
            operators=self._operators,
        )


class _FusedAttention(TorchFunctionMode):
    """Keeps attention one operator with a backward of its own, as on a GPU."""

    def __init__(self, log: _Log) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args  # no network here masks
        if not key.requires_grad:
            self._log.constant_keys[_storage(key)] = key
        return _ATTENTION(query, key, value)[0]


def _stage(name: str) -> str:
    """Where in its network a parameter sits; an attention product stands where the layer before it does."""
    role, _, rest = name.partition(".")
    first, number = (*rest.split("."), "", "")[:2]
    if role == "vae":
        return {"quant_conv": "encoder", "post_quant_conv": "decoder"}.get(first, first)
    if role != "unet":
        return role or "other"
    if first in ("down_blocks", "up_blocks"):
        return f"{first.partition('_')[0]} {number}"
    return {"mid_block": "mid", "conv_in": "down 0", "conv_out": "up 3"}.get(first, "time")


def _kind(name: str, attends: bool, weight: Tensor | None) -> str:
    if attends:
        return "cross-attention" if ".attn2." in name else "self-attention"
    if weight is not None and weight.dim() == 4:
        return f"{weight.shape[-2]}x{weight.shape[-1]} convolution"
    if weight is None and name.startswith("readout."):
        return "resize"
    if ".ff." in name:
        return "feed-forward"
    if "time_emb" in name or "emb_layers" in name:
        return "time"
    return "text keys and values" if ".attn2.to_k" in name or ".attn2.to_v" in name else "other linear"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _values(tensor: Tensor) -> int:
    """Bytes of a tensor's values, whatever it shares."""
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _size(leaves: Iterable[Any]) -> int:
    """Bytes of some tensors, those that share their memory once."""
    return sum({_storage(tensor): _bytes(tensor) for tensor in leaves if isinstance(tensor, Tensor)}.values())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
