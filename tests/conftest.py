"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"

# No deadline: machines that run tests are busy. The same examples each run: a red build can be run again.
settings.register_profile("ddengine", deadline=None, derandomize=True, database=None)
settings.load_profile("ddengine")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden tensors beside the checkout; tests that need it are skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data at {GOLDEN}")
    return GOLDEN
