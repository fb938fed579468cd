"""Speed of the method's own operators at 512 x 512: equality first, then eager, compiled eager and Triton.

On a CPU it times the reference alone, and how much faster that is than the published algorithm in its loop form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ddengine.artifacts import atomic_write, check_writable, make_folder
from ddengine.bench import loop_form
from ddengine.bench.timer import Call, Timing, machine, measure, readable
from ddengine.errors import DDEngineError, InputError
from ddengine.kernels.drag_loss import drag_loss
from ddengine.kernels.gaussian_mask import gaussian_mask
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.track import track
from ddengine.kernels.warpage import warp_latent, warpage_field
from ddengine.kernels.windows import window_cells

LATENT, FEATURE, CHANNELS = (64, 64), (256, 256), 640  # of a 512 x 512 picture in Stable Diffusion 1.5
SIGMA, RATIO, PATCH, WINDOW = 30.0, 0.15, 4, 12  # the method's soft_mask_sigma, latent_warpage_ratio, r1, r2
POINTS = (1, 16, 64)
LOOP_POINTS = (1, 16)
COMPILED_POINTS = 16  # compiling takes longer than everything else here: one size is enough
SLACK = 8 * torch.finfo(torch.float32).eps  # where the eager error is zero by luck
REFERENCE_LIMIT = 1e-5  # the reference's own error against float64
# Channels and side of the UNet's GroupNorm + SiLU inputs at 512 x 512, the smallest and the largest of each side.
NORMS = ((320, 64), (960, 64), (640, 32), (1920, 32), (1280, 16), (2560, 16), (1280, 8), (2560, 8))


@dataclass(frozen=True)
class Case:
    """One operator on one set of inputs.

    run(kernels, *inputs) gives its result; with `weights`, also the gradient of its so weighted sum to the first input.
    traffic: the fewest bytes of memory it can move, each value read or written once.
    """

    operator: str
    points: int
    inputs: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    traffic: int
    weights: Tensor | None = None

    def call(self, kernels: str, compiled: Callable[..., Tensor] | None = None) -> Call:
        """What is timed; with `compiled` in place of `run`."""
        if self.weights is None:
            return torch.no_grad()(partial(compiled or self.run, kernels, *self.inputs))
        first = self.inputs[0].detach().requires_grad_()

        def both() -> tuple[Tensor, ...]:
            result = (compiled or self.run)(kernels, first, *self.inputs[1:])
            return result, *torch.autograd.grad(result, first, self.weights)

        return both

    def results(self, kernels: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Result and gradient in float64; `dtype` casts the floating inputs first."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if dtype and x.is_floating_point() else x

        weights = None if self.weights is None else cast(self.weights)
        found = replace(self, inputs=tuple(map(cast, self.inputs)), weights=weights).call(kernels)()
        return [x.detach().double() for x in (found if isinstance(found, tuple) else (found,))]


def cases(device: torch.device, dtype: torch.dtype, points: Sequence[int] = POINTS, seed: int = 0) -> list[Case]:
    """All operators with so many points each; features in `dtype`, everything else float32."""
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(1, CHANNELS, *LATENT, generator=generator).to(device, dtype)
    latent = torch.randn(1, 4, *LATENT, generator=generator).to(device)
    cells, found = math.prod(LATENT), []
    for n in points:
        starts, ends = (draw_points(n, generator).to(device) for _ in range(2))
        handles, moves = starts / 4, RATIO * (ends - starts) / 4
        field = warpage_field(handles, moves, LATENT, kernels="reference")
        sub = starts.clamp(WINDOW, FEATURE[0] - 1 - WINDOW) + 0.375
        reference = torch.randn(n, CHANNELS, 2 * PATCH + 1, 2 * PATCH + 1, generator=generator).to(device)
        one = torch.ones((), device=device)
        template = feature[0, :, 3, 5].float().expand(n, -1).contiguous()
        moving = torch.ones(n, dtype=torch.bool, device=device)
        native = [min(n * window_cells(r, FEATURE[0], LATENT[0]) ** 2, cells) for r in (PATCH, WINDOW)]
        patch, window = (CHANNELS * feature.element_size() * count for count in native)
        mask, warp, patches = 16 * n + 4 * math.prod(FEATURE), 2 * latent.nbytes + field.nbytes, reference.nbytes
        loss = feature, sub, reference, moving
        back = patch + patches + feature.nbytes  # the patches in, the gradient out
        found += [
            Case("gaussian_mask", n, (starts, ends), _mask, mask),
            Case("gaussian_mask, truncated", n, (starts, ends), _cut_mask, mask),
            Case("sample_patches", n, (feature, sub), _patches, patch + patches),
            Case("sample_patches and gradient", n, (feature, sub), _patches, back + patches, reference),
            Case("drag_loss and gradient", n, loss, _loss, back, one),
            Case("track", n, (feature, template, sub), _track, window + 4 * n * (CHANNELS + 4)),
            Case("warpage_field", n, (handles, moves), _field, 16 * n + 8 * cells),
            Case("warp_latent", n, (latent, field), _warp, warp),
            Case("warp_latent, sequential", n, (latent, field), _published_warp, warp),
        ]
    return found


def draw_points(count: int, generator: torch.Generator) -> Tensor:
    """Whole positions [n,2] on the feature grid, float32, as the method rounds them."""
    return torch.randint(0, FEATURE[0], (count, 2), generator=generator).float()


def _mask(kernels: str, starts: Tensor, ends: Tensor) -> Tensor:
    return gaussian_mask(starts, ends, FEATURE, SIGMA, kernels=kernels)


def _cut_mask(kernels: str, starts: Tensor, ends: Tensor) -> Tensor:
    return gaussian_mask(starts, ends, FEATURE, SIGMA, truncated=True, epsilon=1e-6, transposed=True, kernels=kernels)


def _patches(kernels: str, feature: Tensor, centres: Tensor) -> Tensor:
    return sample_patches(feature, centres, PATCH, FEATURE, kernels=kernels)


def _loss(kernels: str, feature: Tensor, centres: Tensor, reference: Tensor, moving: Tensor) -> Tensor:
    return drag_loss(feature, centres, reference, moving, 64.0, PATCH, FEATURE, kernels=kernels)


def _track(kernels: str, feature: Tensor, template: Tensor, handles: Tensor) -> Tensor:
    return track(feature, template, handles, WINDOW, FEATURE, kernels=kernels)


def _field(kernels: str, handles: Tensor, moves: Tensor) -> Tensor:
    return warpage_field(handles, moves, LATENT, kernels=kernels)


def _warp(kernels: str, latent: Tensor, field: Tensor) -> Tensor:
    return warp_latent(latent, field, kernels=kernels)


def _published_warp(kernels: str, latent: Tensor, field: Tensor) -> Tensor:
    return warp_latent(latent, field, fill="sequential", holes="zero", kernels=kernels)


def errors(case: Case, versions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each version's largest error against float64, over the largest value, and its limit.

    The reference may be off by `REFERENCE_LIMIT` (a step of the features' own format, where that is coarser), others by
    twice as much as the reference is.
    """
    exact = case.results("reference", torch.float64)
    found: dict[str, dict[str, float]] = {}
    for version in versions:
        error = 0.0
        for x, y in zip(case.results(version), exact, strict=True):
            gap = float((x - y).abs().max() / y.abs().max().clamp_min(1e-30))
            error = math.inf if math.isnan(gap) else max(error, gap)
        coarse = max(torch.finfo(x.dtype).eps for x in case.inputs if x.is_floating_point())
        limit = max(REFERENCE_LIMIT, coarse) if version == "reference" else 2 * found["reference"]["error"] + SLACK
        found[version] = {"error": error, "limit": limit}
    return found


