"""TensorRT or TensorRT-RTX: which is installed, what it can do, and which suits a GPU.

Both have the same classes and calls but for a few; those few are the fields of `Flavour`, so that the code that
builds and runs engines reads the same for both. TensorRT times kernels on the GPU it builds for. TensorRT-RTX builds
without a GPU, in seconds, an engine whose kernels are compiled on the user's GPU when it is first run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ddengine.backends.gpu import Gpu
from ddengine.errors import BackendUnavailable, InputError

log = logging.getLogger(__name__)

CHOICE = "DDENGINE_TENSORRT"
NAMES = ("tensorrt", "tensorrt_rtx")
_PIP = {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"}
# Compute capabilities that the support matrix of TensorRT-RTX lists; on others it may run and nobody promises it.
_RTX_GPUS = (75, 86, 89, 120, 121)
_OLDEST = {"tensorrt": (10, 14), "tensorrt_rtx": (1, 7)}  # with every call made here, and CUDA 13


class Messages(Protocol):
    """The library's logger: writes into `logging`, and keeps the errors of the operation under way."""

    errors: deque[str]


@dataclass(frozen=True, eq=False)
class Flavour:
    """One of the two libraries, imported.

    trt: its module. timing_cache: builds remember how fast kernels ran (RTX ignores it). kernel_cache: kernels are
    compiled at the first run and can be kept. targets: compute capabilities an engine can be built for from
    elsewhere, "current" for the GPU at hand; empty where engines are always for the GPU at hand.
    """

    name: str
    version: str
    trt: Any = field(repr=False)
    logger: Any = field(repr=False)
    timing_cache: bool
    kernel_cache: bool
    targets: dict[int | str, Any] = field(repr=False)

    @contextmanager
    def listening(self) -> Iterator[deque[str]]:
        """The errors that the library reports within the block, for the message of what then goes wrong."""
        self.logger.errors.clear()
        yield self.logger.errors

    def suits(self, gpu: Gpu) -> bool:
        """Whether the library's makers list this GPU."""
        return self.name == "tensorrt" or gpu.sm in _RTX_GPUS


def flavour_of(module: Any) -> Flavour:
    """A `Flavour` over an imported `tensorrt` or `tensorrt_rtx`; `BackendUnavailable` for one that is too old."""
    name, version = module.__name__.rpartition(".")[2], str(module.__version__)
    oldest = _OLDEST[name]
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < oldest:
        wanted = ".".join(map(str, oldest))
        raise BackendUnavailable(f"{name} is {version}, {wanted} is the oldest that works; pip install -U {_PIP[name]}")
    capabilities = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
    targets: dict[int | str, Any] = {
        int(label[2:]): value for label, value in capabilities.items() if label.startswith("SM")
    }
    if "CURRENT" in capabilities:
        targets["current"] = capabilities["CURRENT"]
    return Flavour(
        name=name,
        version=version,
        trt=module,
        logger=_logger(module),
        timing_cache=name == "tensorrt",
        kernel_cache=hasattr(module.IRuntimeConfig, "create_runtime_cache"),
        targets=targets,
    )


def load_flavour(name: str = "auto", gpu: Gpu | None = None) -> Flavour:
    """The library by name, or with "auto" the one that suits the GPU (None: no GPU here, to build for another place).

    `BackendUnavailable` says what to install; InputError for an unknown name. "auto" takes TensorRT where it is
    installed and a GPU is at hand, since its engines are timed on that very GPU; else TensorRT-RTX, but not on a GPU
    that its makers do not list: there it has to be named. DDENGINE_TENSORRT in the environment names it for "auto".
    """
    name = os.environ.get(CHOICE, name) if name == "auto" else name
    if name != "auto":
        if name not in NAMES:
            raise InputError(f"TensorRT flavour {name!r} is unknown; use one of auto, {', '.join(NAMES)}")
        return _load(name)
    reasons = []
    for candidate in NAMES if gpu is not None else ("tensorrt_rtx",):
        try:
            flavour = _load(candidate)
        except BackendUnavailable as error:
            reasons.append(str(error))
            continue
        if gpu is None or flavour.suits(gpu):
            return flavour
        made_for = f"{candidate} {flavour.version} is not made for {gpu.name} (sm_{gpu.sm})"
        reasons.append(f"{made_for}; {CHOICE}={candidate} tries it all the same")
    raise BackendUnavailable("; ".join(reasons))


def installed() -> dict[str, str]:
    """For each library its version, or why it cannot be used; for `ddengine info`."""
    return {name: _state(name) for name in NAMES}


def _state(name: str) -> str:
    try:
        return _load(name).version
    except BackendUnavailable as error:
        return str(error)


@functools.cache
def _load(name: str) -> Flavour:
    """Once a process: the library allows one logger."""
    remedy = f"pip install {_PIP[name]}"
    try:
        if importlib.util.find_spec(name) is None:
            raise BackendUnavailable(f"{name} is not installed; {remedy}")
        return flavour_of(importlib.import_module(name))
    except (ImportError, OSError, AttributeError) as error:  # a wheel without its libraries has no classes
        raise BackendUnavailable(f"{name} is installed and cannot be imported ({error}); {remedy} again") from error


def _logger(trt: Any) -> Messages:
    severity = trt.ILogger.Severity if hasattr(trt.ILogger, "Severity") else trt.Logger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.INFO,  # of every build, and nothing a user could act on
        severity.INFO: logging.DEBUG,  # hundreds of lines a build
        severity.VERBOSE: logging.NOTSET,
    }
    lock = threading.Lock()  # builders report from several threads

    class Bridge(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level >= logging.ERROR:
                with lock:
                    self.errors.append(msg.strip())
                log.debug("%s", msg)  # it becomes part of the exception
            elif level > logging.NOTSET:
                log.log(level, "%s", msg)

    return Bridge()
