"""The compiled drag step against the plain one: same numbers, one compilation for all drags, buffers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddengine.backends import aot
from ddengine.backends.compiled import CompiledPasses
from ddengine.backends.eager import EagerPasses
from ddengine.config import DirectDragConfig
from ddengine.directdrag import unit as unit_module
from ddengine.directdrag.drag import PlainUnit, StepShape, Unit, drag, iterations, make_goal
from ddengine.directdrag.edit import edit
from ddengine.directdrag.packages import compile_packages
from ddengine.directdrag.prepare import prepare
from ddengine.directdrag.run import Run
from ddengine.directdrag.step import Goal, Rules, State, begin
from ddengine.directdrag.unit import CompiledUnit, unit_for
from ddengine.errors import BackendUnavailable, Cancelled
from ddengine.models.network import Observation
from ddengine.schedule import Schedule
from ddengine.store import ArtefactStore

CPU = torch.device("cpu")
SMALL = {"track_per_step": 2, "max_drag_per_track": 2, "r1": 2, "r2": 3, "d": 2, "reach": 1.0, "latent_lr": 0.05}
RULES = Rules(DirectDragConfig.preset("default", **SMALL), (32, 40), (8, 10))


class SmallNetwork(nn.Module):
    """What a drag step sees of a network, at a thousandth of its size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.noise = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)
        self.read = nn.Conv2d(12, 6, 1)
        self.register_buffer("time_table", torch.randn(1000, 12))
        self.dtype = torch.float32
        self.requires_grad_(False)

    def forward(self, latent: Tensor, timestep: Tensor, readout_hw: Any = None) -> Observation:
        feature = torch.tanh(self.enter(latent) + self.time_table[timestep][:, :, None, None])
        return Observation(self.noise(feature), feature, (self.read(feature),), ())


class SmallPasses(CompiledPasses):
    """The one pass that a drag step needs, and where its packages lie."""

    def __init__(self, network: nn.Module, store: ArtefactStore | None = None, capture: Any = None) -> None:
        self.network, self.store, self.capture, self.packaged = network, store, capture, capture is not None
        self.units, self.strict, self.building = {}, True, False
        self.remedy = lambda shape: f"build it for {shape.pairs}"

    def supervise(self, latent: Tensor, timestep: Tensor, readout_hw: Any = None) -> Observation:
        return self.network(latent, timestep, readout_hw)


def setting(network: nn.Module, pairs: int = 2, edits: int = 1, seed: int = 0) -> tuple[State, Goal, Tensor]:
    """A state that enters a drag step, its goal and first handles; the last pair of each edit is padding."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(edits, 4, 8, 10, generator=generator)
    handles = torch.rand(edits, pairs, 2, generator=generator) * 20 + 4
    targets = handles + 6 * torch.rand(edits, pairs, 2, generator=generator) - 3
    with torch.no_grad():
        seen = network(latent + 0.1, torch.tensor([741]))
    goal = make_goal(
        Schedule.from_config(),
        741,
        20,
        latent=latent,
        first_handles_yx=handles,
        targets_yx=targets,
        valid=torch.arange(pairs).expand(edits, -1) < max(pairs - 1, 1),
        features=list(seen.feature.split(1)),
        before=latent + 0.1,
        after=latent + 0.05,
        background=torch.rand(edits, 1, 8, 10, generator=generator).round(),
        appearance=list(seen.appearance[0].split(1)),
        rules=RULES,
        rounding=1e-6,
    )
    everyone = torch.ones(edits, dtype=torch.bool)
    return (
        begin(latent, handles, torch.zeros(edits, dtype=torch.int64), everyone, iterations(RULES.config)),
        goal,
        handles,
    )


def states(unit: Unit, state: State, goal: Goal) -> list[State]:
    """All states of a drag step, copied."""
    found = []
    for k in range(iterations(RULES.config)):
        state = unit.step(state, goal, k, 0, Run(CPU))
        found.append(State(*(tensor.clone() for tensor in state)))
    found.append(State(*(tensor.clone() for tensor in unit.look(state, goal, Run(CPU)))))
    return found


def close(found: Sequence[State], wanted: Sequence[State]) -> None:
    for one, other in zip(found, wanted, strict=True):
        for name, a, b in zip(State._fields, one, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) if a.is_floating_point() else torch.equal(a, b), name


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtefactStore:
    return ArtefactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def network() -> SmallNetwork:
    return SmallNetwork()


SHAPE = StepShape(1, 2, (8, 10), 12, (6, 8, 10), torch.float32)


def make_unit(network: nn.Module, store: ArtefactStore, capture: Any = None) -> CompiledUnit:
    made = CompiledUnit(SmallPasses(network, store, capture), RULES)
    assert not made.open(SHAPE, make=True)
    return made


@pytest.fixture(scope="module")
def unit(network: SmallNetwork, store: ArtefactStore) -> CompiledUnit:
    return make_unit(network, store)


def test_every_step_is_the_plain_one(network: SmallNetwork, unit: CompiledUnit) -> None:
    state, goal, _ = setting(network)
    wanted = states(PlainUnit(SmallPasses(network), RULES), state, goal)
    close(states(unit, state, goal), wanted)
    assert (wanted[-1].latent - state.latent).abs().max() > 0.05 and wanted[-1].updates.item() == 4


def test_nothing_is_compiled_again(
    network: SmallNetwork, unit: CompiledUnit, store: ArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other points, drags, masks, latents, times and weights of the same shapes, in a new engine too."""
    state, goal, _ = setting(network)
    unit.step(state, goal, 0, 0, Run(CPU))
    monkeypatch.setattr(aot, "_write", lambda *_: pytest.fail("compiled again"))
    other = SmallNetwork()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    fresh = make_unit(other, ArtefactStore(store.root))
    state, goal, _ = setting(other, seed=5)
    goal = goal._replace(timestep=torch.tensor([301]), background=1 - goal.background)
    close(states(fresh, state, goal), states(PlainUnit(SmallPasses(other), RULES), state, goal))


