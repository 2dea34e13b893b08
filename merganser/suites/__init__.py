"""Reproducible experiments on real tasks; each suite makes a recipe and hands it to `merganser.run`."""

from importlib import import_module
from typing import Any

OWN = ("text", "lora", "vision", "domains", "lm", "lora-lm")
PUBLISHED = ("clip-8", "clip-14", "clip-20", "domainnet")
SUITES = (*OWN, *PUBLISHED)
ON_THE_HUB = {"text": "text", "lora": "text", "vision": "vision"}  # whose data sets `hub.located` finds


def module_of(name: str) -> str:
    """Return the module that holds the suite ``name``."""
    return "clip" if name.startswith("clip-") else name.replace("-", "_")


def open_suite(name: str, **settings: Any) -> Any:
    """Return the suite ``name``: what has ``bench``, ``SUITE``, ``SENTENCES`` and ``PACKAGES``.

    ``settings`` are those of the published ones (network, family, models, inputs, rows, protocol), None: its default.
    Raises DataError for an unknown suite, or a setting that it does not have.
    """
    from ..errors import DataError, did_you_mean

    if name not in (*SUITES, "demo"):
        raise DataError(f"unknown suite '{name}'{did_you_mean(name, SUITES)}; known: {', '.join(SUITES)}")
    given = {key: value for key, value in settings.items() if value not in (None, [], ())}
    if name.startswith("clip-"):
        return import_module("merganser.suites.clip").suite(int(name.removeprefix("clip-")), **given)
    known = {"domainnet": ("models", "inputs", "rows"), "vision": ("network",), "domains": ("network",)}.get(name, ())
    if wrong := [key for key in given if key not in known]:
        raise DataError(f"suite '{name}' has no --{wrong[0]}: it is one of {', '.join(PUBLISHED)}")
    found = import_module(f"merganser.suites.{module_of(name)}")
    return found.suite(**given) if known else found
