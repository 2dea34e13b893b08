"""Knobs that adapt steps share, checked before any work."""

from typing import Any

from .rank import check_rank, check_within
from .twins import DISTANCES

POSITIVE = ("steps", "batch", "lr", "temperature", "overlap", "top", "sharper", "by")
NOT_NEGATIVE = ("alpha", "sample", "pull", "guard", "micro", "blocks", "refresh")


def check_training(**knobs: Any) -> None:
    """Raise ValueError at a knob of training that is out of range; others are not looked at."""
    for name in POSITIVE:
        if name in knobs and not knobs[name] > 0:
            raise ValueError(f"{name} must be positive, got {knobs[name]}")
    for name in NOT_NEGATIVE:
        if knobs.get(name, 0) < 0:
            raise ValueError(f"{name} must not be negative, got {knobs[name]}")
    if knobs.get("distance", "kl") not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got '{knobs['distance']}'")
    check_rank(knobs.get("rank", "own"))
    check_within(knobs.get("within", 0), knobs.get("rank", "own"))
    if not 0 <= knobs.get("ramp", 0) <= 1:
        raise ValueError(f"ramp is a share of the steps, from 0 to 1, got {knobs['ramp']}")
    if not 0 <= knobs.get("held_out", 0) < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {knobs['held_out']}")
