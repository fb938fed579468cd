"""Fixtures for tests of the service; `from serve_fakes import ...` gives them fakes.py."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from ddengine.serve.limits import Limits
from ddengine.serve.pictures import Intake

if "serve_fakes" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("serve_fakes", Path(__file__).with_name("fakes.py"))
    sys.modules["serve_fakes"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["serve_fakes"])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests that are coroutines run in an event loop of their own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), 120))
    return True


@pytest.fixture(scope="session")
def intake():
    """One decoding process for all applications."""
    found = Intake(Limits(decode_s=60.0, decoders=1))
    yield found
    found.close()
