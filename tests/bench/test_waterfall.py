"""The published structure as a program: the same edit as the engine's, with the passes that are counted for it."""

from __future__ import annotations

import builtins
import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ddengine.backends.compiled import CompiledPasses
from ddengine.backends.eager import EagerPasses
from ddengine.bench import waterfall, waterfall_view
from ddengine.bench.account import Account
from ddengine.bench.counting import Cost
from ddengine.bench.engine_code import EngineCode
from ddengine.bench.published import SETTINGS, Outcome, PublishedCode, Update
from ddengine.bench.published_maps import between, cut
from ddengine.bench.savings import Published, Structure
from ddengine.bench.waterfall import Work, make_gate, settings, union
from ddengine.cli import main
from ddengine.config import DirectDragConfig
from ddengine.directdrag import unit as unit_module
from ddengine.errors import BackendUnavailable, InputError
from ddengine.kernels.sample_patches import sample_patches
from ddengine.models.load import Model, load_model
from ddengine.store import ArtefactStore

SHORT = {"n_inference_step": 4, "drag_end_step": 2, "track_per_step": 2, "max_drag_per_track": 2}
FULL = Structure(
    frozen=True, on_device=True, targets_once=True, native_readout=True, constant_cross=True, time_table=True
)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("embedded", device="cpu", dtype="float32")


def work(preset: str = "default", **changes: Any) -> Work:
    """A small picture and two drags on its feature grid of 32 x 32."""
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, 64),) * 2, indexing="ij")
    image = torch.stack([torch.sin(5 * rows), torch.cos(4 * columns), rows * columns])[None]
    handles, targets = torch.tensor([[12.0, 9.0], [24.0, 25.0]]), torch.tensor([[19.0, 17.0], [19.0, 19.0]])
    return Work(image, handles, targets, settings(DirectDragConfig.preset(preset, **{**SHORT, **changes})))


def ours(model: Model, given: Work, watch: Callable[[Update], None] | None = None) -> Outcome:
    return given.first(EngineCode(EagerPasses(model), kept=True), watch)


def near(found: torch.Tensor | None, wanted: torch.Tensor, tolerance: float = 2e-4) -> bool:
    return found is not None and torch.allclose(found, wanted, atol=tolerance)