def measure_case(
    case: Case, device: torch.device, peak: Mapping[str, float | None] | None, seconds: float
) -> dict[str, Any]:
    """Equality, and times only if all versions are equal; on CUDA also bytes a second and its share of the limit."""
    gpu = device.type == "cuda"
    row: dict[str, Any] = {"operator": case.operator, "points": case.points, "traffic_bytes": case.traffic}
    row["errors"] = errors(case, ("reference", "triton") if gpu else ("reference",))
    row["equal"] = all(found["error"] <= found["limit"] for found in row["errors"].values())
    if row["equal"]:
        calls = {"eager": case.call("reference")}
        if gpu and case.points == COMPILED_POINTS:
            calls["compiled"] = case.call("reference", compiled(case.run))
        if gpu:
            calls["triton"] = case.call("triton")
        row |= timed(calls, device, seconds)
        if gpu:
            row["bandwidth"] = shares(case.traffic, row["times"], peak or {})
    return row


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What torch.compile makes of it; what it made before is forgotten, since it keeps only a few versions."""
    torch._dynamo.reset()
    return torch.compile(function)


def timed(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, Any]:
    """Times by version and way ("launched", on CUDA also "replayed"); what a version cannot do is said, not fatal."""
    times: dict[str, dict[str, Any]] = {name: {} for name in calls}
    cannot: dict[str, str] = {}
    for way in ("launched", "replayed") if device.type == "cuda" else ("launched",):
        why = {name: _obstacle(call, device, way == "replayed") for name, call in calls.items()}
        cannot |= {f"{name}, {way}": reason for name, reason in why.items() if reason}
        working = {name: call for name, call in calls.items() if not why[name]}
        replay = way == "replayed"
        for name, timing in measure(working, device, replay=replay, seconds=seconds, processor=alone()).items():
            times[name][way] = asdict(timing)
    return {"times": times, "cannot": cannot}


def alone() -> bool:
    """Whether CPU work runs on one thread, so that the processor's time is the time it takes on an idle machine."""
    return torch.get_num_threads() == 1


