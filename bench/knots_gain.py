"""What KnOTS and Core Space add to a merger: every merger of a run without and with them, paired example by example.

    python bench/knots_gain.py RUN --as lora-align         writes docs/results/lora-align.json

RUN is a finished folder of `merganser bench lora`, `lora-lm`, or any run with such pairs. Scales are those chosen on
validation. The gain is of the mean over tasks; joint is hits@1 in the union of all tasks' classes, where that was measured.
"""

import argparse
import json
from pathlib import Path

from merganser.evaluate.table import Row, rows_in

ALIGN = ("knots", "core")
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def pairs(rows: list[Row]) -> list[tuple[str, Row, Row]]:
    """Return (align, without, with) of all rows that differ in their align word alone, scales tuned both times."""
    plain = {(row.adapt, row.merging): row for row in rows if row.tuned}
    found = []
    for (adapt, merging), with_ in plain.items():
        align, _, rest = merging.partition(" | ")
        if align in ALIGN and (without := plain.get((adapt, rest))):
            found.append((align, without, with_))
    return sorted(found, key=lambda pair: (ALIGN.index(pair[0]), pair[1].adapt or ""))


def line(align: str, without: Row, with_: Row) -> list[str]:
    gain = with_.scores.compared(without.scores)
    hits = [row.scores.hits() for row in (without, with_)]
    told = [100 * h["1"]["macro"] for h in hits if h]
    return [
        f"`{align}`",
        f"`{without.merging}`",
        f"`{without.adapt}`" if without.adapt else "none",
        f"{100 * without.scores.mean:.1f} -> {100 * with_.scores.mean:.1f}",
        f"{100 * gain['score']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]",
        f"{told[0]:.1f} -> {told[1]:.1f}" if len(told) == 2 else "–",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--as", dest="name", required=True)
    told = parser.parse_args()
    rows = [line(*pair) for pair in pairs(rows_in(told.run))]
    head = ["align", "merger", "adapting", "without -> with", "gain, points [95 % interval]", "joint hits@1"]
    (RESULTS / f"{told.name}.json").write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
