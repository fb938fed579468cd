"""What a request can be refused with, and how that is told: one code, one HTTP status, one sentence."""

from __future__ import annotations

import math
from typing import Any

from ddengine.serve.contract import STATUS, Failed


class Fault(Exception):
    """A request that is answered with an error; `code` is a key of STATUS."""

    def __init__(self, code: str, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_s = code, message, retry_s

    @property
    def status(self) -> int:
        return STATUS[self.code]

    @classmethod
    def of(cls, failed: Failed) -> Fault:
        """The same, of a job that failed."""
        return cls(failed.code if failed.code in STATUS else "internal", failed.message, failed.retry_s)

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON body; the Open Inference Protocol's paths have a string under "error"."""
        if path.startswith("/v2"):
            return {"error": self.message, "code": self.code}
        return {"error": {"code": self.code, "message": self.message}}

    def headers(self) -> dict[str, str]:
        """Retry-After where another try makes sense, and what a refused key has to know."""
        found = {}
        if self.retry_s is not None or self.status in (429, 503):
            found["Retry-After"] = str(max(1, math.ceil(self.retry_s or 5)))
        if self.status == 401:
            found["WWW-Authenticate"] = 'Bearer realm="ddengine"'
        return found