def _obstacle(call: Call, device: torch.device, replay: bool) -> str:
    """Why a call cannot be timed so, in one line; empty if it can."""
    try:
        measure({"": call}, device, replay=replay, seconds=0, fewest=1)
    except Exception as error:  # a compiler's or a capture's own: of any kind
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def shares(traffic: int, times: Mapping[str, Mapping[str, Any]], peak: Mapping[str, float | None]) -> dict[str, Any]:
    """Bytes a second of each version's fastest way, and its share of the data sheet's and of a large copy's."""
    found = {}
    for name, ways in times.items():
        if ways:
            rate = traffic / min(way["median"] for way in ways.values())
            found[name] = {"bytes_per_second": rate} | {
                f"of_{what}": rate / limit for what, limit in peak.items() if limit
            }
    return found


def against_loops(points: int, seconds: float, seed: int = 0) -> list[dict[str, Any]]:
    """Warp and mask of one picture on a CPU, loops and ours in turns; raises DDEngineError if the results differ."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 4, *LATENT, generator=generator)
    starts, ends = draw_points(points, generator), draw_points(points, generator)
    handles, moves = starts / 4, RATIO * (ends - starts) / 4

    def published_warp() -> Tensor:
        field = warpage_field(handles, moves, LATENT, handle_cell="lost", kernels="reference")
        return _published_warp("reference", latent, field)

    pairs: dict[str, tuple[float, dict[str, Callable[[], Tensor]]]] = {
        "warp": (
            0.0,
            {
                "loops": lambda: loop_form.warp(latent, handles, moves),
                "authors": published_warp,
                "default": lambda: _warp("reference", latent, _field("reference", handles, moves)),
            },
        ),
        "mask": (
            2e-6,  # float32 sums in another order
            {
                "loops": lambda: loop_form.mask(starts, ends, FEATURE, SIGMA),
                "authors": lambda: _cut_mask("reference", starts, ends),
                "default": lambda: _mask("reference", starts, ends),
            },
        ),
    }
    rows = []
    for operator, (tolerance, forms) in pairs.items():
        difference = float((forms["loops"]() - forms["authors"]()).abs().max())
        if not difference <= tolerance:
            raise DDEngineError(
                f"{operator} with {points} points: loops and ours differ by {difference:g}, at most {tolerance:g} is "
                "allowed; no time is given for unequal results"
            )
        times = measure(forms, seconds=seconds, processor=alone())
        rows.append(
            {
                "operator": operator,
                "points": points,
                "difference": difference,
                "times": {name: asdict(timing) for name, timing in times.items()},
                "ratio": {name: times["loops"].median / times[name].median for name in ("authors", "default")},
            }
        )
    return rows


def norm_silu(device: torch.device, peak: Mapping[str, float | None], seconds: float) -> list[dict[str, Any]]:
    """GroupNorm + SiLU in float16, as eager and compiled PyTorch run it, with and without the input's gradient."""
    rows = []
    for channels, side in NORMS:
        norm = torch.nn.GroupNorm(32, channels).to(device, torch.float16).requires_grad_(False)
        values = torch.randn(1, channels, side, side, device=device, dtype=torch.float16)

        def forward(_: str, values: Tensor, norm: torch.nn.GroupNorm = norm) -> Tensor:
            return F.silu(norm(values))

        for gradient in (None, torch.randn_like(values)):
            case = Case(
                "GroupNorm + SiLU", 0, (values,), forward, (2 if gradient is None else 5) * values.nbytes, gradient
            )
            calls = {"eager": case.call(""), "compiled": case.call("", compiled(forward))}
            row: dict[str, Any] = {
                "operator": case.operator + ("" if gradient is None else " and gradient"),
                "shape": list(values.shape),
            }
            row |= {"traffic_bytes": case.traffic, **timed(calls, device, seconds)}
            rows.append(row | {"bandwidth": shares(case.traffic, row["times"], peak)})
    return rows


