"""The engine's errors.

EngineError
├── RequestRefused      the request can never be served; ``param`` names the field
├── StartRefused        the engine can't start with this model and configuration
├── DeadlinePassed      the request's time was over before it was done
├── EngineUnavailable   not started yet, loading, or being restarted
└── EngineDied          the process ended, or its socket closed, under an open request
"""

from __future__ import annotations


class EngineError(Exception):
    """Root of the tree; ``message`` is for the person who can act on it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestRefused(EngineError):
    """``param`` is the name of the field at fault, as the client knows it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class StartRefused(EngineError):
    pass


class DeadlinePassed(EngineError):
    pass


class EngineUnavailable(EngineError):
    """``loading``: it is on its way and will be there without anybody's help."""

    def __init__(self, message: str, *, loading: bool = False) -> None:
        super().__init__(message)
        self.loading = loading


class EngineDied(EngineError):
    pass
