"""The comparison: every system in its process, edits in turns, one row each whatever becomes of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddengine.artifacts import atomic_write, check_writable, make_folder
from ddengine.bench.peers.child import Child, Failed
from ddengine.bench.peers.order import DEFAULT, Config, Order
from ddengine.bench.peers.rows import System, described, differences, revision
from ddengine.bench.timer import machine
from ddengine.errors import InputError

ADAPTERS = Path(__file__).with_name("adapters")
OURS = "ddengine"
READY = 900.0  # seconds to import libraries, and this engine's weights


def known() -> dict[str, Path]:
    """The adapters that come with the package, by name."""
    return {path.stem: path for path in sorted(ADAPTERS.glob("*.py")) if path.stem not in ("__init__", "ours")}


def make_systems(
    repos: Mapping[str, Path],
    *,
    adapters: Mapping[str, Path] | None = None,
    pythons: Mapping[str, Path] | None = None,
    configs: Sequence[Config] = (DEFAULT,),
) -> list[System]:
    """This engine, once for every configuration, and a peer for every checkout; InputError for what is not there.

    adapters: files for names that the package has none for, or in place of its own. pythons: interpreters by name;
    this one where none is given.
    """
    files = {**known(), **(adapters or {})}
    systems = [
        System(name, ADAPTERS / "ours.py", config=config)
        for name, config in zip(_names([config[0] for config in configs]), configs, strict=True)
    ]
    for name, checkout in repos.items():
        if name not in files:
            raise InputError(f"there is no adapter for {name!r}; name one of {', '.join(files)}, or give --adapter")
        if not files[name].is_file():
            raise InputError(f"adapter {files[name]}: not found; --adapter takes NAME=FILE.py")
        if not checkout.is_dir():
            raise InputError(f"checkout {checkout}: not a folder; clone {name} there first")
        systems.append(System(name, files[name].resolve(), interpreter((pythons or {}).get(name)), checkout))
    for name in (*(pythons or {}), *(adapters or {})):
        if name not in repos:
            raise InputError(f"{name!r} has no checkout: give --repo {name}=PATH too")
    return systems


def _names(presets: Sequence[str]) -> list[str]:
    """A name for every configuration of this engine: the first is plain, a preset that comes again is numbered."""
    names = [OURS]
    for number, preset in enumerate(presets[1:], 1):
        again = presets[1:number].count(preset)
        names.append(f"{OURS}-{preset}" + (f"-{again + 1}" if again else ""))
    return names


def interpreter(python: Path | None) -> Path:
    """A Python by path or by a name on PATH, this one for None; links are kept, since an environment is one."""
    if python is None:
        return Path(sys.executable)
    found = shutil.which(python)
    if found is None:
        raise InputError(f"Python {python}: not found; --python takes NAME=PATH of an interpreter")
    return Path(os.path.abspath(found))


def run(
    systems: Sequence[System],
    order: Order,
    output: Path,
    *,
    rounds: int = 3,
    warm_up: bool = True,
    timeout: float = 3600.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Edit in turns and write `output` (JSON, after every round) and, in a folder of its name beside it, the pictures.

    rounds: edits of each system that count, after one that does not (`warm_up`). timeout: seconds an edit or a
    training may take. A system that fails keeps what it measured and gets its error into its row.
    """
    if not output.suffix:
        raise InputError(f"output {output}: end its name in .json; the folder of its name is for the pictures")
    if order.device.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {order.device} cannot be timed; use 'cpu' or 'cuda'")
    folder = make_folder(output.with_suffix(""))
    check_writable(output)
    facts: dict[str, Any] = {
        "machine": machine(order.device),
        "device": order.device,
        "threads": order.threads,
        "model": order.model.name,
        "readout": order.readout and order.readout.name,
        "size": list(order.picture.size),
        "drags": [[*drag.handle, *drag.target] for drag in order.drags],
        "prompt": order.prompt,
        "mask": order.mask_from,
        "updates": order.updates and int(np.prod(order.updates)),
        "lora_steps": order.lora_steps,
        "rounds": rounds,
        "warm_up": warm_up,
    }
    order.picture.save(folder / "before.png")

    def note() -> dict[str, Any]:
        facts["systems"] = [described(system, systems[0]) for system in systems]
        facts["levels"] = differences(systems, folder)
        atomic_write(output, (json.dumps(facts, indent=1) + "\n").encode())
        return facts

    steps = len(systems) * (1 + rounds + warm_up)
    with running(systems, order, folder) as scratch, tqdm(total=steps, disable=not progress, desc="peers") as bar:
        for system in systems:
            attempt(system, partial(begin, system, order, scratch, folder, timeout))
            bar.update()
        note()
        for number in range(rounds + warm_up):
            counts = number >= warm_up
            for system in systems:
                if "error" not in system.row:
                    attempt(system, partial(turn, system, folder, timeout, counts))
                bar.update()
            note()
    return facts


@contextmanager
def running(systems: Sequence[System], order: Order, folder: Path) -> Iterator[Path]:
    """A folder for the processes to work in; at the end they are closed and it is removed."""
    scratch = Path(tempfile.mkdtemp(prefix="ddengine-peers-"))
    try:
        yield scratch
    finally:
        for system in systems:
            if system.child is not None:
                system.child.close()
        shutil.rmtree(scratch, ignore_errors=True)


def attempt(system: System, work: Callable[[], None]) -> None:
    """Do something with a system; what goes wrong is noted in its row, and it is closed."""
    try:
        work()
    except Failed as error:
        system.row["error"] = str(error)
        if system.child is not None:
            system.child.close()


def begin(system: System, order: Order, scratch: Path, folder: Path, timeout: float) -> None:
    """Start a system's process; where ordered and possible, train its LoRA, once."""
    job = order.write(scratch / system.name, checkout=system.checkout, config=system.config)
    system.row |= {} if system.checkout is None else {"source": revision(system.checkout)}
    log = folder / f"{system.name}.log"
    system.child = Child(system.python, system.adapter, job, log, order.threads, own=system.own)
    system.child.start()
    system.row |= system.child.ask("prepare", within=READY)
    if order.lora_steps is not None and system.row["can_train_lora"]:
        trained = system.child.ask("lora", within=timeout)
        system.row["lora"] = {"seconds": trained["seconds"], "steps": trained["counts"].get("updates")}


def turn(system: System, folder: Path, timeout: float, counts: bool) -> None:
    """One edit, and where a system has that, a further one of the same picture."""
    assert system.child is not None
    done = system.child.ask("edit", within=timeout, save=folder / f"{system.name}.png")
    for name in ("notes", "settings"):
        system.row[name] = done[name]
    if counts:
        system.samples.append(done)
    if system.row["can_edit_next"]:
        done = system.child.ask("next", within=timeout)
        if counts:
            system.nexts.append(done)
