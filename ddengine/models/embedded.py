"""Where the weights carried inside the package lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ddengine.errors import ModelError


def embedded_folder() -> Path:
    """The embedded model's folder, in a layout `load_model` reads anywhere; `ModelError` if not installed."""
    folder = Path(str(resources.files("ddengine.models"))) / "embedded_weights"
    if not (folder / "model.json").is_file():
        raise ModelError(
            f"{folder}: the embedded model's weights are not in this installation; reinstall ddengine from a "
            f"wheel or a complete checkout, train them with `ddengine train-embedded`, or name another model"
        )
    return folder
