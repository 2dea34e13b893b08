"""RI then KnOTS, or KnOTS then RI: does the order matter? On the adapters of the language suite.

    python bench/knots_order.py --to FOLDER --as knots-order        writes docs/results/knots-order.json

ri first       every adapter's own factors B, A are trained; then all are written in their joint basis: `ri | knots | M`
knots first    the adapters are written in their joint basis, Delta_t = U X_t, and X_t alone is trained, U is shared and
               stays; M merges the trained X_t, and U M(X) is added to the base

Same inputs, steps, batches and seed. Scales are chosen on validation both times; a gain is paired, prompt by prompt.
The joint basis has the ranks' sum of directions, so knots first trains more numbers an expert, and gives no adapter
of the expert's rank. GPT-2's matrices lie [in, out]: their joint basis is one of inputs, as KnOTS takes them as they lie.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.adapt import adapt
from merganser.evaluate.table import Row, write_rows
from merganser.loop import merged_deltas
from merganser.models.causal import causal_lm
from merganser.models.device import home, there
from merganser.progress import bars
from merganser.sentence import parse
from merganser.steps.adapt import ri as module
from merganser.steps.align.knots import knots_factors
from merganser.steps.moving import Low, Moving
from merganser.suites import lm, lora_lm
from merganser.suites.cache import cache_folder
from merganser.suites.gpt import PLAN
from merganser.suites.skills import pairs
from merganser.weights.header import factors, shape_of
from merganser.weights.match import match
from merganser.weights.open import open_weights
from merganser.weights.stored import Stored

MERGERS = ("task_arithmetic", "ties", "dare(keep=0.2) | ties", "tsv", "iso_c")
LR = 0.0005


class InBasis(Moving):
    """``W + U X`` of each matrix, of which X alone is trained."""

    def __init__(self, low: dict[str, Low]):
        super().__init__({}, low)
        self.basis = {name: self.params.pop(f"{name}::B") for name in low}

    def weights(self, params: Any) -> dict[str, Tensor]:
        return {n: one.made(self.basis[n], params[f"{n}::A"]) for n, one in self.low.items()}


class Joint:
    """What `ri` trains of an expert, and what it returns: its coordinates in the joint basis."""

    def __init__(self, low: dict[str, Low], *_asked: Any):
        self.moving = InBasis(low)

    def result(self, best: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removesuffix("::A"): tensor for name, tensor in home(best).items()}


def aligned(base: Stored, experts: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return U of every matrix, and every expert's X."""
    bases: dict[str, Tensor] = {}
    coords: dict[str, dict[str, Tensor]] = {skill: {} for skill in experts}
    first = next(iter(experts.values()))
    for name in (n for n in base if factors(first, n) is not None):
        low = [tuple(factors(expert, name)) for expert in experts.values()]
        found = knots_factors(low, shape_of(base, name))
        assert found is not None, "an adapter changes matrices alone"
        x, restore = found
        bases[name] = restore(x[0])[0]
        for skill, part in zip(experts, x, strict=True):
            coords[skill][name] = part
    return bases, coords


def knots_first(model: Any, base: Stored, experts: Any, inputs: Any, tick: Any) -> Any:
    """Return a function from a merging sentence to the merged deltas, by coordinates that `ri` has trained."""
    bases, coords = aligned(base, experts)
    trained = {}
    for skill, expert in experts.items():
        low = {n: Low(base[n].float(), there(bases[n]), x) for n, x in coords[skill].items()}
        module.Ranked = partial(Joint, low)  # type: ignore[attr-defined, assignment, misc]
        with tick(f"ri {skill} in the joint basis", 300) as told:
            trained[skill] = module.ri(expert, base, {}, inputs, own=skill, encoder=model, lr=LR, _tick=told)
    nothing = {n: torch.zeros_like(x) for n, x in coords[next(iter(experts))].items()}

    def merged(merging: Any) -> dict[str, Tensor]:
        found = merged_deltas(nothing, trained, merging, list(nothing))
        return {name: bases[name] @ x for name, x in found.items()}

    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--as", dest="name", default="knots-order")
    told = parser.parse_args()
    lora_lm.bench(None, told.to, experts_only=True, progress=bars)
    base = Stored(cache_folder() / "lm" / f"base-{PLAN.steps}")
    steps = f"{PLAN.steps}-{lora_lm.TUNE.steps}-rank-{lora_lm.LORA.rank}"
    folders = {skill: open_weights(cache_folder() / "lm" / f"{skill}-{steps}") for skill in lm.NAMES}
    experts = match(base, folders).experts
    model = causal_lm(base.path)
    inputs = lm.prompts_of(model, experts, lm.SIZES)
    val, test = ({s: pairs(s, split, lm.SIZES[split]) for s in lm.NAMES} for split in ("val", "test"))
    how = {"encoder": model, "heads": {}, "inputs": inputs, "progress": bars}
    adapted = adapt(base, experts, how=f"ri(lr={LR})", into=told.to / "adapted" / f"ri-lr-{LR}", **how)
    after = knots_first(model, base, experts, inputs, bars)

    def before(which: Any, merging: Any) -> Any:
        return merged_deltas(base, which, parse(f"knots | {merging}"), list(base))

    lines = []
    for merger in MERGERS:
        ways = {"without ri": partial(before, experts), "ri first": partial(before, adapted), "knots first": after}
        rows: dict[str, Row] = {}
        for who, way in ways.items():
            rows[who] = lm.rows_of(model, base, way, parse(merger), val, test, bars)[-1][0]
            write_rows(told.to / "order" / f"{who} {merger}.json".replace(" | ", "-"), "", [rows[who]])
        gain = rows["knots first"].scores.compared(rows["ri first"].scores)
        span = f"{100 * gain['score']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
        lines.append(
            [f"`{merger}`", *(f"{100 * row.scores.mean:.1f} (scale {row.scale:g})" for row in rows.values()), span]
        )
        print(lines[-1], flush=True)
    head = ["merger", "knots alone", "ri, then knots", "knots, then ri", "the second order over the first, points"]
    result = Path(__file__).resolve().parents[1] / "docs" / "results" / f"{told.name}.json"
    result.write_text(json.dumps({"head": head, "rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
