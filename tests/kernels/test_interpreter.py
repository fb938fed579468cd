"""Every Triton source, executed on the CPU: the Triton cases of this folder again, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from ddengine.kernels.dispatch import interpreted, triton

HERE = Path(__file__).resolve().parent


def version(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.skipif(interpreted(), reason="this is the interpreter's run")
@pytest.mark.skipif(
    triton is not None and version(triton) < (3, 7) and version(numpy) >= (2, 4),
    reason="the interpreter of Triton 3.6 cannot loop with NumPy 2.4: it takes int() of an array",
)
def test_the_triton_cases_pass_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen before kernels are defined. conftest.py picks the cases."""
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider", "--durations=9"]
    done = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20, done.stdout
