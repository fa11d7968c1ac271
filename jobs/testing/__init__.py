"""The test kit: `from beatless.testing import Kit`. Its fixtures are those of `pytest_beatless`."""

from beatless.testing.kit import Kit

__all__ = ["Kit"]
