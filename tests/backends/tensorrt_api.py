"""Reads the interface of an installed TensorRT (either flavour) from the signatures its bindings carry.

`python tensorrt_api.py NAME=MODULE_OR_FILE ...` writes `tensorrt_api.json`: for every class and member that ddengine
uses, its signature in each of the named versions. The bindings of full TensorRT can be read without its libraries,
since they only import nine functions by name.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tensorrt_api.json")
# fmt: off
CLASSES = [
    "Builder", "BuilderFlag", "ComputeCapability", "DataType", "DynamicShapesKernelSpecializationStrategy",
    "EngineInspector", "EngineInvalidityDiagnostics", "EngineValidity", "ExecutionContextAllocationStrategy",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILogger", "ILogger.Severity", "INetworkDefinition",
    "IOptimizationProfile", "IProgressMonitor", "IRuntimeCache", "IRuntimeConfig", "ISerializationConfig", "ITensor",
    "ITimingCache", "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser",
    "OnnxParserRefitter", "ParserError", "ProfilingVerbosity", "Refitter", "Runtime", "SerializationFlag",
    "TensorIOMode", "TensorLocation", "Weights",
]
# fmt: on
ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "export" / "to_tensorrt.py", *sorted((ROOT / "ddengine" / "backends" / "tensorrt").glob("*.py"))]

_PREFIX = re.compile(r"\b(?:tensorrt\w*\.|nvinfer1::(?:v_1_0::)?|nvonnxparser::)+(?=[A-Z])")


def used_names() -> set[str]:
    """Every attribute that our sources read, set or override."""
    found = {"__init__"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)  # hasattr(module.Class, "name")
    return found


def read_api(module: Any, used: set[str]) -> dict[str, dict[str, Any]]:
    """Class -> member -> signature (overloads by newline) or "get type", "set type" of a property; "=": enum values."""
    found: dict[str, dict[str, Any]] = {}
    for name in CLASSES:
        kind = module
        for part in name.split("."):
            kind = getattr(kind, part, None)
        if kind is None:
            continue
        if hasattr(kind, "__members__"):
            found[name] = {"=": {label: int(value.value) for label, value in kind.__members__.items()}}
            continue
        members: dict[str, Any] = {}
        for base in reversed([base for base in kind.__mro__ if base.__module__.startswith("tensorrt")]):
            texts = {member: _signature(value) for member, value in vars(base).items() if member in used}
            members |= {member: text for member, text in texts.items() if text}
        found[name] = members
    return found


def _signature(value: Any) -> str:
    if isinstance(value, property):
        reads = re.search(r"-> (.*)", (value.fget and value.fget.__doc__) or "")
        writes = re.search(r", \w+: (.*)\) ->", (value.fset and value.fset.__doc__) or "")
        parts = [f"get {reads.group(1)}" if reads else "", f"set {writes.group(1)}" if writes else ""]
        return _PREFIX.sub("", "\n".join(part for part in parts if part))
    lines = [line for line in (getattr(value, "__doc__", None) or "").splitlines() if re.search(r"\w\(.*\) -> ", line)]
    return _PREFIX.sub("", "\n".join(re.sub(r"^\s*\d+\. ", "", line) for line in lines))


def load(where: str) -> Any:
    """A module by name, or the bindings' own file."""
    if not where.endswith(".so"):
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location("tensorrt", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> None:
    if arguments[0] == "--one":
        print(json.dumps(read_api(load(arguments[1]), used_names())))
        return
    names = [argument.partition("=")[0] for argument in arguments]
    table: dict[str, dict[str, list[Any]]] = {}
    for number, argument in enumerate(arguments):  # a process each: two versions of one library do not mix
        command = [sys.executable, __file__, "--one", argument.partition("=")[2]]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for kind, members in json.loads(answer).items():
            for member, text in members.items():
                rows = table.setdefault(kind, {}).setdefault(member, [])
                row = next((row for row in rows if row["is"] == text), None)
                if row is None:
                    rows.append(row := {"is": text, "in": []})
                row["in"].append(number)
    lines = [
        f' "{kind}": {{\n'
        + ",\n".join(f'  "{member}": {json.dumps(rows)}' for member, rows in members.items())
        + "\n }"
        for kind, members in table.items()
    ]
    TABLE.write_text(f'{{"versions": {json.dumps(names)},\n"classes": {{\n' + ",\n".join(lines) + "\n}}\n")
    json.loads(TABLE.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
