"""Measurements of the product, installed as `ddengine.bench`: `python -m ddengine.bench.<name>`."""

__version__ = "0.0.0"
