"""merganser merges fine-tuned models without interference: adapt, merge, diagnose, evaluate, report.

The public names below are imported on first touch, so ``import merganser`` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapt import adapt as adapt
    from .check import check as check
    from .diagnose.interference import Diagnosis as Diagnosis
    from .diagnose.interference import diagnose as diagnose
    from .evaluate.run import Scores as Scores
    from .evaluate.run import evaluate as evaluate
    from .evaluate.task import Task as Task
    from .merge import merge as merge
    from .models.heads import Head as Head
    from .models.heads import Span as Span
    from .models.heads import class_mean_head as class_mean_head
    from .models.heads import linear_head as linear_head
    from .models.heads import zero_shot_head as zero_shot_head
    from .models.open import open_encoder as open_encoder
    from .models.statistics import reset_statistics as reset_statistics
    from .report.page import report as report
    from .run import run as run
    from .weights.open import open_weights as open_weights
    from .weights.parts import join as join
    from .weights.save import save as save

__version__ = "0.1.0"

_HOME = {
    "adapt": "adapt",
    "check": "check",
    "distil": "learn.distil",
    "Diagnosis": "diagnose.interference",
    "diagnose": "diagnose.interference",
    "Scores": "evaluate.run",
    "evaluate": "evaluate.run",
    "Task": "evaluate.task",
    "merge": "merge",
    "Head": "models.heads",
    "Span": "models.heads",
    "class_mean_head": "models.heads",
    "linear_head": "models.heads",
    "zero_shot_head": "models.heads",
    "open_encoder": "models.open",
    "reset_statistics": "models.statistics",
    "report": "report.page",
    "run": "run",
    "open_weights": "weights.open",
    "join": "weights.parts",
    "save": "weights.save",
}
__all__ = sorted(_HOME)


class _Door(ModuleType):
    """Keeps ``merganser.merge`` the function: importing the file of the same name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'merganser' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
