"""The main job: recipe -> adapt -> merge -> evaluate -> diagnose -> report, doing only what is not done yet.

FOLDER/recipe.toml            the recipe as it ran
FOLDER/adapted/NAME/EXPERT/   adapted experts, each with its card and log
FOLDER/ingredients/           what steps need and the recipe does not give, measured (`learn.supply`)
FOLDER/rows/NAME.json         what one sentence scored, with every prediction
FOLDER/merged/                the model of the sentence that was best on the validation splits
FOLDER/scores.json  diagnosis.json  run.json  report.html
"""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapt import adapt, how_text, slug
from .card import file_digests, key_of, read_card, read_json, versions, write_json
from .deltas import applied
from .diagnose.interference import diagnose
from .errors import MissingExtra
from .evaluate.ensemble import HEADS, ensembles
from .evaluate.run import Scores
from .evaluate.table import Row, joint, overall_gain, read_rows, table, write_rows
from .examine import asked_by
from .learn.supply import ROWS, lacking, supplied
from .merge import merge
from .models.statistics import is_statistic
from .prepare import Prepared, prepare
from .progress import Progress, silent
from .recipe import Recipe, made_relative, read_recipe, to_toml
from .sentence import Sentence, parse
from .sweep import best_row, delta_of, score_experts, score_sentence
from .weights.header import Picked, folder_of
from .where import for_sentence

CHOSEN = {"labels": "on validation data", "experts": "by agreement with the experts"}


