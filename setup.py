"""Packaging of ddengine: an explicit package list, with the repository's top-level folders mapped below `ddengine`.

`kernels/`, `export/`, `bench/` and `examples/` stand at the top of the repository because people look for them there,
but they are installed below `ddengine` (`ddengine.kernels` and so on), so nothing of ours claims those bare names.
"""

from __future__ import annotations

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import OptionError

MAPPED = {
    "ddengine.kernels": "kernels",
    "ddengine.export": "export",
    "ddengine.bench": "bench",
    "ddengine.examples": "examples",
}
PACKAGES = [
    "ddengine",
    "ddengine.backends",
    "ddengine.backends.tensorrt",
    "ddengine.commands",
    "ddengine.directdrag",
    "ddengine.metrics",
    "ddengine.models",
    "ddengine.scenes",
    "ddengine.serve",
    "ddengine.training",
    "ddengine.ui",
    "ddengine.bench.evaluation",
    "ddengine.bench.peers",
    "ddengine.bench.peers.adapters",
    *MAPPED,
]


class EditableWheel(editable_wheel):
    """Refuse the compat mode, which puts the repository root on the path.

    There the mapped packages are missing, and bare `kernels` answers imports meant for another distribution.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        if (self.mode or "").lower() == "compat":
            raise OptionError("editable_mode=compat cannot map ddengine.kernels; use the default or the strict mode")


setup(
    packages=PACKAGES,
    package_dir=dict(MAPPED),
    package_data={
        "ddengine": ["py.typed"],
        "ddengine.models": ["embedded_weights/**/*.safetensors", "embedded_weights/**/*.json"],
        "ddengine.bench.evaluation": ["*.css", "*.js"],
        "ddengine.examples": [
            "*.png",
            "*.json",
            "serve/*.yaml",
            "triton/*.md",
            "triton/*/config.pbtxt",
            "triton/*/1/*.py",
        ],
        "ddengine.ui": ["*.css", "*.js"],
    },
    include_package_data=False,
    cmdclass={"editable_wheel": EditableWheel},
)
