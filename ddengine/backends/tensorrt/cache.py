"""Engines in the store: what one is made from, for which machine it is, and how it is found or built.

An edit finds; only who asks for it builds. What is found was made from the same weights at the same sizes by the same
library for the same GPU, driver branch and CUDA version, or it is not found; TensorRT-RTX alone also makes engines for
any GPU, which are found everywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddengine.backends.gpu import Gpu
from ddengine.backends.tensorrt.flavour import Flavour
from ddengine.backends.tensorrt.refit import refit_plan
from ddengine.backends.tensorrt.session import Scratch, Session
from ddengine.errors import BackendUnavailable, DDEngineError, EngineMismatch, ModelError
from ddengine.progress import Progress
from ddengine.store import Artefact, ArtefactStore

if TYPE_CHECKING:
    from ddengine.export.quality_gate import GateResult
    from ddengine.export.to_tensorrt import BuildOptions, Profile

log = logging.getLogger(__name__)

PLAN = "engine.plan"


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is to do, whatever builds it and wherever.

    name: the pass. weights: digest of the model's weights with all that is fused into them (`Model.digest`, a LoRA's
    `model_digest`). sizes: shape of every input and output, -1 where it is open. precision: of the graph. graph: what
    else went into it (opset, exporter). profiles: for graphs whose sizes are open.
    """

    name: str
    weights: str
    sizes: Mapping[str, Sequence[int]]
    precision: str
    graph: Mapping[str, Any] = field(default_factory=dict)
    profiles: Sequence[Profile] = ()

    def facts(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "pass": self.name,
            "weights": self.weights,
            "sizes": {name: list(shape) for name, shape in self.sizes.items()},
            "precision": self.precision,
            "graph": dict(self.graph),
            "profiles": [
                {part: {name: list(shape) for name, shape in getattr(profile, part).items()} for part in _PARTS}
                for profile in self.profiles
            ],
        }


_PARTS = ("least", "best", "most")