def run(
    device: torch.device, output: Path, *, points: Sequence[int] = (), seconds: float = 1.0, progress: bool = False
) -> dict[str, Any]:
    """Measure everything that this device can show and write it to `output` as JSON.

    points: how many points, in place of the usual numbers. seconds: about how long each row is timed. Raises
    DDEngineError after writing if a version is not equal to the float64 reference (such a row has no times), and
    InputError for a device without a timer.
    """
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {device} cannot be timed; use 'cpu' or 'cuda'")
    if output.parent != Path():
        make_folder(output.parent)
    check_writable(output)
    gpu = device.type == "cuda"
    facts: dict[str, Any] = {"machine": machine(device), "device": str(device)}
    facts["size"] = {"latent": LATENT, "feature_grid": FEATURE, "channels": CHANNELS}
    peak = facts["machine"]["gpu"]["bandwidth"] if gpu else None
    work = cases(device, torch.float16 if gpu else torch.float32, points or POINTS)
    facts["operators"] = [measure_case(case, device, peak, seconds) for case in tqdm(work, disable=not progress)]
    if gpu:
        facts["norm_silu"] = norm_silu(device, peak or {}, seconds)
    else:
        facts["note"] = "a CPU: the eager reference alone is timed; kernels need a GPU"
        facts["loop_form"] = [row for n in points or LOOP_POINTS for row in against_loops(n, 10 * seconds)]
    atomic_write(output, (json.dumps(facts, indent=1) + "\n").encode())
    if unequal := [f"{row['operator']} ({row['points']} points)" for row in facts["operators"] if not row["equal"]]:
        raise DDEngineError(f"not equal to the float64 reference: {', '.join(unequal)}; {output} has the errors")
    return facts


def table(facts: Mapping[str, Any]) -> str:
    """The times as Markdown tables."""
    lines = [*filter(None, [facts.get("note")]), ""]
    lines += ["| operator | points | version | launched | replayed | bytes | of the limit |", "| --- " * 7 + "|"]
    for row in (*facts["operators"], *facts.get("norm_silu", [])):
        size = row.get("points") or " x ".join(map(str, row.get("shape", [])))
        for version, ways in row.get("times", {}).items():
            shown = [str(Timing(**ways[way])) if way in ways else "-" for way in ("launched", "replayed")]
            share = row.get("bandwidth", {}).get(version, {})
            limit = share.get("of_peak", share.get("of_copy"))
            shown += [f"{row['traffic_bytes'] / 1e6:.3g} MB", "-" if limit is None else f"{limit:.1%}"]
            lines.append(f"| {row['operator']} | {size} | {version} | {' | '.join(shown)} |")
        lines += [f"{row['operator']}: {what} cannot run: {why}" for what, why in row.get("cannot", {}).items()]
    if facts.get("loop_form"):
        lines += ["", ratios(facts["loop_form"])]
    return "\n".join(lines)


def ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    """The published loops against ours, as a Markdown table."""
    lines = ["| 512 x 512 | points | loops | same result, ours | ratio | default, ours | ratio |", "| --- " * 7 + "|"]
    for row in rows:
        loops, same, default = (readable(row["times"][name]["median"]) for name in ("loops", "authors", "default"))
        first, second = (f"{row['ratio'][name]:.3g}" for name in ("authors", "default"))
        lines.append(f"| {row['operator']} | {row['points']} | {loops} | {same} | {first} | {default} | {second} |")
    return "\n".join(lines)
