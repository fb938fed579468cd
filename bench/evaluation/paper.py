"""The paper's own figures, beside which ours are shown; none of them was measured here."""

from __future__ import annotations

from collections.abc import Mapping

# DirectDrag's ablation on DragBench (its table, read from the authors' slides; Stable Diffusion 1.5 with a LoRA fitted
# to each picture): IF, CLIP, MD. Of the row without warp but with a prompt only the distance is stated.
PAPER: Mapping[str, Mapping[str, float]] = {
    "baseline": {"IF": 0.789, "CLIP": 0.963, "MD": 24.74},
    "+SM": {"IF": 0.895, "CLIP": 0.979, "MD": 31.35},
    "+SM+RG": {"IF": 0.918, "CLIP": 0.982, "MD": 33.75},
    "+SM+RG +prompt": {"MD": 31.91},
    "+SM+RG+LWF": {"IF": 0.891, "CLIP": 0.976, "MD": 29.65},
    "+SM+RG+LWF +prompt": {"IF": 0.891, "CLIP": 0.975, "MD": 29.18},
}
SOURCE = "DirectDrag's table on DragBench: Stable Diffusion 1.5, a LoRA fitted to each picture"


def stated(suite: str, row: str, figure: str) -> float | None:
    """What the paper states for a row's figure, None where it states nothing."""
    return PAPER.get(row, {}).get(figure) if suite == "dragbench" else None
