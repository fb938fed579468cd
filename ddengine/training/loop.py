"""One training loop for every part of the embedded model: seeded, resumable, one process a core."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from ddengine.artifacts import atomic_write, make_folder
from ddengine.errors import InputError

logger = logging.getLogger(__name__)

# A batch goes in through a seeded generator and a loss with named parts comes out.
LossFunction = Callable[[nn.Module, np.random.Generator, torch.Generator], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: it ends after `steps` or `minutes`, whichever comes first.

    The learning rate rises over `warmup` steps and falls by a cosine to 2 % over the larger elapsed share, so a
    run that is cut by the clock still ends annealed. `ema` is the decay of the averaged weights that are kept.
    """

    steps: int
    learning_rate: float
    minutes: float = math.inf
    warmup: int = 200
    ema: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500


def run_workers(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Call `function(*args)` in `processes` processes of one thread each that average their gradients."""
    if processes == 1:
        function(*args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_worker, (processes, port, function, args), nprocs=processes)


def _worker(rank: int, processes: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def fit(
    module: nn.Module,
    loss_function: LossFunction,
    plan: Plan,
    folder: Path,
    *,
    device: str = "cpu",
    bfloat16: bool = False,
    sample: Callable[[nn.Module, int], None] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Train `module` for at least one step and return its averaged copy (float32, eval, frozen).

    `folder` receives `state.pt` (to resume), `curve.json` (step, seconds, loss) and what `sample(module, step)` makes.
    Gradients are averaged over all workers; each worker draws its own batches from its own seed. `progress`: show a
    bar on stderr. Raises InputError if `folder` holds a run of another plan or cannot be written to.
    """
    make_folder(folder)
    module = module.to(device).train()
    average = copy.deepcopy(module).requires_grad_(False)  # no trained part here has buffers: weights are all there is
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, plan.learning_rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    first, spent, curve = _resume(folder, plan, device, module, average, optimiser)
    started = time.monotonic() - spent
    bar = tqdm(total=plan.steps, initial=first, desc=folder.name, disable=not progress or rank() != 0)
    step = first

    def note(parts: dict[str, float]) -> None:
        if not curve or curve[-1]["step"] < step:
            curve.append({"step": step, "seconds": round(time.monotonic() - started), **parts})
            bar.set_postfix({k: f"{v:.4f}" for k, v in parts.items()})

    def keep(parts: dict[str, float]) -> None:
        note(parts)
        if rank() == 0:
            _save(folder, module, average, optimiser, step, time.monotonic() - started, curve, plan)
            if sample is not None:
                sample(average, step)

    while step < plan.steps:
        share = max(step / plan.steps, _agreed((time.monotonic() - started) / (60 * plan.minutes)))
        if share >= 1 and step > 0:
            break
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, (step + 1) / plan.warmup) * _cosine(min(share, 1.0))
        # A worker's batches follow from (seed, step, worker) alone, so a resumed run sees what an unbroken one would.
        numbers = np.random.default_rng((plan.seed, step, rank()))
        noise = torch.Generator().manual_seed(int(numbers.integers(2**62)))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
            loss, parts = loss_function(module, numbers, noise)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, plan.clip)
        if torch.isfinite(norm):
            optimiser.step()
        decay = min(plan.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        step += 1
        bar.update()
        if step % 50 == 0:
            note(parts)
        if step % plan.checkpoint_every == 0:
            keep(parts)
    bar.close()
    if step > first and step % plan.checkpoint_every:
        keep(parts)
    return average.eval()


def _cosine(share: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


def _agreed(value: float) -> float:
    """The largest `value` among the workers, so that all of them stop at the same step."""
    if not dist.is_initialized():
        return value
    box = torch.tensor([value])
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return float(box)


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if not dist.is_initialized():
        return
    with_gradient = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in with_gradient])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, piece in zip(with_gradient, flat.split([p.numel() for p in with_gradient]), strict=True):
        p.grad = piece.view_as(p)


def _save(
    folder: Path,
    module: nn.Module,
    average: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    seconds: float,
    curve: list[dict[str, float]],
    plan: Plan,
) -> None:
    state = {
        "module": module.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": seconds,
        "plan": _plain(plan),
    }
    # The curve first: a state always has its curve, and what a curve has beyond its state is cut off on resuming.
    atomic_write(folder / "curve.json", json.dumps({"plan": _plain(plan), "curve": curve}).encode())
    atomic_write(folder / "state.pt", lambda file: torch.save(state, file))


def _plain(plan: Plan) -> dict[str, Any]:
    return {k: (None if v == math.inf else v) for k, v in asdict(plan).items()}


def read_state(folder: Path, plan: Plan, device: str = "cpu") -> dict[str, Any] | None:
    """What `folder` holds of an earlier run, None if nothing; InputError unless that run had the same plan."""
    if not (folder / "state.pt").exists():
        return None
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location=device, weights_only=True)
    ours = _plain(plan)
    theirs = state.get("plan", ours)
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        there, here = (", ".join(f"{name} {found.get(name)}" for name in other) for found in (theirs, ours))
        raise InputError(
            f"{folder} holds a run with {there}, this one has {here}; repeat that run's options to resume it, or name "
            f"another folder with -o"
        )
    return state


def _resume(
    folder: Path, plan: Plan, device: str, module: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[int, float, list[Any]]:
    state = read_state(folder, plan, device)
    if state is None:
        return 0, 0.0, []
    module.load_state_dict(state["module"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    curve = json.loads((folder / "curve.json").read_text())["curve"]
    curve = [point for point in curve if point["step"] <= state["step"]]
    logger.info("resuming %s at step %d", folder, state["step"])
    return state["step"], state["seconds"], curve
