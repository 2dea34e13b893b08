"""Parameters as mergekit resolves them: who says it first, for which tensors, and how it runs over the layers.

A parameter may be said for one model, one slice, a module or all; the first of these that has a value for the tensor
decides. A value is a number, a list of numbers (a gradient over the layers, interpolated linearly), or a list of
``{filter, value}``, of which the first whose filter is a part of the tensor's name counts, and none (or "*") fits all.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError, did_you_mean

Settings = Mapping[str, Any] | None
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
FILTER = {"filter", "value"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: what values it takes and whether each model has its own.

    ``each``   "all": one value; "model": one a model, the base too; "expert": one a model other than the base
    ``kind``   float, int or bool; ``low`` and ``high`` are allowed themselves, ``low`` not if ``beyond``
    """

    name: str
    default: Any = None
    each: str = "all"
    kind: type = float
    low: float = -math.inf
    high: float = math.inf
    beyond: bool = False
    required: bool = False
    used: bool = True

    def read(self, value: Any) -> Any:
        """Return one value as this parameter's kind. Raises ValueError: what it is and what it got."""
        if self.kind is bool:
            return self._flag(value)
        if value is None and self.default is None and not self.required:
            return None
        try:
            number = float(value)  # YAML reads 1e-4 as text
            if isinstance(value, bool) or not math.isfinite(number) or (self.kind is int and number != int(number)):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"must be a {'whole ' * (self.kind is int)}number, got {value!r}") from None
        if not self.low <= number <= self.high or (self.beyond and number == self.low):
            raise ValueError(f"must {self._span()}, got {value!r}")
        return int(number) if self.kind is int else number

    def _flag(self, value: Any) -> bool:
        if str(value).lower() not in (*YES, *NO):
            raise ValueError(f"must be true or false, got {value!r}")
        return str(value).lower() in YES

    def _span(self) -> str:
        if self.high == math.inf:
            return f"be {'more than' if self.beyond else 'at least'} {self.low:g}"
        return f"lie in {'(' if self.beyond else '['}{self.low:g}, {self.high:g}]"


def check(where: str, settings: Settings, parameters: Mapping[str, Parameter], method: str) -> Iterator[str]:
    """Yield what is wrong with the settings at one place of a config."""
    for name, setting in (settings or {}).items():
        if name not in parameters:
            known = f"; its parameters: {', '.join(parameters)}" if parameters else ", which has none"
            yield f"{where}: '{method}' has no parameter '{name}'{did_you_mean(name, parameters)}{known}"
            continue
        try:
            for value in values(setting):
                parameters[name].read(value)
        except ValueError as error:
            yield f"{where}.{name} {error}"


def values(setting: Any) -> Iterator[Any]:
    """Yield every value that a setting can have. Raises ValueError if it has another form."""
    for _, value in _cases(setting):
        items = value if isinstance(value, list) else [value]
        if not items or any(isinstance(item, list | dict) for item in items):
            raise ValueError(f"must be a value, a list of numbers, or a list of {{filter, value}}, got {value!r}")
        yield from items


def filters(setting: Any) -> list[str]:
    """Return the filters of a setting that can miss."""
    return [only for only, _ in _cases(setting) if only not in (None, "*")]


def _cases(setting: Any) -> Iterator[tuple[str | None, Any]]:
    cases = [setting] if isinstance(setting, dict) else setting
    if not isinstance(cases, list) or not any(isinstance(case, dict) for case in cases):
        yield None, setting
        return
    for case in cases:
        if not isinstance(case, dict) or "value" not in case:
            raise ValueError(f"must have a value in every entry of its list, got {case!r}")
        if unknown := sorted(case.keys() - FILTER):
            raise ValueError(f"has an unknown key '{unknown[0]}' in an entry; an entry is {{filter, value}}")
        if not isinstance(case.get("filter"), str | None):
            raise ValueError(f"needs text as a filter, got {case['filter']!r}")
        yield case.get("filter"), case["value"]


def resolve(parameter: Parameter, said: Iterable[Settings], tensor: str, t: float, whose: str = "") -> Any:
    """Return a parameter's value for ``tensor`` at place ``t`` in [0, 1] of the layers. Raises RecipeError if it has none."""
    for settings in said:
        if settings and parameter.name in settings:
            for only, value in _cases(settings[parameter.name]):
                if only in (None, "*") or (only is not None and only in tensor):
                    return _along(parameter, value, t)
    if parameter.required:
        of = f" of '{whose}'" if whose else ""
        raise RecipeError(f"no {parameter.name}{of} is given for tensor '{tensor}'")
    return parameter.default


def _along(parameter: Parameter, value: Any, t: float) -> Any:
    if not isinstance(value, list):
        return parameter.read(value)
    points = [parameter.read(one) for one in value]
    place = t * (len(points) - 1)
    k = int(place)
    if parameter.kind is bool or None in points:
        return points[k]
    mixed = (1 - (place - k)) * points[k] + (place - k) * points[min(k + 1, len(points) - 1)]
    return int(mixed) if parameter.kind is int else mixed
