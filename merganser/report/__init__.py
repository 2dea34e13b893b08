"""One offline HTML page about one or more runs: what was gained, and why."""

from .page import report

__all__ = ["report"]
