"""Every error the library raises on purpose; each message holds the value, the limit and the remedy."""

from __future__ import annotations


class DDEngineError(Exception):
    """Base of all errors raised on purpose by ddengine."""


class InputError(DDEngineError, ValueError):
    """The picture, a point, the mask or the configuration cannot be used."""


class ModelError(DDEngineError):
    """Weights are missing, have another shape, or come in a format that is not safe to read."""


class BackendUnavailable(DDEngineError):
    """The backend that was asked for cannot run on this machine."""


class EngineMismatch(DDEngineError):
    """A cached engine was built for another GPU, library version or set of weights."""


class Cancelled(DDEngineError):
    """Raise it inside a progress callback to stop an edit; it is passed on to the caller."""
