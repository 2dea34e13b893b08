"""RI then KnOTS, or KnOTS then RI: does the order matter? On the adapters of the LoRA suite.

    python bench/knots_order.py --data TEXT_TASKS --run RUN --to OUT --out docs/results/knots-order.json

ri first       every adapter's own factors B, A are trained; then all are written in their joint basis: `ri | knots | M`
knots first    the adapters are written in their joint basis, Delta_t = U X_t, and X_t alone is trained, U is shared and
               stays; M merges the trained X_t, and U M(X) is added to the base

RUN is a finished folder of `merganser bench lora`: it has the rows of the first order, and of `knots | M` alone. Same
inputs, steps, batches and seed; scales are chosen on validation; a gain is paired, example by example. The joint basis has
the ranks' sum of directions, so knots first trains more numbers an expert, and gives no adapter of the expert's rank.
"""

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merganser.deltas import merged_deltas
from merganser.evaluate.run import Model, Scores, evaluate
from merganser.evaluate.table import rows_in
from merganser.models.device import home, there
from merganser.models.targets import Targets
from merganser.prepare import Prepared, prepare
from merganser.progress import bars
from merganser.sentence import parse
from merganser.steps.adapt import ri as module
from merganser.steps.align.knots import knots_factors
from merganser.steps.moving import Low, Moving
from merganser.suites import lora
from merganser.suites.studies import words_of
from merganser.suites.suite import recipe_for
from merganser.sweep import merged_at, tried
from merganser.weights.header import factors, shape_of

MERGERS = ("ties", "tsv", "iso_c")
HOW = words_of(lora.SUITE)


class InBasis(Moving):
    """``W + U X`` of each matrix, of which X alone is trained."""

    def __init__(self, low: dict[str, Low]):
        super().__init__({}, low)
        self.basis = {name: self.params.pop(f"{name}::B") for name in low}

    def weights(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: one.made(self.basis[n], params[f"{n}::A"]) for n, one in self.low.items()}


class Joint:
    """What `ri` trains of an expert, and what it returns: its coordinates in the joint basis."""

    def __init__(self, low: dict[str, Low], *_asked: Any):
        self.moving = InBasis(low)

    def result(self, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removesuffix("::A"): tensor for name, tensor in home(best).items()}


def aligned(base: Any, experts: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return U of every matrix, and every expert's X."""
    bases: dict[str, Tensor] = {}
    coords: dict[str, dict[str, Tensor]] = {who: {} for who in experts}
    first = next(iter(experts.values()))
    for name in (n for n in base if factors(first, n) is not None):
        low = [(f.left, f.right) for expert in experts.values() if (f := factors(expert, name)) is not None]
        found = knots_factors(low, shape_of(base, name))
        assert found is not None, "these adapters change matrices alone"
        x, restore = found
        bases[name] = restore(x[0])[0]
        for who, part in zip(experts, x, strict=True):
            coords[who][name] = part
    return bases, coords


def knots_first(ready: Prepared, to: Path) -> Any:
    """Return a function from a merger to the merged deltas, by coordinates that `ri` has trained."""
    bases, coords = aligned(ready.base, ready.experts)
    targets = Targets(ready.encoder, ready.inputs, ready.kind)
    trained = {}
    for who, expert in ready.experts.items():
        file = to / f"{who}.safetensors"
        if not file.is_file():
            low = {n: Low(ready.base[n].float(), there(bases[n]), x) for n, x in coords[who].items()}
            module.Ranked = partial(Joint, low)  # type: ignore[assignment, misc]
            with bars(f"ri {who} in the joint basis", 300) as tick:
                found = module.ri(
                    expert, ready.base, ready.heads, ready.inputs, own=who, encoder=ready.encoder, **HOW.own,
                    _precision=ready.kind, _targets=targets, _tick=tick,
                )  # fmt: skip
            save_file({name: x.contiguous() for name, x in found.items()}, file)
        trained[who] = load_file(file)
    nothing = {n: torch.zeros_like(x) for n, x in next(iter(coords.values())).items()}

    def merged(merger: str) -> dict[str, Tensor]:
        found = merged_deltas(nothing, trained, parse(merger), list(nothing))
        return {name: bases[name] @ x for name, x in found.items()}

    return merged


def best(ready: Prepared, delta: dict[str, Tensor]) -> tuple[Scores, float]:
    """Return the test scores at the scale that is best on validation, and that scale."""

    def at(by: float) -> Model:
        return Model(ready.encoder, merged_at(ready, delta, by), ready.heads, ready.kind)

    points = tried(lambda by: evaluate(at(by), ready.val).mean, ready.recipe.scales)
    by = max(points, key=lambda p: p["val"])["scale"]
    return evaluate(at(by), ready.test), by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "run", "to", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    told = parser.parse_args()
    told.to.mkdir(parents=True, exist_ok=True)
    ready = prepare(recipe_for(lora.SUITE, told.data, ["ties"], progress=bars))
    rows = {(row.adapt, row.merging): row for row in rows_in(told.run) if row.tuned}
    merged = knots_first(ready, told.to)
    lines = []
    for merger in MERGERS:
        alone, first = rows[None, f"knots | {merger}"], rows[HOW(), f"knots | {merger}"]
        scores, by = best(ready, merged(merger))
        gain = scores.compared(first.scores)
        lines.append([
            f"`{merger}`", *(f"{100 * row.scores.mean:.1f} (scale {row.scale:g})" for row in (alone, first)),
            f"{100 * scores.mean:.1f} (scale {by:g})",
            f"{100 * gain['score']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]",
        ])  # fmt: skip
        print(lines[-1], flush=True)
        head = ["merger", "knots alone", "ri, then knots", "knots, then ri", "the second order over the first, points"]
        told.out.write_text(json.dumps({"head": head, "rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