def same_edit(found: Outcome, wanted: Outcome) -> None:
    assert torch.equal(found.handles_yx, wanted.handles_yx) and near(found.latent, wanted.latent)
    assert wanted.unedited is None or near(found.unedited, wanted.unedited)
    assert len(found.history) == len(wanted.history) > 0
    for one, other in zip(found.history, wanted.history, strict=True):
        for name in ("drag_loss", "background_loss", "readout_loss", "total_loss"):
            assert math.isclose(getattr(one, name), getattr(other, name), rel_tol=1e-3, abs_tol=1e-6), (one, other)
        assert (one.step, one.t, one.handles_yx, one.updated) == (other.step, other.t, other.handles_yx, other.updated)
    assert all(near(one, other, 1e-3) for one, other in zip(found.pictures, wanted.pictures, strict=True))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "authors": ("authors", {"amp_skip": 1, "rg_grid": 16, "ms_border": "clamp"}),
    "paper": ("paper", {"ms_border": "zero", "mutual_attention": False, "readout_guidance": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_structure_makes_the_same_edit(model: Model, variant: str) -> None:
    preset, changes = VARIANTS[variant]
    given = work(preset, **changes)
    wanted = ours(model, given)
    same_edit(given.first(PublishedCode(model)), wanted)
    same_edit(given.first(PublishedCode(model, FULL, kernels=True)), wanted)
    assert max(one.background_loss for one in wanted.history[1:]) > 0
    assert variant != "default" or wanted.history[0].background_loss > 1  # the warp moved something


def test_edits_that_stop_early_stop_alike(model: Model) -> None:
    """Arrived at the start of the second time, or given up for lack of movement."""
    for changes in ({"reach": 40.0}, {"reach": 0.0, "max_track_no_change": 1, "latent_lr": 0.0}):
        given = work()
        given = replace(given, config=given.config.changed(**changes))
        found, wanted = given.first(PublishedCode(model)), ours(model, given)
        assert torch.equal(found.handles_yx, wanted.handles_yx) and torch.allclose(
            found.latent, wanted.latent, atol=2e-4
        )
        assert [one.step for one in found.history] == [one.step for one in wanted.history]
        assert len(found.history) < given.updates
        assert found.calls["drag", "forward"] == wanted.calls["drag", "forward"]


class Uncosted(Published):
    """What bench/savings.py counts, without the costs of each pass."""

    def _walk(self, *_: Any, **__: Any) -> Cost:
        return Cost()

    def _read(self, *_: Any) -> tuple[Cost, ...]:
        return (Cost(),) * 4

    def backward(self, frozen: bool) -> Cost:
        return Cost()


def counted(model: Model, config: DirectDragConfig) -> Uncosted:
    def meta() -> Model:
        parts = {name: copy.deepcopy(getattr(model, name)) for name in ("unet", "vae", "readout")}
        moved = {name: torch.nn.Module.to(part, "meta") for name, part in parts.items()}
        return replace(model, **moved, empty_context=model.empty_context.to("meta"))

    account = Account(meta(), (64, 64), config)
    account.cost = lambda _: Cost()  # type: ignore[method-assign]
    found = Uncosted(account, meta())
    found._feature_values = lambda: 0  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("lag", [True, False])
def test_its_passes_are_those_that_are_counted(model: Model, lag: bool) -> None:
    given = work(track_lag=lag, preserve=not lag)
    expected = counted(model, given.config)
    looks = 0 if lag else given.config.drag_end_step
    for structure in (Structure(), FULL):
        found = given.first(PublishedCode(model, structure)).calls
        lines = expected.edit(replace(structure, tracks_updated=not lag, decodes_unedited=not lag))
        wanted = Counter({(line.stage, line.call): line.count for line in lines})
        wanted["drag", "readout"] -= looks  # tracking alone reads no appearance; the count is generous to that
        assert +found == +wanted, structure


def test_frozen_weights_get_no_gradient_and_others_add_theirs_up(model: Model) -> None:
    given = work(drag_end_step=1, track_per_step=1)
    weights = [*model.unet.parameters(), *model.readout.parameters()]
    one = model.unet.conv_in.weight
    assert given.first(PublishedCode(model, Structure(frozen=True))).gradients == 0
    assert all(weight.grad is None for weight in weights)

    seen: dict[str, list[torch.Tensor]] = {"kept": [], "cleared": []}

    def watch(cleared: bool) -> Callable[[Update], None]:
        def look(_: Update) -> None:
            seen["cleared" if cleared else "kept"].append(one.grad.clone())
            if cleared:
                one.grad = None

        return look

    code = PublishedCode(model)
    assert given.first(code, watch(cleared=True)).gradients >= len(weights) - 1
    assert given.first(code, watch(cleared=False)).gradients == len(weights)
    assert torch.allclose(seen["kept"][1], seen["cleared"][0] + seen["cleared"][1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(seen["kept"][1], seen["cleared"][1], rtol=1e-2)
    assert not any(weight.requires_grad for weight in weights)  # as it found them
    assert given.first(PublishedCode(model, Structure(frozen=True))).gradients == 0


def test_slices_of_the_enlarged_map_are_the_native_patches() -> None:
    """Inside, over a border and beyond a corner; on whole positions and between."""
    feature = torch.randn(1, 3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = torch.nn.functional.interpolate(feature, size=(24, 28), mode="bilinear")
    for border in ("clamp", "zero"):
        for centre in ([11.0, 13.0], [1.0, 26.0], [22.5, 0.25]):
            at = torch.tensor([centre], dtype=torch.float64)
            exact = sample_patches(feature, at, 4, (24, 28), border=border)
            assert torch.allclose(between(full, at[0], 4, border), exact, atol=1e-9), (border, centre)
            if centre[0].is_integer():
                assert torch.allclose(cut(full, at[0], 4, border), exact, atol=1e-9)


def test_settings_without_another_form_are_refused(model: Model) -> None:
    given = work()
    wrong = replace(given, config=given.config.changed(warp_fill="parallel", track_pad="clamp"))
    with pytest.raises(InputError, match="set warp_fill=sequential, track_pad=slice"):
        wrong.first(PublishedCode(model))
    for structure, kernels in ((Structure(shared_reference=True), False), (Structure(), True)):
        with pytest.raises(InputError, match="published structure is not run with"):
            PublishedCode(model, structure, kernels=kernels)
    config = settings(updates=12)
    assert (config.drag_end_step, config.track_per_step, config.max_drag_per_track) == (1, 4, 3)
    assert settings(updates=60).drag_end_step == 2 and settings().drag_end_step == 7
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS


def test_the_gate_lets_only_equal_code_pass(model: Model) -> None:
    given = work(drag_end_step=1)
    gate, seen = make_gate(model, given), list[Update]()
    given.first(PublishedCode(model), seen.append)
    found = gate.compare(seen)
    assert found.equal and found.updates == 4 and found.loss < 1e-5 and found.gradient < 1e-3
    assert not gate.compare([]).equal
    first, *rest = seen
    for spoiled in (
        replace(first, losses=(first.losses[0] * 1.01, *first.losses[1:])),
        replace(first, losses=(*first.losses[:3], math.nan)),
        replace(first, handles_yx=first.handles_yx + 1),
    ):
        assert not gate.compare([spoiled, *rest]).equal
    assert not gate.compare([replace(one, gradient=one.gradient * 1.1) for one in seen]).equal
    assert not gate.compare([replace(one, gradient=one.gradient * math.nan) for one in seen]).equal
    wrong: list[Update] = []
    replace(given, config=given.config.changed(lam=0.15)).first(PublishedCode(model), wrong.append)
    assert not gate.compare(wrong).equal


def test_replayed_packages_pass_the_gate(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bars of compiled code, with the functions themselves where packages would be."""

    def uncompiled(name: str, function: Any, weights: Any, example: Any, **_: Any) -> Any:
        return function

    monkeypatch.setattr(unit_module, "compiled", uncompiled)
    passes = CompiledPasses(
        model,
        store=ArtefactStore(tmp_path),
        building=True,
        capture=waterfall._run_as_it_is,
        compile=uncompiled,
    )
    passes.rounding = 0.0
    given, seen = work(drag_end_step=1), list[Update]()
    code = EngineCode(passes, kept=True, edits=2)
    outcome = given.first(code, seen.append)
    assert make_gate(model, given).compare(seen).equal
    again = given.next(code)
    assert torch.equal(again.latent, outcome.latent) and again.calls["drag", "backward"] == given.updates
    assert ("invert", "forward") in outcome.calls and ("invert", "forward") not in again.calls
    assert outcome.dragging > 0 and len(outcome.pictures) == 3


def test_the_bars_are_measured_in_turns_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waterfall, "make_work", lambda model, config: replace(work(), config=config))
    path, picture = tmp_path / "new" / "w.json", tmp_path / "w.svg"
    options = ["--steps", "1", "--rounds", "1", "--batch", "2", "--compile", "-o", str(path), "--json"]
    options += [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    monkeypatch.setattr(waterfall, "CompiledPasses", _unavailable)
    done = CliRunner().invoke(main, ["bench", "waterfall", "--device", "cpu", *options, *_plot(picture)])
    assert done.exit_code == 0, done.output
    facts = json.loads(path.read_text())
    assert facts == json.loads(done.stdout) and facts["updates"] == 2
    rows = {row["name"]: row for row in facts["bars"]}
    assert list(rows) == list(waterfall.DOCS)
    assert {name for name, row in rows.items() if "skipped" in row} == {"cast", "compile", "graph"}
    assert rows["compile"]["skipped"] == "no compiler; get one"
    for row in rows.values():
        if "skipped" not in row:
            assert row["gate"]["equal"] and row["first"]["samples"] == 1
            assert 0 < row["step"]["median"] < row["first"]["median"] and row["ratio"]["next"]["median"] > 0
    assert rows["published"]["ratio"]["first"]["median"] == 1 and rows["frozen"]["savings"] == ["frozen"]
    assert rows["published"]["next"] == rows["published"]["first"]
    assert rows["reference"]["next"]["median"] < rows["reference"]["first"]["median"]
    shown = waterfall_view.text(facts)
    assert (
        "| cast | the engine computes in float32" in shown and "| batch of 2, each |" in shown and "1 round;" in shown
    )
    assert picture.exists() == bool(_plot(picture))


def _plot(path: Path) -> list[str]:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    return ["--plot", str(path)]


def _unavailable(*_: Any, **__: Any) -> None:
    raise BackendUnavailable("no compiler; get one")


def test_unequal_code_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waterfall, "make_work", lambda model, config: replace(work(), config=config))
    right = waterfall.make_bars

    def bars(whole: Model, *given: Any, **options: Any) -> list[waterfall.Bar]:
        class Wrong(PublishedCode):
            def edit(self, image: Any, handles: Any, targets: Any, config: Any, **watch: Any) -> Outcome:
                return super().edit(image, handles, targets, config.changed(latent_lr=0.2, lam=0.3), **watch)

        first, *_ = right(whole, *given, **options)
        return [first, waterfall.Bar("frozen", Structure(frozen=True), Wrong(whole, Structure(frozen=True)))]

    monkeypatch.setattr(waterfall, "make_bars", bars)
    path = tmp_path / "w.json"
    options = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(
        main, ["bench", "waterfall", "--device", "cpu", "--steps", "1", "--rounds", "1", "-o", str(path), *options]
    )
    assert done.exit_code == 2 and "not equal to the eager engine: frozen" in done.stderr
    first, wrong = json.loads(path.read_text())["bars"]
    assert "first" in first and "first" not in wrong and not wrong["gate"]["equal"]
    assert "not equal, no time" in waterfall_view.table(json.loads(path.read_text()))


def test_a_plot_that_cannot_be_drawn_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waterfall, "run", None)
    refused = CliRunner().invoke(main, ["bench", "waterfall", "--plot", str(tmp_path / "w.gif")])
    assert refused.exit_code == 2 and ".png or .svg" in refused.stderr
    known = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return known(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match="pip install matplotlib"):
        waterfall_view.check_plot(tmp_path / "w.png")


def test_what_a_device_was_busy_with_counts_once() -> None:
    assert union([]) == 0 and union([(3, 5), (0, 2), (1, 2.5), (4, 4.5)]) == 4.5


def test_the_page_has_the_numbers_of_the_results() -> None:
    text = waterfall_view.PAGE.read_text(encoding="utf-8")
    shown = [(match[2], match[3]) for match in waterfall_view.TABLE.finditer(text)]
    assert {("times", "cpu"), ("conditions", "cpu"), ("bars", "cpu")} <= set(shown)
    assert waterfall_view.page(text) == text, "run `python -m ddengine.bench.waterfall_view`"
    stale = text.replace("| published | ", "| published | 9", 1)
    assert stale != text and waterfall_view.page(stale) == text
    for part in text.split("](")[1:]:
        path = part.partition(")")[0].partition("#")[0]
        assert not path or "://" in path or (waterfall_view.PAGE.parent / path).exists(), path
