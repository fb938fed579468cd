"""Whether half precision holds the drag step's gradients without a loss scale: sizes, and what half makes of them.

Sizes are those of a float32 run: of the gradient to the latent, of the cotangents that enter the network (where half
precision begins) and of every tensor that the backward pass computes inside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from ddengine.artifacts import atomic_write, check_writable, make_folder
from ddengine.backends.compiled import ROUNDING
from ddengine.backends.eager import EagerPasses
from ddengine.bench.parity import SEED, Seen, drawn_task, engine_of, recorded
from ddengine.bench.timer import machine
from ddengine.config import DirectDragConfig
from ddengine.directdrag.step import Rules, losses
from ddengine.errors import InputError
from ddengine.models.load import Model

LOWEST, HIGHEST = -60, 20  # exponents of two that a histogram tells apart
# Of a format: the exponents of its smallest normal number and of its smallest number at all, and its largest number.
FORMATS = {"float16": (-14, -24, 65504.0), "bfloat16": (-126, -133, 3.39e38)}
PLACES = ("latent", "feature", "noise", "appearance", "inside")
COMPARED = 10  # states, at most twice as many, whose gradients are taken in half precision too
# At Stable Diffusion 1.5's shape the readout term is a mean over 2^6.6 times as many values as in the embedded model,
# and its cotangents are as much smaller: what a scale of 2^-7 makes of them here.
CASES = {"total": (0, 4, 8, 10, 12, 16), "readout": (-7, 0, 1, 3), "drag": (0,), "background": (0,)}  # exponents


class Sizes:
    """How many gradient elements have which binary exponent, exact zeros apart."""

    def __init__(self) -> None:
        self.counts = torch.zeros(HIGHEST - LOWEST + 1, dtype=torch.int64)
        self.squares = torch.zeros(HIGHEST - LOWEST + 1, dtype=torch.float64)
        self.zeros, self.largest = 0, 0.0

    def add(self, gradient: Tensor) -> None:
        size = gradient.detach().double().abs().flatten().cpu()
        self.zeros += int((size == 0).sum())
        size = size[size > 0]
        if len(size):
            self.largest = max(self.largest, float(size.max()))
            exponents = (torch.frexp(size).exponent.long() - 1).clamp(LOWEST, HIGHEST) - LOWEST
            self.counts += torch.bincount(exponents, minlength=len(self.counts))
            self.squares += torch.bincount(exponents, weights=size.square(), minlength=len(self.counts))

    def below(self, exponent: int) -> tuple[float, float]:
        """Shares below two to the exponent: of the elements that are not zero, and of their sum of squares."""
        low = max(exponent - LOWEST, 0)
        count, square = (float(values[:low].sum() / values.sum().clamp_min(1e-300)) for values in self.both())
        return count, square

    def both(self) -> tuple[Tensor, Tensor]:
        return self.counts.double(), self.squares

    def facts(self) -> dict[str, Any]:
        shares = {
            f"{name}, {kind}": dict(zip(("elements", "squares"), self.below(exponent), strict=True))
            for name, (normal, least, _) in FORMATS.items()
            for kind, exponent in (("below normal", normal), ("below smallest", least))
        }
        return {
            "elements": int(self.counts.sum()),
            "zeros": self.zeros,
            "largest": self.largest,
            "shares": shares,
            "exponents": {str(k + LOWEST): n for k, n in enumerate(self.counts.tolist()) if n},
        }


class Watch(TorchDispatchMode):
    """Gives the size of every floating tensor that is computed while it is on to a `Sizes`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self._sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):  # a view has been seen before
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self._sizes.add(tensor)
        return out


