"""The rules of the house that a program can check: one-way imports, no bare names, nothing unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddengine

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {name: f"ddengine.{name}" for name in ("kernels", "export", "bench", "examples")}

# From the bottom to the top; a module may import its own layer and those below. A new module needs its place here.
LAYERS = [
    ["ddengine.errors"],
    [
        "ddengine.artifacts",
        "ddengine.config",
        "ddengine.drags",
        "ddengine.image",
        "ddengine.progress",
        "ddengine.schedule",
        "ddengine.examples",
        "ddengine.torch_state",
    ],
    [
        "ddengine.client",
        "ddengine.draw",
        "ddengine.kernels",
        "ddengine.recipe",
        "ddengine.request",
        "ddengine.scenes",
        "ddengine.store",
    ],
    ["ddengine.models"],
    # One layer: exporting reads the passes that backends run, and a backend that is asked to build calls the export.
    ["ddengine.backends", "ddengine.export"],
    ["ddengine.directdrag"],
    [
        "ddengine.source",
        "ddengine.source_header",
        "ddengine.source_reader",
        "ddengine.source_writer",
        "ddengine.memory_errors",
        "ddengine.result",
        "ddengine.engine",
        "ddengine.metrics",
        "ddengine.training",
    ],
    ["ddengine.demo", "ddengine.environment", "ddengine.serve", "ddengine.ui", "ddengine.bench"],
    ["ddengine.terminal", "ddengine.commands", "ddengine.cli", "ddengine.__main__"],
]
# Read by anyone who may read numbers and errors alone.
PLAIN = {
    "ddengine.config",
    "ddengine.drags",
    "ddengine.schedule",
    "ddengine.progress",
    "ddengine.image",
    "ddengine.artifacts",
}


def sources() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for folder, package in [("ddengine", "ddengine"), *MAPPED.items()]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "ddengine" and parts[0] in MAPPED:
                continue  # a link for editors
            if folder == "examples" and parts[0] == "triton":
                continue  # a file that another server runs
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = path
    return found


SOURCES = sources()


def imports(path: Path, module: str) -> set[str]:
    """Names of all modules a file imports, anywhere in it, those for type checkers included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            submodules = {f"{base}.{alias.name}" for alias in node.names} & SOURCES.keys()
            plain = {alias.name for alias in node.names} - {name.rpartition(".")[2] for name in submodules}
            found |= submodules | ({base} if plain - {"__version__"} or base != "ddengine" else set())
    return found


def layer(module: str) -> int:
    for height, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return height
    raise AssertionError(f"{module} has no layer: give it one in {Path(__file__).name}")


@pytest.mark.parametrize("module", sorted(SOURCES.keys() - {"ddengine"}))
def test_imports_go_one_way(module):
    ours = {name for name in imports(SOURCES[module], module) if name.partition(".")[0] == "ddengine"}
    if layer(module) >= layer("ddengine.demo"):
        ours.discard("ddengine")  # the top may use the public names
    assert "ddengine" not in ours, f"{module} imports the public names, which import everything"
    higher = {name for name in ours if layer(name) > layer(module)}
    assert not higher, f"{module} imports {higher} above it"
    if module in PLAIN:
        assert ours <= {"ddengine.errors"}


def test_the_layer_test_sees_a_forbidden_import(tmp_path):
    """The reader of imports finds each spelling, so that the test above can fail."""
    for text in (
        "import ddengine.engine",
        "from ddengine.engine import edit",
        "from ddengine import engine as e",
        "from . import engine",
        "from .engine import edit",
        "def f():\n    from ddengine.engine import edit",
    ):
        path = tmp_path / "drags.py"
        path.write_text(text)
        assert any(name.startswith("ddengine") and "engine" in name for name in imports(path, "ddengine.drags")), text
    path.write_text("from ddengine import __version__")
    assert imports(path, "ddengine.drags") == set()
    path.write_text("from ddengine import edit")
    assert imports(path, "ddengine.drags") == {"ddengine"}


def all_python() -> list[Path]:
    skipped = {".venv", "build", ".git", "dist"}
    return [path for path in sorted(ROOT.rglob("*.py")) if not skipped & set(path.relative_to(ROOT).parts)]


def test_mapped_folders_are_never_imported_bare():
    bare = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in all_python()
        for name in imports(path, "x")
        if name.partition(".")[0] in {*MAPPED, "tests"}
    }
    assert not bare


def test_nothing_unpickles_or_evaluates():
    found = []
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                safe = any(
                    keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
                )
                if called in {"eval", "exec", "__import__", "os.system"} or (called == "torch.load" and not safe):
                    found.append(f"{path}:{node.lineno}: {called}")
        found += [
            f"{path}: {name}"
            for name in imports(path, "x")
            if name in {"pickle", "dill", "joblib", "shelve", "marshal"}
        ]
    assert not found


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if name.startswith("ddengine.models.")))
def test_errors_about_models_say_what_to_do(module):
    """Messages read "what is wrong; what to do"."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = [str(part.value) for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
            known = ast.unparse(node.exc.func) in {"InputError", "ModelError"}
            assert not known or ";" in "".join(texts), f"{module}:{node.lineno} names no remedy"


def fresh(code: str) -> list[str]:
    """Run code in a new Python and return the words it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "tests")
    return done.stdout.split()


HEAVY = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'click', 'tqdm', 'safetensors'}"


def test_importing_the_package_is_light():
    """`import ddengine` brings in nothing heavy and few modules at all, and so takes well under a second."""
    count, *heavy = fresh(
        "import sys; before = set(sys.modules); import ddengine; after = set(sys.modules);"
        f"print(len(after - before), *({HEAVY} & after))"
    )
    assert heavy == []
    assert int(count) < 20


@pytest.mark.parametrize(
    "module", ["ddengine.kernels", "ddengine.export", "ddengine.bench", "ddengine.examples", "ddengine.models.embedded"]
)
def test_mapped_and_data_packages_are_light(module):
    assert fresh(f"import sys, {module}; print(*({HEAVY} & sys.modules.keys()))") == []


def test_the_command_line_and_bad_input_need_no_torch():
    heavy = "{'torch', 'diffusers', 'transformers'}"
    assert fresh(f"import sys, ddengine.cli; print(*({heavy} & sys.modules.keys()))") == []
    code = (
        "import sys; from ddengine.cli import main\n"
        "try: main(['edit', 'missing.png', '--drag', '1,2:3,4', '-o', 'out.png'])\n"
        f"except SystemExit as end: print(end.code, *({heavy} & sys.modules.keys()))"
    )
    assert fresh(code) == ["2"]


def test_public_names_are_listed_and_others_are_no_attributes():
    listed = set(ddengine.__all__)
    assert listed <= set(dir(ddengine))
    assert listed == set(ddengine._HOME) | {"__version__"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = ddengine.nothing
    from ddengine.drags import Drag

    assert ddengine.Drag is Drag


@pytest.mark.parametrize("name", [name for name in ddengine.__all__ if name != "__version__"])
def test_public_names_can_be_imported(name):
    assert getattr(ddengine, name).__name__ == name
