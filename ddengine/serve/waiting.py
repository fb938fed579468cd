"""Waiting for so long and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def within(wanted: Awaitable[Any], seconds: float | None) -> Any:
    """asyncio.wait_for, which before Python 3.12 drops a cancellation that comes together with the result."""
    task = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()