def gradient(
    passes: EagerPasses,
    call: Seen,
    rules: Rules,
    *,
    scale: float = 1.0,
    term: str = "total",
    rounding: float | None = None,
    inside: Sizes | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """∂L/∂latent [B,4,h,w] at a recorded state by the passes' network, and the cotangents that enter the network.

    Both float32 and without the scale, by which the loss is multiplied before the gradient is taken. term: one of the
    loss's, or all weighted. rounding: the share of the largest noise that the background term forgives; by default the
    recorded one. inside: is given the sizes of all that the backward pass computes in the network.
    """
    goal = call.goal
    if rounding is not None:
        goal = goal._replace(tolerance=goal.tolerance * (rounding / ROUNDING[torch.float32]))
    leaf = call.state.latent.detach().requires_grad_()
    out = passes.supervise(leaf, goal.timestep, readout_hw=rules.readout_hw)
    # Cut where the network ends, so that what enters its backward pass can be seen.
    entering = [out.feature, out.noise, *out.appearance]
    feature, noise, *appearance = cut = [tensor.detach().requires_grad_() for tensor in entering]
    seen = out._replace(feature=feature, noise=noise, appearance=tuple(appearance))
    beside = call.state.latent.detach().requires_grad_()  # the latent that the background term reads itself
    loss = scale * getattr(losses(seen, beside, call.state.handles_yx, goal, rules), term).sum()
    found = torch.autograd.grad(loss, [*cut, beside], allow_unused=True, materialize_grads=True)
    with Watch(inside) if inside is not None else nullcontext():
        (through,) = torch.autograd.grad(entering, leaf, found[:-1])
    names = ("feature", "noise", "appearance")
    return (through + found[-1]).float() / scale, {
        name: tensor.float() / scale for name, tensor in zip(names, found, strict=False)
    }


def sizes(passes: EagerPasses, seen: Sequence[Seen], rules: Rules) -> dict[str, Sizes]:
    """Sizes of the gradients of all recorded states, by `PLACES`."""
    found = {place: Sizes() for place in PLACES}
    for call in seen:
        latent, entering = gradient(passes, call, rules, inside=found["inside"])
        for name, tensor in {"latent": latent, **entering}.items():
            found[name].add(tensor)
    return found


def compare(plain: EagerPasses, half: EagerPasses, seen: Sequence[Seen], rules: Rules) -> list[dict[str, Any]]:
    """Half precision's gradients against float32's from the same states, for all `CASES`: medians and worst.

    Both forgive the rounding of the half-precision noise: the reference latents are those of the float32 walk.
    """
    rows, rounding = [], ROUNDING[half.dtype]
    for term, exponents in CASES.items():
        every = [gradient(plain, call, rules, term=term, rounding=rounding)[0].double() for call in seen]
        wanted = [(call, one) for call, one in zip(seen, every, strict=True) if bool(one.any())]
        for exponent in exponents:
            cosines, apart = [], []
            for call, one in wanted:
                found = gradient(half, call, rules, term=term, rounding=rounding, scale=2.0**exponent)[0].double()
                if bool(found.isfinite().all()):
                    cosines.append(float(torch.cosine_similarity(found.flatten(), one.flatten(), dim=0)))
                    apart.append(float((found - one).norm() / one.norm()))
            row: dict[str, Any] = {"term": term, "log2_scale": exponent, "calls": len(wanted), "finite": len(apart)}
            if apart:
                row |= {"cosine": statistics.median(cosines), "least_cosine": min(cosines)}
                row |= {"relative_rms": statistics.median(apart), "worst_relative_rms": max(apart)}
            rows.append(row)
    return rows


def run(
    models: Mapping[str, Model], output: Path, *, config: DirectDragConfig, drags: int, progress: bool = False
) -> dict[str, Any]:
    """Everything, on states of `drags` drawn drags; `models`: by the name of their dtype, float32 among them."""
    check_writable(make_folder(output.parent) / output.name)
    passes = {name: EagerPasses(model) for name, model in models.items()}
    plain = passes["float32"]
    engine, seen = engine_of(plain), list[Seen]()
    for number in tqdm(range(drags), disable=not progress):
        recorder, _ = recorded(EagerPasses(plain.model), drawn_task(engine, config, number), config)
        seen += [call for call in recorder.seen if call.k is not None and bool(call.after.updates.any())]
    rules = recorder.rules
    some = seen[:: max(1, len(seen) // COMPARED)]
    found = sizes(plain, seen, rules)
    halves = tqdm([name for name in passes if name != "float32"], disable=not progress)
    table = [{"dtype": name, **row} for name in halves for row in compare(plain, passes[name], some, rules)]
    facts = {
        "machine": machine(plain.device),
        "model": plain.model.digest,
        "config": config.to_dict(),
        "seed": SEED,
        "drags": drags,
        "calls": len(seen),
        "sizes": {place: one.facts() for place, one in found.items()},
        "half": table,
    }
    atomic_write(output, json.dumps(facts, indent=1).encode())
    return facts


def text(facts: Mapping[str, Any]) -> str:
    """Sizes and the comparison as Markdown tables."""
    kinds = [f"{name}, {kind}" for name in FORMATS for kind in ("below normal", "below smallest")]
    lines = [f"| gradient | largest | {' | '.join(kinds)} |", "| --- |" + " --- |" * (len(kinds) + 1)]
    for place, one in facts["sizes"].items():
        shares = " | ".join(f"{one['shares'][kind]['elements']:.2%}" for kind in kinds)
        lines.append(f"| {place} | {one['largest']:.2g} | {shares} |")
    lines += ["", "| network in | loss | scale | finite | cosine | (least) | relative RMS | (worst) |", "| --- |" * 8]
    lines[-1] = "| --- |" + " --- |" * 7
    for row in facts["half"]:
        numbers = [row.get(name) for name in ("cosine", "least_cosine", "relative_rms", "worst_relative_rms")]
        shown = " | ".join("" if number is None else f"{number:.5f}" for number in numbers)
        about = f"{row['dtype']} | {row['term']} | 2^{row['log2_scale']} | {row['finite']}/{row['calls']}"
        lines.append(f"| {about} | {shown} |")
    return "\n".join(lines)


def picture(facts: Mapping[str, Any], path: Path) -> None:
    """The sizes as a plot; InputError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("the picture is drawn with matplotlib, which is missing; pip install matplotlib") from error
    figure, axes = plt.subplots(len(PLACES), 1, figsize=(8, 7), sharex=True, layout="constrained")
    for axis, place in zip(axes, PLACES, strict=True):
        found = {int(k): n for k, n in facts["sizes"][place]["exponents"].items()}
        total = sum(found.values())
        axis.bar([k + 0.5 for k in found], [n / total for n in found.values()], width=0.9, color="#5f6368")
        axis.axvspan(LOWEST, -24, color="#d9480f", alpha=0.18, lw=0)
        axis.axvspan(-24, -14, color="#d9480f", alpha=0.08, lw=0)
        axis.set_ylabel(place, rotation=0, ha="right", va="center")
        axis.set_yticks([])
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    axes[0].text(-24.3, 1.04, "zero in float16", transform=axes[0].get_xaxis_transform(), ha="right", color="#d9480f")
    axes[0].text(-14.2, 1.04, "fewer bits", transform=axes[0].get_xaxis_transform(), ha="right", color="#d9480f")
    axes[0].text(-13.8, 1.04, "all bits", transform=axes[0].get_xaxis_transform())
    axes[-1].set_xlim(-48, 8)
    axes[-1].set_xlabel("size of a gradient element, float32, as a power of two")
    figure.savefig(make_folder(path.parent) / path.name, dpi=110, facecolor="white")
    plt.close(figure)
