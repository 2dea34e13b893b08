"""The language suite: a small causal model of our own, experts of four skills, merged with and without adapting.

Everything is made here, nothing is downloaded. A task's score is the share of test prompts whose whole answer greedy
decoding gives. RI sees prompts, what each expert itself answers to its own, and English; no right answers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..adapt import adapt, how_text, slug
from ..card import write_json
from ..deltas import applied, merged_deltas
from ..errors import DataError
from ..evaluate.language import answered, divergence
from ..evaluate.run import Outcome, Scores
from ..evaluate.table import Row, overall_gain, table, write_rows
from ..models.causal import CausalLM, causal_lm
from ..models.inputs import Prompts
from ..progress import Progress, silent
from ..sentence import Sentence, parse
from ..sweep import is_tuned, split_scale, tried
from ..weights.match import match
from ..weights.open import open_weights
from ..weights.stored import Stored
from .cache import cache_folder
from .finetune import Lora
from .gpt import PLAN, TUNE, write_base, write_expert
from .skills import SKILLS, Pairs, pairs, passages
from .suite import with_and_without

MERGERS = ("average", "task_arithmetic | scale(by=0.3)", "ties", "tsv", "iso_c")
SENTENCES = with_and_without(MERGERS, "ri(lr=0.0005)")
PACKAGES = {"transformers": "hf"}
NAMES = tuple(SKILLS)
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0)
SIZES = {"train": 4000, "val": 200, "test": 600, "prompts": 1500, "english": 3000, "xi": 200}


def bench(
    data: str | Path | None,
    to: str | Path,
    *,
    how: Sequence[str] | None = None,
    seeds: int = 1,
    experts_only: bool = False,
    sizes: Mapping[str, int] = SIZES,
    plans: Sequence[Any] = (PLAN, TUNE),
    name: str = "lm",
    written: Sequence[str] = SENTENCES,
    lora: Lora | None = None,
    progress: Progress = silent,
) -> Path:
    """Make base and experts (once), merge them by every sentence, and return the report (or the experts' folder).

    ``name`` and ``written``: the suite's, and the sentences where ``how`` has none. With ``lora`` experts are adapters.
    Raises DataError if data is given: the suite makes its own.
    """
    from ..report.page import report

    if data is not None:
        raise DataError(f"suite '{name}' makes its own data: leave out --data")
    sentences = [parse(text) for text in how or written]
    cache = cache_folder() / "lm"
    base = write_base(cache / f"base-{plans[0].steps}", plan=plans[0], progress=progress)
    told = f"{plans[0].steps}-{plans[1].steps}" + (f"-rank-{lora.rank}" if lora else "")
    folders = {
        skill: write_expert(
            cache / f"{skill}-{told}", base, skill, pairs(skill, "train", sizes["train"]),
            plan=plans[1], lora=lora, progress=progress,
        )
        for skill in NAMES
    }  # fmt: skip
    if experts_only:
        return cache
    model = causal_lm(base)
    experts = match(Stored(base), {skill: open_weights(folder) for skill, folder in folders.items()}).experts
    places = [Path(to)] if seeds == 1 else [Path(to) / f"seed-{seed}" for seed in range(seeds)]
    inputs = prompts_of(model, experts, sizes)
    for seed, place in enumerate(places):
        _run(name, model, Stored(base), experts, inputs, sentences, place, seed, sizes, progress)
    return report(places[0]) if seeds == 1 else report(*places, to=Path(to) / "report.html")


def prompts_of(model: CausalLM, experts: Mapping[str, Mapping[str, Tensor]], sizes: Mapping[str, int]) -> Prompts:
    """Return RI's inputs: prompts of every skill with its expert's own answers, and English."""
    own = {}
    for skill, weights in experts.items():
        asked = [prompt for prompt, _ in pairs(skill, "train", sizes["prompts"], seed=1)]
        own[skill] = model.continued(weights, asked, most=12)
    return model.prepare(own, passages()[: sizes["english"]])


def _run(
    name: str,
    model: CausalLM,
    base: Stored,
    experts: Mapping[str, Mapping[str, Tensor]],
    inputs: Prompts,
    sentences: Sequence[Sentence],
    folder: Path,
    seed: int,
    sizes: Mapping[str, int],
    progress: Progress,
) -> None:
    started = time.monotonic()
    val, test = ({s: pairs(s, split, sizes[split]) for s in NAMES} for split in ("val", "test"))
    by_how: dict[str, Mapping[str, Mapping[str, Tensor]]] = {"": experts}
    for sentence in sentences:
        if (words := how_text(sentence.adapt)) not in by_how:
            by_how[words] = adapt(
                base, experts, encoder=model, heads={}, inputs=inputs, how=words, seed=seed,
                into=folder / "adapted" / slug(words), progress=progress,
            )  # fmt: skip
    told = Scores({s: scored(model, experts[s], {s: test[s]})[s] for s in NAMES})
    away = _distance(model, experts, sizes)
    rows: list[Row] = []
    xi: dict[str, float] = {}
    for sentence in sentences:
        models = by_how[how_text(sentence.adapt)]

        def merged(merging: Sentence, models: Mapping[str, Mapping[str, Tensor]] = models) -> Mapping[str, Tensor]:
            return merged_deltas(base, models, merging, list(base), seed=seed)

        found = rows_of(model, base, merged, sentence, val, test, progress)
        write_rows(folder / "rows" / f"{slug(str(sentence))}.json", "", [row for row, _ in found])
        rows += [row for row, _ in found]
        xi |= {row.sentence: away(weights) for row, weights in found}
    results = table(scored(model, base, test), told, rows, xi)
    overall = {name: overall_gain(rows, tuned) for name, tuned in (("tuned", True), ("default", False))}
    tasks = [{"name": s, "test": sizes["test"], "metric": "exact match"} for s in NAMES]
    title = f"{name} suite: {len(NAMES)} skills, a causal transformer of {sum(t.numel() for t in base.values()) / 1e6:.1f} M"
    told_all = {"version": 1, "title": title, "date": time.strftime("%Y-%m-%d"), "seed": seed,
                "command": f"merganser bench {name}", "tasks": tasks, **results, "overall": overall}  # fmt: skip
    write_json(folder / "scores.json", told_all)
    write_json(folder / "run.json", {"version": 1, "seconds": round(time.monotonic() - started, 3), "stages": []})


def rows_of(
    model: CausalLM,
    base: Stored,
    merged: Callable[[Sentence], Mapping[str, Tensor]],
    sentence: Sentence,
    val: Mapping[str, Pairs],
    test: Mapping[str, Pairs],
    progress: Progress,
) -> list[tuple[Row, Mapping[str, Tensor]]]:
    """Return a row, and its model, for a sentence as written and with the scale that answers most of validation.

    ``merged`` gives the merged deltas for a sentence's merging part, its last scale left off.
    """
    started = time.monotonic()
    scaled = split_scale(sentence)
    delta = merged(scaled.sentence.merging)

    def at(by: float) -> dict[str, Tensor]:
        return {n: applied(t, by * delta[n]) if n in delta else t for n, t in base.items()}

    scales = SCALES if is_tuned(sentence) else ()
    with progress(f"score {sentence}", len(scales) + 1) as tick:

        def on_val(by: float) -> float:
            tick(1)
            return scored(model, at(by), val).mean

        points = tried(on_val, scales)
        tick(len(scales) - len(points))
        best = max(points, key=lambda p: p["val"]) if points else None
        wanted = [
            (str(sentence), scaled.written, None),
            *([] if best is None else [(None, best["scale"], best["val"])]),
        ]
        made = [(text or str(scaled.at(by)), by, top, at(by)) for text, by, top in wanted]
        outcomes = [scored(model, weights, test) for *_, weights in made]
        tick(1)
    seconds = round(time.monotonic() - started, 3)
    common: dict[str, Any] = {
        "merging": str(scaled.sentence.merging),
        "adapt": " | ".join(map(str, sentence.adapt)) or None,
    }
    return [
        (Row(text, scores, scale=by, tuned=top is not None, val=top, points=points if top is not None else [],
             seconds=seconds, **common), weights)
        for (text, by, top, weights), scores in zip(made, outcomes, strict=True)
    ]  # fmt: skip


def scored(model: CausalLM, weights: Mapping[str, Tensor], asked: Mapping[str, Pairs]) -> Scores:
    """Return the share of whole answers for every skill; the confidence is the answer's mean probability a token."""
    found = {}
    for skill, some in asked.items():
        said = answered(model, weights, some)
        found[skill] = Outcome(np.ones(len(some), np.int64), said.exact.astype(np.int64), np.exp(-said.nats))
    return Scores(found)


def _distance(model: CausalLM, experts: Mapping[str, Mapping[str, Tensor]], sizes: Mapping[str, int]) -> Any:
    """Return a function from weights to xi: the sum over experts of KL(expert || weights) on texts of their own kind."""
    asked = {s: [p for p, _ in pairs(s, "val", sizes["xi"], seed=2)] for s in experts}
    texts = {s: model.tokens(model.continued(experts[s], some, most=12)) for s, some in asked.items()}
    return lambda weights: sum(divergence(model, experts[s], weights, some) for s, some in texts.items())
