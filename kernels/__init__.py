"""Operators of the drag step, one file each; installed as `ddengine.kernels`, never imported as bare `kernels`.

Light on purpose (no torch here). The version answers probes for the unrelated distribution called `kernels`
when the repository root happens to be on the path.
"""

__version__ = "0.0.0"
