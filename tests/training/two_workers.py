"""What each of two training workers does; a module of its own, because new processes import it by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddengine.training.loop import Plan, _average_gradients, fit, rank


def towards(module: nn.Module, numbers: np.random.Generator, noise: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """The first worker pulls the weight towards 3, the second towards 5."""
    loss = (module(torch.ones(1, 1)) - (3.0 + 2 * rank())).square().mean()
    return loss, {"loss": loss.item()}


def work(folder: Path) -> None:
    own = torch.nn.Parameter(torch.zeros(1))
    own.grad = torch.full((1,), 1.0 + 2 * rank())
    facts = {"own": own.grad.item()}
    _average_gradients([own])
    facts["averaged"] = own.grad.item()
    torch.manual_seed(0)
    plan = Plan(steps=60, learning_rate=0.3, warmup=1, ema=0.5, weight_decay=0.0)
    facts["weight"] = fit(nn.Linear(1, 1, bias=False), towards, plan, folder / "run").weight.detach()
    torch.save(facts, folder / f"{rank()}.pt")
