"""What can go wrong, drawn as a tree.

    MerganserError              anything merganser itself reports: one line that says what, where and what to do
    ├── WeightsError            a checkpoint: missing, unsafe, other keys or shapes, not finite
    ├── SentenceError           a sentence: grammar, an unknown step or knob, a knob out of range
    ├── RecipeError             a recipe file: a key, a value or a path in it
    ├── DataError               tasks and inputs: missing, empty, of the wrong kind
    ├── HeadError               a head that does not fit the encoder, or the head an expert should have
    └── MissingExtra            an optional dependency that this verb needs

The command line prints the message in one line and exits with status 1; usage mistakes exit with 2.
"""

import difflib
from collections.abc import Iterable


class MerganserError(Exception):
    """Anything merganser itself reports; ``parts`` are the single faults where one message tells of several."""

    def __init__(self, message: str = "", parts: Iterable[str] = ()):
        super().__init__(message)
        self.parts = tuple(parts)


class WeightsError(MerganserError):
    """A checkpoint is missing, unsafe, of other keys or shapes, or not finite."""


class SentenceError(MerganserError):
    """A sentence breaks the grammar or names an unknown step or knob."""


class RecipeError(MerganserError):
    """A recipe file holds a key, value or path that cannot be used."""


class DataError(MerganserError):
    """Tasks or inputs are missing, empty or of the wrong kind."""


class HeadError(MerganserError):
    """A head is missing or does not fit the encoder."""


class MissingExtra(MerganserError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs the '{extra}' extra: pip install 'merganser[{extra}]'")


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ``word`` seems to be a slip of; None where none is near."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    close = closest(word, known)
    return f" (did you mean '{close}'?)" if close else ""


# what mergekit and PEFT call by one word
ELSEWHERE = {
    "linear": "average (or task_arithmetic)", "cat": "task_arithmetic", "svd": "task_arithmetic with --as-adapter",
    "dare_ties": "dare | ties", "dare_linear": "dare | task_arithmetic", "della_linear": "della | task_arithmetic",
    "breadcrumbs_ties": "breadcrumbs | ties", "ties_svd": "ties with --as-adapter",
    "magnitude_prune": "trim | task_arithmetic",
}  # fmt: skip


def meant(name: str) -> str:
    """Return `` (here: ...)``, what others call ``name``; an empty string where nobody does."""
    here = ELSEWHERE.get(name.lower().replace("-", "_"))
    return f" (here: {here})" if here else ""


def unknown_step(name: str, known: Iterable[str]) -> SentenceError:
    """Return the error for a step that there is not, with what it is here where others have a word of its own for it."""
    every = sorted(known)
    hint = meant(name) or did_you_mean(name.lower(), every)
    return SentenceError(f"unknown step '{name}'{hint}; known: {', '.join(every)}")
