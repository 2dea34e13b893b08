"""What adapting gains on the tasks themselves and in other domains, over several seeds of `merganser bench domains`.

    merganser bench domains --data VISION_TASKS --network conv --seeds 3 --to OUT
    python bench/domains.py OUT --out docs/results/conv-domains.json

One line a merger, scales chosen on the tasks' own validation splits: without -> with adapting, the gain with its 95 %
interval (paired, seeds averaged first), the gain of each seed; once on the tasks, once in the other domains.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merganser.evaluate.run import Scores, gained
from merganser.evaluate.table import Row, rows_in

Pairs = dict[str, list[tuple[Row, Row]]]


def merger(row: Row) -> str:
    """Return the merger of a row, without the scale that was chosen."""
    return re.sub(r" \| scale\(by=[\d.]+\)$", "", row.merging or row.sentence)


def pairs(folder: Path) -> Pairs:
    """Return the tuned rows without and with adapting of every seed, by merger."""
    found: Pairs = {}
    for run in sorted(folder.glob("seed-*")):
        tuned = [row for row in rows_in(run) if row.tuned]
        plain = {merger(row): row for row in tuned if not row.adapt}
        for row in (row for row in tuned if row.adapt):
            found.setdefault(merger(row), []).append((plain[merger(row)], row))
    return found


def told(of: list[tuple[Row, Row]], scores: Callable[[Row], Scores]) -> str:
    """Return without -> with, gain, interval and the gain of each seed, in points."""
    both = [(scores(a), scores(b)) for a, b in of]
    gain = gained(both)
    without, with_ = (sum(pair[k].mean for pair in both) / len(both) for k in (0, 1))
    each = ", ".join(f"{100 * one:+.1f}" for one in gain["each"])
    low, high = 100 * gain["low"], 100 * gain["high"]
    return f"{100 * without:.1f} -> {100 * with_:.1f}, {100 * gain['score']:+.1f} [{low:+.1f}, {high:+.1f}] ({each})"


def point(name: str, where: str, of: list[tuple[Row, Row]], scores: Callable[[Row], Scores]) -> dict[str, Any]:
    """Return the gain with its interval as a point of the figure."""
    gain = gained([(scores(a), scores(b)) for a, b in of])
    return {"label": f"{name}, {where}", "y": gain["score"], "low": gain["low"], "high": gain["high"]}


def domains(row: Row) -> Scores:
    """Return what a row scored in the other domains."""
    assert row.domains is not None, "a run of the domains suite"
    return row.domains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    found = pairs(asked.run)
    rows = [[f"`{name}`", told(of, lambda row: row.scores), told(of, domains)] for name, of in found.items()]
    seeds = len(next(iter(found.values())))
    head = ["merger", "on the tasks", "in other domains"]
    places = {"tasks": lambda row: row.scores, "other domains": domains}
    points = [point(name, where, of, scores) for name, of in found.items() for where, scores in places.items()]
    result = {"rows": rows, "head": head, "date": time.strftime("%Y-%m-%d"), "seeds": seeds}
    result |= {"points": points, "y": "gain of adapting, points"}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(" | ".join(row) for row in [head, *rows]))


if __name__ == "__main__":
    main()
