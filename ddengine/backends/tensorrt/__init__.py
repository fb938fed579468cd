"""TensorRT and TensorRT-RTX: two libraries with nearly one interface, run by the same code (`flavour.Flavour`).

Light on purpose: nothing is imported until an engine is built or run.
"""
