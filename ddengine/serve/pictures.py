"""Pictures in and out of the service: hostile bytes to a checked `Picture`, and a `Picture` to a file's bytes."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any, BinaryIO

from PIL import Image

from ddengine.serve import decoder
from ddengine.serve.contract import Picture
from ddengine.serve.faults import Fault
from ddengine.serve.header import MAX_SCANS, format_of, scans_of, size_of
from ddengine.serve.limits import Limits

log = logging.getLogger(__name__)

_COMMAND = [sys.executable, "-m", decoder.__name__]
_START_S = 60.0  # that a decoding process may take to start, which is not part of decoding

# What a decoding process needs to start; keys and tokens stay here.
_ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "HOME",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
    "LANG",
)

MEDIA = {"image/png": "PNG", "image/webp": "WEBP", "image/jpeg": "JPEG"}


class Intake:
    """Decodes pictures in processes of their own, `limits.decoders` at once, each `limits.decode_s` at most."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.threads = ThreadPoolExecutor(limits.decoders, thread_name_prefix="ddengine-decode")
        self._idle: list[_Process] = []
        self._lock = threading.Lock()
        self._closed = False

    def read(self, data: bytes) -> Picture:
        """A file's bytes as a checked picture; `Fault` unsupported_media, too_large, invalid or unavailable. Blocks."""
        self.check(data)
        facts, pixels = self._decoded(data)
        if "error" in facts:
            raise Fault("invalid", str(facts["error"]))
        width, height = facts["size"]
        return Picture(width, height, pixels, base64.b64decode(facts["profile"]) or None)

    def warm(self) -> None:
        """Start a process before the first picture comes; does not wait for it."""
        with suppress(Fault):  # logged; the first picture tries again
            self._give(self._take())

    def check(self, data: bytes) -> None:
        """What the first bytes tell, before any decoder sees them."""
        kind = format_of(data)
        if kind is None:
            raise Fault("unsupported_media", "the picture is none of PNG, JPEG and WebP; convert it to one of them")
        size = size_of(data)
        if size is not None and size[0] * size[1] > self.limits.pixels:
            raise Fault(
                "too_large",
                f"the picture is {size[0]} x {size[1]} pixels, the limit is {self.limits.pixels}; scale it down",
            )
        if kind == "JPEG" and scans_of(data) > MAX_SCANS:
            raise Fault("invalid", f"the picture has more than {MAX_SCANS} scans; save it again")

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _decoded(self, data: bytes) -> tuple[dict[str, Any], bytes]:
        """What a decoder answers. One that ends may have done so for reasons of its own: another one is asked, once."""
        for last in (False, True):
            process = self._started() if last else self._take()
            try:
                process.await_start(_START_S)
            except (_Late, _Ended) as error:
                process.close()
                raise _not_started(error) from error
            try:
                answer = process.ask({"pixels": self.limits.pixels}, data, self.limits.decode_s)
            except _Late as error:
                process.close()
                raise Fault("invalid", f"the picture was not decoded within {self.limits.decode_s:g} s") from error
            except _Ended as error:
                process.close()
                if last:
                    raise Fault("invalid", "the picture cannot be decoded; save it again") from error
                continue
            self._give(process)
            return answer
        raise AssertionError("unreachable")

    def _take(self) -> _Process:
        """A decoder that waits for a picture, or a new one."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return self._started()
            if process.runs:
                return process
            process.close()

    def _started(self) -> _Process:
        try:
            return _Process(self.limits.pixels)
        except OSError as error:
            raise _not_started(error) from error

    def _give(self, process: _Process) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                return
        process.close()


class _Late(Exception):
    """It took too long, and the process was killed."""


class _Ended(Exception):
    """The process has ended, or does not make sense."""


def _not_started(error: Exception) -> Fault:
    log.error("no process to decode pictures can be started", exc_info=error)
    return Fault("unavailable", "no picture can be decoded just now; try again later", 5)


class _Process:
    def __init__(self, pixels: int) -> None:
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment = {**kept, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._waits = False
        self._process = subprocess.Popen(
            [*_COMMAND, str(pixels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def await_start(self, seconds: float) -> None:
        """Wait until it takes pictures; _Late, _Ended."""
        if not self._waits:
            with self._within(seconds) as (_, stdout):
                decoder.read(stdout)
            self._waits = True

    def ask(self, facts: dict[str, int], data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Its answer to a picture; _Late, _Ended."""
        with self._within(seconds) as (stdin, stdout):
            decoder.write(stdin, dict(facts), data)
            return decoder.read(stdout)

    @contextmanager
    def _within(self, seconds: float) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Its stdin and stdout, for so many seconds: then it is killed."""
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            yield self._pipes()
        except (EOFError, OSError, ValueError) as error:
            raise (_Late if killed.is_set() else _Ended)(f"exit code {self._process.poll()}") from error
        finally:
            timer.cancel()

    def close(self) -> None:
        self._process.kill()
        for pipe in self._pipes():
            with suppress(OSError):  # what was still to be written has no reader
                pipe.close()
        self._process.wait()

    def _pipes(self) -> tuple[BinaryIO, BinaryIO]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout  # type: ignore[return-value]


def to_pil(picture: Picture) -> Image.Image:
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    if picture.profile is not None:
        image.info["icc_profile"] = picture.profile
    return image


def from_pil(image: Image.Image) -> Picture:
    profile = image.info.get("icc_profile")
    return Picture(*image.size, image.tobytes(), profile if isinstance(profile, bytes) else None)


def encoded(picture: Picture, media: str) -> bytes:
    """A picture as a file of one of MEDIA: PNG and WebP without loss, JPEG at quality 95; with its colour profile."""
    file = BytesIO()
    options: dict[str, dict[str, object]] = {
        "image/png": {"compress_level": 4},
        "image/webp": {"lossless": True, "quality": 50, "method": 2},
        "image/jpeg": {"quality": 95, "subsampling": 0},
    }
    to_pil(picture).save(file, MEDIA[media], icc_profile=picture.profile, **options[media])
    return file.getvalue()


def decoded_png(png: bytes) -> Picture:
    """A PNG of our own as pixels again."""
    with Image.open(BytesIO(png), formats=("PNG",)) as image:
        return from_pil(image.convert("RGB"))


def transcoded(png: bytes, media: str) -> bytes:
    """A PNG of our own as another of MEDIA."""
    return encoded(decoded_png(png), media)