@dataclass
class _Stages:
    """What was done in this run, how long it took, and what was found done."""

    folder: Path
    progress: Progress
    done: list[dict[str, Any]] = field(default_factory=list)

    def rows(self, name: str, key: Any, work: Callable[[], list[Row]]) -> list[Row]:
        """Return rows from ``rows/NAME.json`` if they are of this key, else work them out and write them."""
        path = self.folder / "rows" / f"{slug(name)}.json"
        started = time.monotonic()
        found = read_rows(path, key_of(key))
        reused = found is not None
        if found is None:
            write_rows(path, key_of(key), work())
            found = (
                read_rows(path, key_of(key)) or []
            )  # as written, so that a resumed run tells the same to the last digit
        self.note(f"score {name}", started, reused)
        return found

    def note(self, name: str, started: float, reused: bool = False) -> None:
        seconds = round(time.monotonic() - started, 3)
        self.done.append(
            {"name": name, "seconds": seconds, "reused": reused, "done": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        )


def run(recipe: "Recipe | str | Path", to: str | Path = "run", *, progress: Progress = silent) -> Path:
    """Run a recipe into the folder ``to`` and return the report's path.

    A second run does only what is missing; a changed knob redoes only what depends on it; a killed run goes on from its
    last checkpoint. Raises the errors of `prepare` before any long work.
    """
    from .report.page import report

    if find_spec("matplotlib") is None:
        raise MissingExtra("the report that ends a run", "report")
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    folder = Path(to)
    started = time.monotonic()
    ready = prepare(recipe, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(to_toml(made_relative(recipe, folder)))
    stages = _Stages(folder, progress)
    experts = {"": ready.experts, **adapt_all(ready, folder, stages)}
    rows = score_all(ready, experts, stages)
    base, own, side_by_side = score_ends(ready, stages)
    shifts = [row.in_domains() for row in (base, own, *rows)] if ready.domains else []
    diagnosis = diagnose_all(ready, experts, rows, stages)
    keep_best(ready, experts, rows, stages)
    xi = {entry["sentence"]: entry["sum"] for entry in diagnosis["xi"]} if diagnosis else {}
    results = table(base.scores, own.scores, rows, xi)
    for told_row, row in zip(results["rows"], rows, strict=True):
        told_row["consumed"] = consumed(ready, row)
    told = {
        "version": 1,
        "title": recipe.title,
        "date": time.strftime("%Y-%m-%d"),
        "seed": recipe.seed,
        "chosen": CHOSEN[recipe.choose],
        "command": recipe.command or "merganser run recipe.toml",
        "tasks": _tasks(ready),
        "adapted": {how: f"adapted/{slug(how)}" for how in experts if how},
        **results,
        **({"joint": joint(ready.union, base.scores, side_by_side)} if side_by_side and ready.union else {}),
        **({"domains": domains_table(ready, shifts)} if shifts else {}),
        "overall": {name: overall_gain(rows, tuned) for name, tuned in (("tuned", True), ("default", False))},
    }
    write_json(folder / "scores.json", told)
    if diagnosis:
        write_json(folder / "diagnosis.json", diagnosis)
    else:
        (folder / "diagnosis.json").unlink(missing_ok=True)  # an earlier run's would be shown as this one's
    earlier = (read_json(folder / "run.json") or {}).get("seconds_in_all", 0)
    seconds = round(time.monotonic() - started, 3)
    write_json(
        folder / "run.json",
        {
            "version": 1,
            "stages": stages.done,
            "seconds": seconds,
            "seconds_in_all": round(earlier + seconds, 3),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "versions": versions(),
            "inputs": ready.digests,
        },
    )
    return report(folder)


def adapt_all(ready: Prepared, folder: Path, stages: _Stages) -> dict[str, Mapping[str, Mapping[str, Tensor]]]:
    """Adapt the experts for every different adapt part of the sentences; return them by its text."""
    adapted: dict[str, Mapping[str, Mapping[str, Tensor]]] = {}
    for how in dict.fromkeys(how_text(s.adapt) for s in ready.sentences if s.adapt):
        started = time.monotonic()
        into = folder / "adapted" / slug(how)
        before = {name: read_card(into / name) for name in ready.experts}
        adapted[how] = adapt(
            ready.base,
            ready.experts,
            encoder=ready.encoder,
            heads=ready.heads,
            inputs=ready.inputs,
            how=how,
            into=into,
            seed=ready.recipe.seed,
            kind=ready.kind,
            heads_key=ready.heads_key,
            progress=stages.progress,
            _place=lambda part: folder / "adapted" / slug(part),
            _targets=folder / "adapted" / ".targets",
        )
        stages.note(f"adapt {how}", started, reused=before == {name: read_card(into / name) for name in ready.experts})
    return adapted


def score_all(ready: Prepared, experts: Mapping[str, Any], stages: _Stages) -> list[Row]:
    """Return the rows of all sentences, in the recipe's order."""
    rows: list[Row] = []
    for sentence in ready.sentences:
        how = how_text(sentence.adapt)
        key = {
            "sentence": str(sentence),
            "scales": [ready.recipe.scales, ready.recipe.all_scales, *ready.judged_by],
            "seed": ready.recipe.seed if sentence.merging.draws else None,
            "scored_on": ready.scored_on,
            "experts": _keys(ready, experts[how]),
            **_given(ready, sentence),
        }
        work = partial(_scored, ready, sentence, experts[how], stages)
        rows += stages.rows(str(sentence), key, work)
    return rows


def _scored(ready: Prepared, sentence: Sentence, experts: Mapping[str, Any], stages: _Stages) -> list[Row]:
    known = _supplied(ready, sentence, experts, stages)
    return score_sentence(known, sentence, experts, progress=stages.progress)


def _supplied(ready: Prepared, sentence: Sentence, experts: Mapping[str, Any], stages: _Stages) -> Prepared:
    """Return ``ready`` with the ingredients that a sentence lacks, measured for these experts."""
    place = stages.folder / "ingredients" / slug(how_text(sentence.adapt) or "experts")
    return supplied(ready, sentence, experts, _keys(ready, experts), place, stages.progress)


def consumed(ready: Prepared, row: Row) -> list[str]:
    """Return what a row used beside the weights of base and experts."""
    sentence = parse(row.sentence)
    used = [f"{name} (ingredient)" for name in asked_by(sentence, ready.recipe.ingredients)]
    used += [f"{name} (up to {ROWS} unlabeled inputs a task)" for name in lacking(sentence, ready.recipe.ingredients)]
    if row.adapt:
        used.append("unlabeled inputs")
    if ready.resets:
        used.append("unlabeled inputs for batch norm")
    if row.tuned:
        used.append("validation labels" if ready.recipe.choose == "labels" else "unlabeled inputs for the scale")
    return used


def domains_table(ready: Prepared, rows: list[Row]) -> dict[str, Any]:
    """Return the results in other domains in the form of the results themselves; the first rows are base and experts."""
    base, experts, *merged = rows
    told = [
        {"name": name, "of": ready.parents[name], "test": len(task), "metric": task.metric}
        for name, task in ready.domains.items()
    ]
    overall = {name: overall_gain(merged, tuned) for name, tuned in (("tuned", True), ("default", False))}
    return {"tasks": told, **table(base.scores, experts.scores, merged, {}), "curves": [], "overall": overall}


def score_ends(ready: Prepared, stages: _Stages) -> tuple[Row, Row, dict[str, Scores]]:
    """Return what the base scores on all tasks, each expert on its own, and all of them side by side (`ensembles`).

    There is no ensemble where the tasks' classes have no union (`Prepared.union`), or the recipe wants none.
    """
    wanted = HEADS if ready.recipe.limits.ensemble else ()
    key = {"scored_on": ready.scored_on, "digests": ready.digests, "ensembles": wanted}

    def ends() -> list[Row]:
        base, elsewhere = ready.scored(ready.base)
        own, domains = score_experts(ready, ready.experts)
        rows = [Row("base", base, domains=elsewhere), Row("experts", own, domains=domains)]
        if ready.union is None or not wanted:
            return rows
        told = ensembles(ready.encoder, ready.experts, ready.test, ready.union, kind=ready.kind)
        return rows + [Row(form, scores) for form, scores in told.items()]

    base, experts, *more = stages.rows("base and experts", key, ends)
    return base, experts, {row.sentence: row.scores for row in more}


def diagnose_all(
    ready: Prepared, experts: Mapping[str, Any], rows: list[Row], stages: _Stages
) -> dict[str, Any] | None:
    """Return drift before and after adapting and the interference of every tuned sentence, as JSON values.

    None where the recipe wants none (``limits.diagnose = 0``).
    """
    from .models.inputs import Subset, torch

    if not ready.recipe.limits.diagnose:
        return None
    started = time.monotonic()
    chosen = [r for r in rows if r.tuned] or rows
    key = key_of([ready.scored_on, {h: _keys(ready, e) for h, e in experts.items()}, [r.sentence for r in chosen]])
    found = read_json(stages.folder / "diagnosis.json")
    if found is not None and found.get("key") == key:
        stages.note("diagnose", started, reused=True)
        return found
    few = ready.recipe.limits.diagnose
    inputs = {n: Subset(t.inputs, torch.arange(min(few, len(t)))) for n, t in ready.test.items()}
    told: dict[str, Any] = {
        "version": 1,
        "key": key,
        "tasks": list(ready.heads),
        "distance": "kl",
        "drift": [],
        "xi": [],
    }
    for how, models in experts.items():
        of_this = [r for r in chosen if (r.adapt or "") == how]
        merged = {r.sentence: _merged(ready, models, parse(r.sentence), stages) for r in of_this}
        result = diagnose(
            ready.base,
            models,
            merged,
            encoder=ready.encoder,
            heads=ready.heads,
            inputs=inputs,
            reference=ready.experts if how else None,
            kind=ready.kind,
            progress=stages.progress,
        )
        told["drift"].append({"label": f"after {how}" if how else "before", "matrix": result.drift})
        told["xi"] += [
            {
                "sentence": r.sentence,
                "adapt": r.adapt,
                "merge": r.merging,
                "matrix": result.xi[r.sentence],
                "per_task": [row[i] for i, row in enumerate(result.xi[r.sentence])],
                "sum": result.total(r.sentence),
            }
            for r in of_this
        ]
    stages.note("diagnose", started)
    return told


def keep_best(ready: Prepared, experts: Mapping[str, Any], rows: list[Row], stages: _Stages) -> None:
    """Write the model of the best sentence (by validation) into ``merged/``, loadable by its own library."""
    started = time.monotonic()
    best = parse(best_row(rows).sentence)
    how = how_text(best.adapt)
    folder = stages.folder / "merged"
    sources = {**_keys(ready, experts[how]), "sentence": str(best), "seed": ready.recipe.seed, **_given(ready, best)}
    if ready.resets:
        sources["scored_on"] = ready.scored_on
    found = read_json(folder / "card.json")
    if found is not None and found.get("sources") == sources:
        stages.note(f"write {best}", started, reused=True)
        return
    origin, own = ready.whole, ready.left_out
    ready = _supplied(ready, best, experts[how], stages)
    if ready.resets:
        measured = {n: t for n, t in _merged(ready, experts[how], best, stages).items() if is_statistic(n)}
        origin = Picked({n: (measured if n in measured else ready.whole, n) for n in ready.whole}, ready.whole)
        own = [*own, *measured]
    merge(
        origin,
        experts[how],
        best.merging,
        into=folder,
        own=own,
        seed=ready.recipe.seed,
        where=for_sentence(ready.recipe.where, best.merging),
        ingredients=asked_by(best.merging, ready.recipe.ingredients),
        progress=stages.progress,
        about={"sentence": str(best), "sources": sources},
    )
    stages.note(f"write {best}", started)


def _given(ready: Prepared, sentence: Sentence) -> dict[str, Any]:
    """Return the patterns and ingredients that bear on a sentence's result, if there are any."""
    where = for_sentence(ready.recipe.where, sentence)
    told: dict[str, Any] = {"where": where} if where else {}
    asked = asked_by(sentence, ready.recipe.ingredients)
    told |= {"ingredients": {name: file_digests(path) for name, path in asked.items()}} if asked else {}
    measured = lacking(sentence, ready.recipe.ingredients)
    return told | ({"measured": dict.fromkeys(measured, ROWS)} if measured else {})


def _merged(ready: Prepared, experts: Mapping[str, Any], sentence: Sentence, stages: _Stages) -> Mapping[str, Tensor]:
    delta = delta_of(_supplied(ready, sentence, experts, stages), sentence, experts)
    return ready.finished({n: applied(t, delta[n]) if n in delta else t for n, t in ready.base.items()})


def _keys(ready: Prepared, experts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells these experts apart from others: the card's key of an adapted one, the digest of an original."""
    keys: dict[str, Any] = {"base": ready.digests["base"]}
    for name, weights in experts.items():
        folder = folder_of(weights) if weights is not ready.experts[name] else None
        card = read_json(folder / "card.json") if folder is not None else None
        keys[name] = card["key"] if card else ready.digests[name]
    return keys


def _tasks(ready: Prepared) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "classes": len(task.classes),
            "val": len(ready.val.get(name, ())),
            "test": len(ready.test[name]),
            "metric": task.metric,
            "kind": task.kind,
        }
        for name, task in ready.tasks.items()
    ]
