"""A function of tensors compiled ahead of time into a package that later processes load without compiling.

The gradient inside a function is traced into its graph (`make_fx`), the graph goes through TorchInductor into a native
package. Weights are inputs, not constants: a package holds code alone, serves every model of the same shapes (another
LoRA, another prompt), and shares the weights that the process already has in memory.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ddengine.errors import BackendUnavailable
from ddengine.store import ArtefactStore

log = logging.getLogger(__name__)

PACKAGE = "package.pt2"
_COMPILING = threading.Lock()  # Inductor's tracing state is a process's, not a thread's


class Compiled:
    """A loaded package, called with weights and trees of tensors of the forms that it was compiled for."""

    def __init__(self, path: Path, device: torch.device) -> None:
        index = device.index if device.index is not None else -1
        loader = torch._inductor.aoti_load_package(str(path), device_index=index).loader
        # The package's own call parses its tree's description, hundreds of weights long, again each time.
        self._run: Callable[[list[Tensor]], list[Tensor]] = getattr(loader, "boxed_run", loader.run)

    def __call__(self, weights: Sequence[Tensor], *trees: Any) -> list[Tensor]:
        return self._run([*weights, *(leaf.contiguous() for leaf in pytree.tree_leaves(trees))])


def compiled(
    name: str,
    function: Callable[..., Sequence[Tensor]],
    weights: Sequence[Tensor],
    example: tuple[Any, ...],
    *,
    facts: Mapping[str, Any],
    store: ArtefactStore,
    make: bool = True,
    waiting: Callable[[], object] | None = None,
) -> Compiled | None:
    """`function(weights, *example)` as a `Compiled`; from the store if it is there, else made, which takes minutes.

    function: of a list of weights and trees of tensors, to a flat sequence of tensors; all of the example's shapes.
    facts: everything else it was written for (settings, grids); the key adds shapes, strides, dtypes, the device, the
    versions of torch and Triton and this package's source. make=False gives None where nothing is stored. waiting: see
    `ArtefactStore.make`. Raises BackendUnavailable where it cannot be compiled, with the reason and the remedy.
    """
    leaves = pytree.tree_leaves(example)
    device = leaves[0].device
    known = {
        "function": name,
        "facts": dict(facts),
        "weights": _digest([_form(tensor) for tensor in weights]),
        "inputs": [_form(tensor) for tensor in leaves],
        "source": source_digest(),
        **environment_facts(device),
    }

    def write(folder: Path) -> dict[str, Any]:
        log.info("compiling %s for %s: this takes minutes, once", name, device)
        return _write(folder, name, function, weights, example)

    made = store.make("packages", known, write, waiting=waiting) if make else store.get("packages", known)
    if made is None:
        return None
    return Compiled(made.path(PACKAGE), device)


def environment_facts(device: torch.device) -> dict[str, Any]:
    """What a package depends on beside its own function: versions and the processor."""
    facts: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        facts |= {"triton": triton.__version__, "gpu": properties.name, "sm": f"{properties.major}{properties.minor}"}
        facts |= {"cuda": torch.version.cuda}
    else:
        facts["cpu"] = torch.backends.cpu.get_cpu_capability()
    return facts


@lru_cache(maxsize=1)
def source_digest() -> str:
    """SHA-256 over the Python files that a drag step can reach: an edited function is another function."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    roots = [package / name for name in ("backends", "directdrag", "models")]
    roots.append(Path(str(import_module("ddengine.kernels").__file__)).parent)
    files = [*package.glob("*.py"), *(path for root in roots for path in root.rglob("*.py"))]
    for path in sorted({path.resolve() for path in files}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _write(
    folder: Path,
    name: str,
    function: Callable[..., Sequence[Tensor]],
    weights: Sequence[Tensor],
    example: tuple[Any, ...],
) -> dict[str, Any]:
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments = [tensor.detach() for tensor in pytree.tree_leaves(example)]
    tree = pytree.tree_structure(example)

    def flat(*tensors: Tensor) -> list[Tensor]:
        given, rest = list(tensors[: len(weights)]), list(tensors[len(weights) :])
        return list(function(given, *pytree.tree_unflatten(rest, tree)))

    everything = (*(tensor.detach() for tensor in weights), *arguments)
    try:
        with _COMPILING, torch.enable_grad():
            graph = make_fx(flat)(*everything)
            for constant in [name for name, value in vars(graph).items() if isinstance(value, Tensor)]:
                graph.register_buffer(constant, graph.__dict__.pop(constant))
            program = torch.export.export(graph, everything, strict=False)
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / PACKAGE))
    except Exception as error:  # whatever a compiler may raise
        raise BackendUnavailable(
            f"{name} could not be compiled by TorchInductor ({type(error).__name__}: {str(error).splitlines()[0]}); "
            f"use backend='eager'"
        ) from error
    if Path(path) != folder / PACKAGE:
        shutil.move(path, folder / PACKAGE)
    return {"nodes": len(graph.graph.nodes)}


def _form(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), list(tensor.stride()), str(tensor.dtype)]


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()