def test_replays_use_their_own_buffers(network: SmallNetwork, store: ArtefactStore) -> None:
    """Captured once, replayed on poisoned buffers: what is loaded decides, not what lay there."""
    captured: list[Callable[[], None]] = []

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        body()
        captured.append(body)
        return body

    graphed = make_unit(network, store, capture=capture)
    assert not graphed.reads
    for seed in (0, 1):
        state, goal, _ = setting(network, seed=seed)
        for replayed in graphed._replays.values():
            for buffer in (*replayed.state, *replayed.constants):
                buffer.fill_(float("nan") if buffer.is_floating_point() else 1)
        kept = [tensor.clone() for tensor in (*state, *goal)]
        close(states(graphed, state, goal), states(PlainUnit(SmallPasses(network), RULES), state, goal))
        assert all(torch.equal(a, b) for a, b in zip(kept, (*state, *goal), strict=True))
    assert len(captured) == 2  # the step and the look


def test_the_loop_ends_as_with_the_plain_unit(network: SmallNetwork, unit: CompiledUnit) -> None:
    """Handles that have arrived end it at once, and an edit that goes on does so whatever became of the other."""
    state, goal, handles = setting(network)
    near = goal._replace(targets_yx=handles + 0.1)
    run = Run(CPU)
    after = drag(unit, state, near, RULES, run, first_handles_yx=handles)
    assert after.finished.all() and torch.equal(after.latent, state.latent) and after.fresh.all()
    assert run.passes["drag"] == {"forward": 1, "backward": 1}


def test_the_same_bits_again_also_after_a_cancelled_step(network: SmallNetwork, unit: CompiledUnit) -> None:
    state, goal, handles = setting(network)
    first = states(unit, state, goal)

    def stop(at: State, done: int, total: int) -> None:
        if done == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        drag(unit, state, goal, RULES, Run(CPU), first_handles_yx=handles, report=stop)
    for one, other in zip(first, states(unit, state, goal), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_function_that_cannot_be_compiled_says_so(tmp_path: Path) -> None:
    def bad(weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        return [x if float(x.sum()) > 0 else weights[0]]

    with pytest.raises(BackendUnavailable, match=r"bad could not be compiled by TorchInductor.*backend='eager'"):
        aot.compiled("bad", bad, [torch.ones(2)], (torch.ones(2),), facts={}, store=ArtefactStore(tmp_path))
    assert not ArtefactStore(tmp_path).entries()


def test_nothing_is_compiled_unasked(network: SmallNetwork, store: ArtefactStore, tmp_path: Path) -> None:
    """What is built is used; what is not is an error of the named backend, and in `auto` a plain step that says why."""
    assert unit_for(SmallPasses(network, store), RULES, SHAPE).fixed
    passes = SmallPasses(network, ArtefactStore(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"no compiled drag step for 80 x 64 pixels.*2 points; build it for 2"):
        unit_for(passes, RULES, SHAPE)
    passes.strict = False
    unit = unit_for(passes, RULES, SHAPE)
    assert isinstance(unit, PlainUnit) and unit.name.startswith("eager (no compiled drag step")


def test_packages_of_a_size_are_compiled_ahead_of_time(
    make_tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shape that edits of one size have, once each; what they are called with is what was opened."""
    made: list[tuple[str, Any]] = []

    def stand_in(name: str, function: Any, weights: Any, example: Any, **_: Any) -> Any:
        made.append((name, example))
        return lambda given, *trees: function(given, *trees)

    monkeypatch.setattr(unit_module, "compiled", stand_in)
    passes = CompiledPasses(make_tiny_model(), store=ArtefactStore(tmp_path))
    config = DirectDragConfig.preset("default", n_inference_step=8, drag_end_step=1, **SMALL)
    told: list[tuple[str, int, int]] = []
    packages = compile_packages(passes, (64, 80), config, pairs=(1, 3, 4), report=lambda *at: told.append(at))
    assert [package.shape for package in packages] == ["1 x 1 points", "1 x 4 points"] and told[-1] == ("", 2, 2)
    assert [name for name, _ in made] == ["drag step", "drag look"] * 2
    made.clear()
    # An edit of three points opens nothing more, and its tensors have the shapes of the packages' examples.
    source = prepare(passes, torch.rand(1, 3, 64, 80) * 2 - 1, config)
    points = torch.tensor([[20.0, 12.0], [9.0, 9.0], [14.0, 25.0]])
    passes.building = True
    edited = edit(passes, source, points, points + 4, config)
    assert edited.unit.startswith("compile") and len(edited.history) == 4 and edited.handles_yx.shape == (3, 2)
    assert [name for name, _ in made] == ["drag step", "drag look"]  # a unit of its own, of the same shapes
    plain = edit(EagerPasses(passes.model), source, points, points + 4, config)
    assert edited.history[0].drag_loss == pytest.approx(plain.history[0].drag_loss, rel=1e-4)
