"""Every Triton kernel becomes a binary for every architecture without a spill, on a machine without a GPU."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from ddengine.kernels import compilation
from ddengine.kernels.compilation import CAPABILITIES, SHARED_LIMIT, configurations

ROOT = Path(__file__).resolve().parents[2]
OTHER = "DDENGINE_OTHER_TRITON"  # a folder with another Triton than the installed one

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def compiler_environment(folder: str | None) -> dict[str, str]:
    """This environment without the interpreter, which cannot compile, and with another Triton first if given."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, environment.get("PYTHONPATH")]))
    return environment


def reports(capabilities: Sequence[int]) -> dict[str, dict]:
    """The compile report by the installed Triton and, where there is another, by that; both at once."""
    folders = {"installed": None, **({"other": os.environ[OTHER]} if os.environ.get(OTHER) else {})}
    command = [sys.executable, "-m", "ddengine", "bench", "kernels", "--compile", "--json"]
    command += [word for capability in capabilities for word in ("--sm", str(capability))]
    with tempfile.TemporaryDirectory() as out:
        running = {}
        for name, folder in folders.items():
            with (Path(out) / name).open("w") as file:
                running[name] = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=compiler_environment(folder), cwd=out
                )
        codes = {name: process.wait() for name, process in running.items()}
        texts = {name: (Path(out) / name).read_text() for name in folders}
    assert not any(codes.values()), texts
    return {name: json.loads(text) for name, text in texts.items()}


# An architecture takes about a quarter of a minute of one core by each Triton: the first in every run of the tests,
# the others as slow tests, which continuous integration runs too.
TARGETS = [(90,), pytest.param((80, 86, 89, 100), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TARGETS, ids=str)
def answers(request: pytest.FixtureRequest) -> dict[str, dict]:
    return {"targets": request.param, **reports(request.param)}


@pytest.fixture(params=["installed", "other"])
def answer(request: pytest.FixtureRequest, answers: dict[str, dict]) -> dict:
    if request.param not in answers:
        pytest.skip(f"no second Triton: ${OTHER} names no folder")
    return {"targets": answers["targets"], **answers[request.param]}


def test_every_configuration_compiles_and_none_spills(answer: dict) -> None:
    names = [(each["operator"], each["name"]) for each in answer["kernels"]]
    assert len(set(names)) == len(names), "two configurations of one operator share a name"
    assert names == [(operator, each.name) for operator, each in configurations()]
    for each in answer["kernels"]:
        for capability in answer["targets"]:
            registers, stack, shared = each[f"sm_{capability}"]
            assert stack == 0, (each, capability)
            assert shared <= SHARED_LIMIT[capability], (each, capability)
            assert 0 < registers * each["warps"] * 32 <= 65536, (each, capability)


def test_the_committed_report_is_what_comes_out(answer: dict) -> None:
    """bench/results/kernels-compile.json, and by it the documentation, is true of the kernels as they are."""
    stored = json.loads((ROOT / "bench" / "results" / "kernels-compile.json").read_text())
    if answer["triton"] not in stored:
        pytest.skip(f"no report by Triton {answer['triton']} is kept")
    others = {f"sm_{capability}" for capability in CAPABILITIES if capability not in answer["targets"]}
    kept = [{name: value for name, value in row.items() if name not in others} for row in stored[answer["triton"]]]
    assert kept == answer["kernels"], "run `python -m ddengine.bench.kernel_docs`"


def test_the_other_triton_is_another(answers: dict) -> None:
    if "other" not in answers:
        pytest.skip(f"no second Triton: ${OTHER} names no folder")
    assert answers["installed"]["triton"] != answers["other"]["triton"]


def test_every_kernel_of_every_operator_is_listed() -> None:
    """What carries `@jit` and is not called by another kernel is launched by somebody, and so must be compiled here."""
    listed: dict[str, set[str]] = {}
    for operator, each in configurations():
        listed.setdefault(operator, set()).add(each.kernel.__name__)
    assert listed, "no operator has a Triton kernel"
    written = {
        path.stem: [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list)
        ]
        for path in sorted((ROOT / "kernels").glob("*.py"))
    }
    called = {
        ast.unparse(node.func).rpartition(".")[2]
        for kernels in written.values()
        for kernel in kernels
        for node in ast.walk(kernel)
        if isinstance(node, ast.Call)
    }
    for name, kernels in written.items():
        assert {kernel.name for kernel in kernels} - called == listed.get(name, set()), name


SPILLING = """
import triton
import triton.language as tl
from ddengine.errors import InputError
from ddengine.kernels.compilation import Configuration, compile_for

@triton.jit
def kernel(source, goal, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    values = tl.load(source + index)
    tl.store(goal + index, values / tl.sum(values))

def report(size, **changes):
    arguments = {"signature": {"source": "*fp32", "goal": "*fp32"}, "constants": {"SIZE": size}} | changes
    return compile_for(Configuration("test", kernel, num_warps=1, **arguments), 90)

small, large = report(1024), report(16384)
print(small.stack, small.registers, large.stack > 0)
for changes in ({"signature": {"source": "*fp32"}}, {"constants": {"SIZE": 32, "OTHER": 1}}):
    try:
        report(32, **changes)
    except InputError as error:
        print(error)
"""


def test_a_spill_is_seen_and_wrong_arguments_are_refused(tmp_path: Path) -> None:
    """One thread cannot hold 512 numbers in 255 registers, and says so; the report can fail."""
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=compiler_environment(None), check=False
    )
    assert done.returncode == 0, done.stderr
    numbers, missing, unknown = done.stdout.splitlines()
    stack, registers, spilled = numbers.split()
    assert (stack, spilled) == ("0", "True") and 32 <= int(registers) < 255
    assert "goal" in missing and "OTHER" in unknown


def test_every_architecture_is_compiled_for_somewhere() -> None:
    marks = [getattr(each, "values", (each,))[0] for each in TARGETS]
    assert sorted(capability for group in marks for capability in group) == sorted(CAPABILITIES)


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    each = compilation.Configuration("test", kernel=lambda: None)
    with pytest.raises(compilation.BackendUnavailable, match="TRITON_INTERPRET"):
        compilation.compile_for(each, 90)
