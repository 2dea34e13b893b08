"""Knobs that differ from tensor to tensor: by pattern of the name, and as gradients over the layers.

    where = {"*.mlp.*": {"ties": {"density": 0.4}}, "*": {"scale": {"by": {"gradient": [0.5, 1.0]}}}}

The first pattern that fits a tensor and names the knob decides; what no pattern names is as the sentence says. A
gradient is interpolated linearly over the layers, whose number is the first number between dots in a tensor's name. It
may stand for one expert among others: ``{"average": {"weights": {"a": {"gradient": [0, 1]}, "b": 1}}}``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import SentenceError, did_you_mean
from .sentence import Sentence, check_truth, knobs_of, parse_words
from .weights.header import matches

LAYER = re.compile(r"^(.*?)(?<![^.])(\d+)(?=\.|$)")
Patterns = Mapping[str, Mapping[str, Mapping[str, Any]]]


class Where:
    """Patterns with their knobs, ready to be asked what a sentence says for one tensor."""

    def __init__(self, patterns: Patterns | None = None, names: Iterable[str] = ()):
        self.patterns = {pattern: dict(steps) for pattern, steps in (patterns or {}).items()}
        self.layers = layers_of(names) if self.patterns else {}

    def resolve(self, sentence: Sentence, name: str) -> Sentence:
        """Return ``sentence`` with the knobs it has for tensor ``name``."""
        if not self.patterns:
            return sentence
        told = [(pattern, steps) for pattern, steps in self.patterns.items() if matches(name, [pattern])]
        steps = []
        for step in sentence.steps:
            knobs = dict(step.knobs)
            for _, overrides in reversed(told):
                for knob, value in overrides.get(step.name, {}).items():
                    knobs[knob] = self.valued(value, name)
            steps.append(replace(step, knobs=knobs))
        return Sentence(tuple(steps))

    def valued(self, value: Any, name: str) -> Any:
        """Return a knob's value for tensor ``name``: gradients in it, one an expert for one, at their layer."""
        if is_gradient(value):
            return self.at_layer(value, name)
        if isinstance(value, Mapping):
            return {key: self.valued(one, name) for key, one in value.items()}
        return type(value)(self.valued(one, name) for one in value) if isinstance(value, list | tuple) else value

    def at_layer(self, value: Mapping[str, Sequence[float]], name: str) -> float:
        """Return a gradient's value at the layer of tensor ``name``. Raises SentenceError where it has none."""
        if name not in self.layers:
            raise SentenceError(
                f"a gradient is given for tensor '{name}', which lies in no numbered layer: give it a plain value with "
                f"a pattern of its own before the gradient's"
            )
        layer, count = self.layers[name]
        return interpolate(value["gradient"], layer / max(1, count - 1))

    def check(self, sentence: Sentence, names: Sequence[str]) -> None:
        """Raise SentenceError for a pattern that fits nothing, an unknown step or knob, or a gradient out of place."""
        by_name = {step.name: step for step in sentence.steps}
        for pattern, steps in self.patterns.items():
            fitting(pattern, names)
            for word, knobs in steps.items():
                if word not in by_name:
                    raise SentenceError(
                        f"where '{pattern}': '{sentence}' has no step '{word}'{did_you_mean(word, by_name)}"
                    )
                allowed = knobs_of(by_name[word].function)
                for knob, value in knobs.items():
                    if knob not in allowed:
                        raise SentenceError(
                            f"where '{pattern}': '{word}' has no knob '{knob}'{did_you_mean(knob, allowed)}; "
                            f"its knobs: {', '.join(allowed) or 'none'}"
                        )
                    for told in no_gradients(value):
                        raise SentenceError(
                            f"where '{pattern}': {word}.{knob}: a gradient is {{'gradient': [numbers]}}, got {told!r}"
                        )
                try:
                    check_truth(word, by_name[word].function, knobs)
                except SentenceError as error:
                    raise SentenceError(f"where '{pattern}': {error}") from None
        for name in names:
            self.resolve(sentence, name)


def for_sentence(patterns: Patterns, sentence: Sentence) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return what patterns say about the words of one sentence; a recipe's patterns speak to all its sentences."""
    words = {step.name for step in sentence.steps}
    told = {pattern: {w: k for w, k in steps.items() if w in words} for pattern, steps in patterns.items()}
    return {pattern: steps for pattern, steps in told.items() if steps}


def fitting(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names that a pattern fits. Raises SentenceError if there are none."""
    fits = [name for name in names if matches(name, [pattern])]
    if not fits:
        raise SentenceError(f"where '{pattern}': no tensor has such a name{did_you_mean(pattern, names)}")
    return fits


def read_where(
    lines: Iterable[str], patterns: dict[str, dict[str, dict[str, Any]]] | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Read ``"PATTERN: step(knob=value) | step(...)"`` lines, the command line's form of the patterns, into ``patterns``."""
    patterns = {} if patterns is None else patterns
    for line in lines:
        pattern, colon, words = line.partition(":")
        if not colon:
            raise SentenceError(f"where '{line}': write PATTERN: step(knob=value), such as \"*.mlp.*: scale(by=0.5)\"")
        told = parse_words(words)
        steps = patterns.setdefault(pattern.strip(), {})
        for step in told:
            steps.setdefault(step.name, {}).update(step.knobs)
    return patterns


def is_gradient(value: Any) -> bool:
    """Tell whether a knob's value is ``{"gradient": [numbers]}``."""
    return (
        isinstance(value, Mapping)
        and set(value) == {"gradient"}
        and isinstance(value["gradient"], list | tuple)
        and len(value["gradient"]) > 0
        and all(isinstance(x, (int, float)) for x in value["gradient"])
    )


def no_gradients(value: Any) -> Iterator[Any]:
    """Yield what is meant as a gradient in a knob's value and is none."""
    if isinstance(value, Mapping) and "gradient" in value:
        if not is_gradient(value):
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from no_gradients(one)


def interpolate(values: Sequence[float], t: float) -> float:
    """Return the value at ``t`` in [0, 1] of the polygon through ``values`` at equal distances."""
    place = t * (len(values) - 1)
    k = min(int(place), len(values) - 2) if len(values) > 1 else 0
    return values[k] if len(values) == 1 else (1 - (place - k)) * values[k] + (place - k) * values[k + 1]


def layers_of(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return layer and number of layers of every tensor whose name has a number between dots."""
    found = {name: (m[1], int(m[2])) for name in names if (m := LAYER.match(name))}
    counts: dict[str, int] = {}
    for prefix, layer in found.values():
        counts[prefix] = max(counts.get(prefix, 0), layer + 1)
    return {name: (layer, counts[prefix]) for name, (prefix, layer) in found.items()}
