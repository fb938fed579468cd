"""Our share of the limit where a GPU's peaks are known: the floor of the passes that edits really ran."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ddengine.bench.account import Account
from ddengine.bench.devices import Device, named
from ddengine.bench.roofline import floor, share
from ddengine.config import DirectDragConfig
from ddengine.errors import InputError
from ddengine.models.load import Model


class Limits:
    """Floors of one model's passes at one size on one GPU, 16-bit arithmetic. (bench/roofline.py says what counts.)"""

    def __init__(self, model: Model, work_hw: tuple[int, int], config: DirectDragConfig, gpu: Device) -> None:
        """model: anywhere; it is counted on shapes without memory. work_hw: working rows and columns in pixels."""
        self.gpu, self._account = gpu, Account(on_meta(model), work_hw, config)

    def step_ms(self, batch: int = 1) -> float:
        """A drag step's share of one edit: the forward whose gradient is wanted, and its backward.

        In a batch the weights pass through memory once for all edits, so only the arithmetic is each edit's own.
        """
        least = floor(self._account.cost("supervise") + self._account.cost("backward"), self.gpu)
        return least.ms if batch == 1 else least.arithmetic

    def edit_ms(self, passes: Mapping[str, Mapping[str, int]]) -> float:
        """One edit by the UNet passes that its result reports; of several kinds in a stage the cheapest counts.

        A prepared picture's edit reports no inversion: nor does it encode.
        """
        account, kinds = self._account, {"invert": "predict", "reference": "reference", "denoise": "denoise"}
        calls = {"decode": 2 if account.config.preserve else 1, "encode": int("invert" in passes)}
        for stage, counts in passes.items():
            if stage == "drag":
                calls |= {"supervise": counts["forward"], "backward": counts["backward"]}
            else:
                calls[kinds[stage]] = calls.get(kinds[stage], 0) + counts["forward"]
        return sum(count * floor(account.cost(call), self.gpu).ms for call, count in calls.items() if count)


def limits_of(model: Model, work_hw: tuple[int, int], config: DirectDragConfig) -> Limits | str:
    """The floors for the device that a model lies on, or why there are none."""
    if model.device.type != "cuda":
        return f"there are no peaks for a {model.device.type.upper()}, so no limit to have a share of"
    name = torch.cuda.get_device_name(model.device)
    gpu = named(name)
    if gpu is None:
        return f"there are no peaks for {name}; bench/devices.py has those that are known"
    if model.dtype not in (torch.float16, torch.bfloat16):
        return "the peaks are of 16-bit arithmetic, this model computes in float32"
    return Limits(model, work_hw, config, gpu)


def shares(limits: Limits | str, measured: Mapping[str, float], floors: Mapping[str, float]) -> dict[str, Any]:
    """Floors in ms and how much of the measured ms they are, both by the same names; why not, where there are none."""
    if isinstance(limits, str):
        return {"gpu": None, "why": limits}
    facts: dict[str, Any] = {"gpu": limits.gpu.name}
    for name, least in floors.items():
        facts[f"{name}_ms"] = least
        try:
            facts[f"{name}_share"] = share(least, measured[name])
        except InputError as error:  # said, not raised: what was measured stays
            facts |= {f"{name}_share": None, "why": str(error)}
    return facts


def on_meta(model: Model) -> Model:
    """A model's shapes without its numbers; the model itself is not touched."""

    def bare(module: nn.Module | None) -> Any:
        if module is None:
            return None
        memo: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            empty = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        return copy.deepcopy(module, memo)

    parts = {"unet": bare(model.unet), "vae": bare(model.vae), "readout": bare(model.readout)}
    return replace(model, **parts, empty_context=model.empty_context.to("meta"))
