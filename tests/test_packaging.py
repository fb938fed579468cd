"""The wheel holds what an edit needs, under our name alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ddengine

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["ddengine", "kernels", "export", "bench", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE"]


def build(tree: Path, hook: str, *, mode: str = "None") -> subprocess.CompletedProcess[str]:
    """Call the build backend as pip would, without an environment of its own (no network)."""
    code = f"from setuptools import build_meta as b; print(b.{hook}('out', {mode}))"
    return subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources: builds write into their folder."""
    tree = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns(
                "__pycache__", *(["kernels", "export", "bench", "examples"] if part == "ddengine" else [])
            )
            shutil.copytree(ROOT / part, tree / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tree / part)
    (tree / "out").mkdir()
    return tree


@pytest.fixture(scope="module")
def wheel(tree) -> list[str]:
    done = build(tree, "build_wheel")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "out").glob("*.whl")
    assert path.name == f"ddengine-{ddengine.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_claims_one_top_level_name(wheel):
    tops = {name.partition("/")[0] for name in wheel}
    assert tops == {"ddengine", f"ddengine-{ddengine.__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_no_tests(wheel):
    names = set(wheel)
    for folder, package in (
        ("ddengine", "ddengine"),
        *((part, f"ddengine/{part}") for part in ("kernels", "export", "bench", "examples")),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder)
            if folder == "ddengine" and parts.parts[0] in {"kernels", "export", "bench", "examples"}:
                continue
            assert f"{package}/{parts.as_posix()}" in names
    assert not [name for name in wheel if "test" in name or name.endswith((".pyc", ".pt", ".ckpt"))]


def test_the_wheel_holds_the_data(wheel):
    names = set(wheel)
    assert "ddengine/py.typed" in names
    for folder, package, suffixes in (
        ("ddengine/models/embedded_weights", "ddengine/models/embedded_weights", {".safetensors", ".json"}),
        ("examples", "ddengine/examples", {".png", ".json"}),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_compat_mode_of_editable_installs_is_refused(tree):
    done = build(tree, "build_editable", mode="{'editable_mode': 'compat'}")
    assert done.returncode != 0
    assert "cannot map ddengine.kernels" in done.stderr


def test_every_package_is_listed():
    """A folder with modules that setup.py forgets would be missing from the wheel only."""
    listed = (ROOT / "setup.py").read_text(encoding="utf-8")
    for path in (ROOT / "ddengine").rglob("__init__.py"):
        parts = path.parent.relative_to(ROOT).parts
        if not {"kernels", "export", "bench", "examples"} & set(parts):
            assert f'"{".".join(parts)}"' in listed
