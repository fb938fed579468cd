"""torch's process-wide settings while engines work or load: shared by those at work at once, then given back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()
_DRAWING = threading.RLock()
_here = threading.local()


class _AtWork:
    """How many engines are at work, and what the first of them found: the last one out puts it back.

    Each for itself would not do: of two that overlap, the later one would note the other's settings as the caller's.
    """

    engines = 0
    threads = 1
    cudnn = False, False


@contextmanager
def working(device: torch.device, *, one_thread: bool) -> Iterator[None]:
    """Gradients possible and cuDNN repeatable, whatever the caller has set and will find again.

    device: the engine's. one_thread: on a CPU compute on one thread. Random numbers are not touched: what needs some
    brings a generator of its own.
    """
    cudnn = torch.backends.cudnn
    with torch.inference_mode(False), torch.enable_grad():
        if getattr(_here, "working", False):  # an edit from within an edit's progress
            yield
            return
        with _LOCK:
            if not _AtWork.engines:
                _AtWork.threads, _AtWork.cudnn = torch.get_num_threads(), (cudnn.deterministic, cudnn.benchmark)
            _AtWork.engines += 1
            if device.type == "cuda":
                cudnn.deterministic, cudnn.benchmark = True, False
            # Set in any case: a thread begins with the number that an engine at work has last set in another.
            torch.set_num_threads(1 if one_thread and device.type == "cpu" else _AtWork.threads)
        _here.working = True
        try:
            yield
        finally:
            _here.working = False
            with _LOCK:
                _AtWork.engines -= 1
                torch.set_num_threads(_AtWork.threads)
                if not _AtWork.engines:
                    cudnn.deterministic, cudnn.benchmark = _AtWork.cudnn


@contextmanager
def drawing_weights(seed: int = 0) -> Iterator[None]:
    """For libraries that draw a network's first weights from torch's one generator on the CPU: seeded, then put back.

    One at a time in a process, so that none sees or restores another's numbers.
    """
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