class EngineCache:
    """The engines of one library for one GPU (None: for any, with TensorRT-RTX), in an `ArtefactStore`."""

    def __init__(self, store: ArtefactStore, flavour: Flavour, gpu: Gpu | None) -> None:
        self.store, self.flavour, self.gpu = store, flavour, gpu

    def find(self, request: EngineRequest) -> Artefact | None:
        """The engine for a request at definite sizes, None if it is not built.

        It is one for these sizes alone or one with a profile that has them in it; of those that differ in build options
        the most optimised one. `EngineMismatch` if it is built for other machines or versions alone, or damaged.
        """
        asked = _plain(request.facts())
        machines = self._machines()
        found: list[tuple[Any, dict[str, Any]]] = []
        problems, elsewhere = [], []
        for entry in self.store.entries():
            if entry.kind != "engines":
                continue
            if entry.problem:
                problems.append(entry.problem)
                continue
            made = _plain(entry.facts)
            alone = made["sizes"] == asked["sizes"]
            if not alone and _has_profile(entry.facts, request.sizes):
                made["sizes"] = asked["sizes"]
            if any(made[fact] != asked[fact] for fact in asked):
                continue
            machine = {fact: value for fact, value in made.items() if fact not in asked}
            if machine not in machines:
                elsewhere.append(_differences(machines[0], machine))
                continue
            options = entry.facts["options"]
            quality = (alone, options["optimization_level"], not options["refittable"])
            found.append(((-machines.index(machine), *quality, entry.key), entry.facts))
        if found:
            return self.store.get("engines", max(found, key=lambda pair: pair[0])[1])
        if elsewhere:
            raise EngineMismatch(
                f"the engine of {request.name} is for another machine: {min(elsewhere, key=len)}; build it here with "
                f"`ddengine build`"
            )
        if problems:
            raise EngineMismatch(problems[0])
        return None

    def load(self, request: EngineRequest, scratch: Scratch) -> Session | None:
        """The engine for a request, ready to run; its bytes are checked before they are used. As `find`."""
        artefact = self.find(request)
        if artefact is None:
            return None
        kernels = self._small("kernels", self._kernel_facts(artefact)) if self.flavour.kernel_cache else None
        return Session(artefact.read(PLAN), self.flavour, scratch, name=request.name, kernels=kernels)

    def keep_kernels(self, request: EngineRequest, session: Session) -> None:
        """Keep the kernels that TensorRT-RTX compiled for this GPU, so that the next process starts faster."""
        data, artefact = session.kernels(), self.find(request)
        if data and artefact:
            facts = self._kernel_facts(artefact)
            if data != self._small("kernels", facts):
                self._keep_small("kernels", facts, data)

    def build(
        self,
        request: EngineRequest,
        graph: Callable[[], Path],
        *,
        options: BuildOptions | None = None,
        fp8_gate: GateResult | None = None,
        replace: bool = False,
        progress: Callable[[Progress], object] | None = None,
    ) -> Artefact:
        """The engine for a request with these options, built now unless it is there; `graph` gives its ONNX file.

        A refittable one is made from an engine that differs in its weights alone, where there is one, by putting the
        new weights into it. Errors as `to_tensorrt.build_engine` and `ArtefactStore.make`.
        """
        from ddengine.export.to_tensorrt import BuildOptions, build_engine

        chosen = options or BuildOptions()
        facts = {**request.facts(), **self._machines()[0], "options": chosen.facts()}

        def write(folder: Path) -> dict[str, Any]:
            path = graph()
            refitted = self._refitted(facts, path) if chosen.refittable and not replace else None
            if refitted is not None:
                (folder / PLAN).write_bytes(refitted[0])
                return refitted[1]
            built = build_engine(
                path,
                flavour=self.flavour,
                precision=request.precision,
                profiles=request.profiles,
                options=chosen,
                timing_cache=self._small("timing", self._timing_facts()) if self.flavour.timing_cache else None,
                fp8_gate=fp8_gate,
                has_gpu=self.gpu is not None,
                progress=progress,
            )
            (folder / PLAN).write_bytes(built.plan)
            if built.timing_cache:
                self._keep_small("timing", self._timing_facts(), built.timing_cache)
            return built.facts.as_json()

        def waiting() -> None:
            if progress is not None:
                progress(Progress("build", 0, 1))

        return self.store.make("engines", facts, write, replace=replace, waiting=waiting)

    def _refitted(self, facts: Mapping[str, Any], path: Path) -> tuple[bytes, dict[str, Any]] | None:
        """An engine of other weights with the graph's put in, and what is known of it; None where that does not go."""
        for entry in self.store.entries():
            if entry.kind == "engines" and not entry.problem and {**entry.facts, "weights": facts["weights"]} == facts:
                try:
                    artefact = self.store.get("engines", entry.facts)
                    assert artefact is not None
                    started = time.monotonic()
                    plan = refit_plan(artefact.read(PLAN), self.flavour, onnx_path=path)
                except (BackendUnavailable, EngineMismatch, ModelError) as error:
                    log.info("%s is not refitted: %s", entry.key, error)
                    continue
                seconds = round(time.monotonic() - started, 3)
                return plan, {**artefact.about, "refitted_from": entry.key, "seconds": seconds, "plan_bytes": len(plan)}
        return None

    def _machines(self) -> list[dict[str, Any]]:
        """Where an engine may be for, the best first."""
        library = {"flavour": self.flavour.name, "version": self.flavour.version}
        anywhere = {**library, "gpu": "any", "sm": 0, "driver": "", "cuda": ""}
        if self.gpu is None:
            return [anywhere]
        here = {
            **library,
            "gpu": self.gpu.name,
            "sm": self.gpu.sm,
            "driver": self.gpu.driver_major,
            "cuda": self.gpu.cuda,
        }
        return [here, anywhere] if self.flavour.name == "tensorrt_rtx" else [here]

    def _kernel_facts(self, artefact: Artefact) -> dict[str, Any]:
        return {"engine": artefact.key, **self._machines()[0]}

    def _timing_facts(self) -> dict[str, Any]:
        return self._machines()[0]

    def _small(self, kind: str, facts: dict[str, Any]) -> bytes | None:
        """A file that only saves time: one that is not sound is left alone."""
        try:
            artefact = self.store.get(kind, facts)
            return artefact.read("data") if artefact else None
        except EngineMismatch as error:
            log.info("%s", error)
            return None

    def _keep_small(self, kind: str, facts: dict[str, Any], data: bytes) -> None:
        def write(folder: Path) -> None:
            (folder / "data").write_bytes(data)

        try:
            self.store.make(kind, facts, write, replace=True)
        except DDEngineError as error:
            log.info("not kept: %s", error)


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that must be equal; profiles and options are chosen among."""
    return {key: value for key, value in facts.items() if key not in ("options", "profiles")}


def _has_profile(facts: Mapping[str, Any], wanted: Mapping[str, Sequence[int]]) -> bool:
    """Whether an engine's open sizes take these."""
    built = facts["sizes"]
    if built.keys() != wanted.keys():
        return False
    for name, shape in wanted.items():
        if len(shape) != len(built[name]) or any(b not in (-1, s) for b, s in zip(built[name], shape, strict=True)):
            return False
    return any(
        all(
            low <= side <= high
            for name, least in profile["least"].items()
            for low, side, high in zip(least, wanted[name], profile["most"][name], strict=True)
        )
        for profile in facts["profiles"]
    )


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    parts = [
        f"{key} is {_short(found.get(key))}, not {_short(wanted[key])}"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    return "; ".join(parts)


def _short(value: Any) -> str:
    text = str(value) or "none"
    return text if len(text) <= 40 else text[:37] + "..."
