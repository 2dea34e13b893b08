"""Studies: one question about adapting, answered on a suite with several seeds; one table and one figure.

    FOLDER/seed-K/GROUP/    a run of each group of variations, resumable like any run
    FOLDER/study.json       what they found together;  FOLDER/study.svg, its picture

Every variation is compared with the same mergers without adapting, scale chosen on validation both times, and as written
(``written``), and with the first variation (``over``). The experts are the same for all seeds; a seed is that of the
inputs' order, of the rows held out, and of mergers that draw.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..adapt import adapt_steps, how_text, slug, stages
from ..card import key_of, read_card, read_json, write_json
from ..errors import DataError, did_you_mean
from ..evaluate.run import Scores, gained
from ..evaluate.table import Row, read_rows, rows_in, write_rows
from ..progress import Progress, silent
from ..recipe import Recipe
from ..run import run
from ..sentence import find, knobs_of, parse
from ..sweep import split_scale
from .suite import Suite, drafted, recipe_for

SUM = "task_arithmetic | scale(by=0.3)"  # as it is published
MERGERS = (SUM, "ties", "tsv", "iso_c")
STUDIED = ("text", "lora", "vision")
Change = Callable[[Recipe], Recipe]


@dataclass(frozen=True)
class Group:
    """Variations that share all but the adapt words; ``change`` makes the recipe they share out of the suite's.

    ``{merger}`` in adapt words stands for the merger that they are asked with, and ``{scales}`` for scales around its best.
    """

    name: str
    adapts: Mapping[str, str]  # by label
    change: Change = lambda recipe: recipe


@dataclass(frozen=True)
class Study:
    """A question, the groups of variations that answer it, and the mergers it is asked of."""

    question: str
    axis: str
    groups: Callable[[Recipe, "Words"], Sequence[Group]]
    mergers: Sequence[str] = MERGERS


@dataclass(frozen=True)
class Words:
    """Writes ``ri`` as the suite itself does, but for the knobs that are given."""

    own: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, **knobs: Any) -> str:
        return _written("ri", {**self.own, **knobs})

    def coadapt(self) -> str:
        """Return ``coadapt`` with the same steps, learning rate and batch."""
        return _written("coadapt", {k: v for k, v in self.own.items() if k in ("steps", "lr", "batch")})

    def distac(self) -> str:
        """Return ``distac`` with the steps, learning rate and batch that ``ri`` has."""
        usual = {k: v for k, v in knobs_of(find("ri")[1]).items() if k in ("steps", "lr", "batch")}
        return _written("distac", {k: self.own.get(k, v) for k, v in usual.items()})


def _written(word: str, knobs: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name}={value!r}" for name, value in knobs.items())
    return f"{word}({told})" if told else word


def words_of(suite: Suite, changed: str | None = None) -> Words:
    """Return how a suite writes ``ri``, as in the first of its sentences that adapts; ``changed``: with these knobs changed.

    Raises DataError where ``changed`` is something else than one ``ri``.
    """
    adapted = [step for text in suite.sentences for step in parse(text).adapt if step.name == "ri"]
    own = dict(adapted[0].knobs) if adapted else {}
    if changed is not None:
        steps = adapt_steps(changed)
        if [step.name for step in steps] != ["ri"]:
            raise DataError(f"--ri '{changed}': give ri with the knobs to change, such as 'ri(steps=100)'")
        own |= steps[0].knobs
    return Words(own)


def _knob(name: str, values: Sequence[Any]) -> Callable[[Recipe, Words], Sequence[Group]]:
    """Return one group, the suite's own recipe, with ``ri`` at every value of one knob; its default is not written."""

    def groups(_recipe: Recipe, ri: Words) -> Sequence[Group]:
        default = knobs_of(find("ri")[1])[name]
        told = {str(v): ri() if v == default and name not in ri.own else ri(**{name: v}) for v in values}
        return [Group("all", told)]

    return groups


def _rates(_recipe: Recipe, ri: Words) -> Sequence[Group]:
    usual = ri.own.get("lr", 5e-5)
    return [Group("all", {f"{by * usual:g}": ri(lr=float(f"{by * usual:g}")) for by in (0.4, 1, 2, 10)})]


def _parts(recipe: Recipe, ri: Words) -> Sequence[Group]:
    lr = 10 * ri.own.get("lr", 5e-5)  # as is usual for LoRA
    ranks = {f"rank {r}": ri(rank=r, lr=lr) for r in (16, 64)}
    blocks = {f"last {k} blocks": ri(blocks=k) for k in (2, 4)} if recipe.model.encoder == "text" else {}
    return [Group("all", {"all": ri(), **ranks, **blocks})]


def _amounts(recipe: Recipe, ri: Words) -> Sequence[Group]:
    most = recipe.inputs.limit if recipe.inputs else None
    sizes = [n for n in (250, 1000, 4000, 12000) if most is None or n <= most]
    return [Group(f"{n}", {f"{n}": ri()}, with_inputs(limit=n)) for n in sizes]


def _sources(recipe: Recipe, ri: Words) -> Sequence[Group]:
    files = recipe.inputs.files if recipe.inputs else []
    drawn = ["tokens:12000"] if recipe.model.encoder == "text" else ["noise:6000", "dead-leaves:6000", "fractals:6000"]
    single = [Group(stem(f), {stem(f): ri()}, with_inputs(files=[f])) for f in [*files, *map(Path, drawn)]]
    return [*single, Group("all", {"all files": ri()})]


def stem(path: Path) -> str:
    return path.name.split(".")[0].split(":")[0]


def with_inputs(**settings: Any) -> Change:
    def change(recipe: Recipe) -> Recipe:
        if recipe.inputs is None:
            raise DataError("this study needs unlabeled inputs")
        return recipe.model_copy(update={"inputs": recipe.inputs.model_copy(update=settings)})

    return change


def _held_back(_recipe: Recipe, ri: Words) -> Sequence[Group]:
    one = {"temperature=2": {"temperature": 2.0}, "ramp=0.5": {"ramp": 0.5}, "pull=0.1": {"pull": 0.1},
           "pull=1": {"pull": 1.0}, "pull=10": {"pull": 10.0}, "guard=1": {"guard": 1.0}}  # fmt: skip
    knobs = {label: ri(**told) for label, told in one.items()}
    return [Group("all", {"ri": ri(), **knobs, "distac, then ri": f"{ri.distac()} | {ri()}"})]


def _counts(recipe: Recipe, ri: Words) -> Sequence[Group]:
    names = list(recipe.tasks)
    counts = sorted({2, len(names) // 2, 3 * len(names) // 4, len(names)})
    return [Group(f"{n}-tasks", {f"{n}": ri()}, _first(n)) for n in counts if n >= 2]


def _first(n: int) -> Change:
    return lambda recipe: recipe.only(list(recipe.tasks)[:n])


def gain_text(gain: Mapping[str, float]) -> str:
    """Return a gain in points with its interval."""
    return f"{100 * gain['score']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


# around the best scales of these mergers after adapting, on the text suite
SCALES = {"task_arithmetic": (0.4, 1.0), "ties": (1.0, 2.5), "tsv": (1.0, 2.0), "iso_c": (1.25, 3.0)}


def _asked_with(adapt: str, merger: str) -> str:
    """Return adapt words as they are asked with a merger."""
    low, high = SCALES.get(merger, (1.5, 3.5))
    return adapt.replace("{merger}", merger).replace("{scales}", f"low={low}, high={high}")


def _aware(_recipe: Recipe, ri: Words) -> Sequence[Group]:
    few, factors = ri(steps=100), ri(steps=100, within="tsv", lr=3e-4)
    inside = "coadapt(steps=100, merger='{merger}', {scales})"
    held = "coadapt(steps=100, lr=0.0003, within='tsv', merger='{merger}', {scales})"
    return [
        Group("all", {"ri, then coadapt": f"{few} | coadapt(steps=100)", "in the merger itself": f"{few} | {inside}",
                      "the same, at tsv's rank": f"{factors} | {held}"})
    ]  # fmt: skip


def _together(_recipe: Recipe, ri: Words) -> Sequence[Group]:
    """As many steps of ``ri`` as both words have together stand beside them."""
    steps = ri.own.get("steps", knobs_of(find("ri")[1])["steps"])
    both = f"{ri()} | {ri.coadapt()}"
    return [Group("all", {f"ri, {2 * steps} steps": ri(steps=2 * steps), "ri": ri(), "ri, then coadapt": both})]


STUDIES: dict[str, Study] = {
    "tasks": Study("How does the gain grow with the number of tasks?", "tasks", _counts),
    "steps": Study("How many steps are enough?", "steps an expert", _knob("steps", (10, 25, 50, 100, 300, 1000))),
    "amount": Study("How many unlabeled inputs are enough?", "unlabeled inputs", _amounts),
    "sources": Study("Which unlabeled inputs help?", "source", _sources),
    "distance": Study(
        "Which distance between outputs?",
        "distance",
        _knob("distance", ("kl", "reverse", "js", "ce", "mse", "cosine")),
    ),
    "alpha": Study("How much weight for the other heads?", "alpha", _knob("alpha", (0.3, 1.0, 3.0, 10.0))),
    "knobs": Study("Does it help to hold experts back, or to soften what they say?", "ri with", _held_back),
    "lr": Study("How large a learning rate?", "lr", _rates),
    "form": Study(
        "What if the other heads are not known, or not all asked?",
        "form",
        lambda _recipe, ri: [
            Group("all", {"heads": ri(), "1 head a step": ri(sample=1), "rows": ri(form="rows"),
                          "features": ri(form="features")})
        ],
    ),
    "aware": Study("Does it help to train inside merges of the very merger?", "adapting", _aware, ("ties", "tsv", "iso_c")),
    "together": Study("Does it help to train experts inside merges with each other?", "adapting", _together),
    "part": Study("Can a part of the numbers do?", "trained", _parts),
    "mergers": Study(
        "Does it help every merger?",
        "merger",
        lambda _recipe, ri: [Group("all", {"ri": ri()})],
        ("average", SUM, "ties", "dare(keep=0.2) | ties", "knots | ties", "consensus", "magmax", "pcb",
         f"breadcrumbs | {SUM}", "tsv", "iso_c", "iso_cts", "dc"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A question that ``measure(Asked)`` of a module of its own answers, by head and rows of a table, and points."""

    question: str
    axis: str
    module: str
    mergers: Sequence[str] = MERGERS


MEASURED: dict[str, Measured] = {
    "baselines": Measured("What else can be done with the same unlabeled inputs?", "way", "baselines", (SUM, "tsv")),
    "proxy": Measured("Which unlabeled inputs help, before anything is trained?", "source", "proxy"),
    "transfer": Measured("Does adapting cost positive transfer?", "pair", "transfer", (SUM,)),
}


@dataclass(frozen=True)
class Asked:
    """What a study is asked of: the suite's recipe, its ``ri``, and where what was found is kept.

    ``written``: for each merger, without a scale, its sentence as it was written.
    """

    recipe: Recipe
    ri: Words
    folder: Path
    seeds: int
    written: Mapping[str, str]
    progress: Progress
    only: Sequence[str] = ()

    @property
    def mergers(self) -> list[str]:
        return list(self.written)

    def key(self, seed: int) -> list[Any]:
        """Return what a score depends on beside weights and labelled rows."""
        assert self.recipe.inputs is not None, "a suite has inputs"
        return [self.ri(), self.ri.coadapt(), seed, self.recipe.inputs.model_dump(mode="json")]


def kept(place: Path, name: str, key: Any, work: Callable[[], Scores]) -> Row:
    """Return a row from ``PLACE/rows`` if it is of this key, else what ``work`` scores, written there."""
    path, told = place / "rows" / f"{slug(name)}.json", key_of(key)
    if (found := read_rows(path, told)) is None:
        started = time.monotonic()
        scores = work()
        write_rows(path, told, [Row(name, scores, seconds=round(time.monotonic() - started, 3))])
        found = read_rows(path, told) or []
    return found[0]


@dataclass
class _Found:
    """What one variation gave with one merger: rows without and with adapting, a pair a seed, at the scale chosen on
    validation and (``written``) at that of the sentence.
    """

    pairs: list[tuple[Row, Row]] = field(default_factory=list)
    written: list[tuple[Row, Row]] = field(default_factory=list)

    def told(self, experts: Sequence[float], first: "_Found | None" = None) -> dict[str, Any]:
        """Return means over seeds, and what adapting so gives over adapting as the ``first`` variation does (``over``)."""
        told = _told(self.pairs, experts)
        if self.written:
            told["written"] = _told(self.written, experts)
        adapted = [(a, b) for (_, a), (_, b) in zip(first.pairs if first else [], self.pairs, strict=False)]
        if first is not self and adapted and all(a.scores.keys() == b.scores.keys() for a, b in adapted):
            told["over"] = _gain(adapted)
        return told


def _told(pairs: Sequence[tuple[Row, Row]], experts: Sequence[float]) -> dict[str, Any]:
    without, with_ = (float(np.mean([pair[k].scores.mean for pair in pairs])) for k in (0, 1))
    told = _gain(pairs)
    lost = float(np.mean(experts)) - without
    scales = [[a.scale, b.scale] for a, b in pairs]
    recovered = told["gain"]["score"] / lost if lost > 0 else None
    return {"without": without, "with": with_, "scales": scales, **told, "recovered": recovered}


def _gain(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Return what the second of each pair scores more; the interval is over test examples, paired, seeds averaged first."""
    gain = gained([(a.scores, b.scores) for a, b in pairs])
    each = gain.pop("each")
    return {"gain": gain, "by_seed": each}


def open_study(name: str) -> Study | Measured:
    """Return a study by its name. Raises DataError for an unknown one."""
    known: dict[str, Study | Measured] = {**STUDIES, **MEASURED}
    if name not in known:
        raise DataError(f"unknown study '{name}'{did_you_mean(name, list(known))}; known: {', '.join(known)}")
    return known[name]


def suite_of(name: str, opened: Any) -> Suite:
    """Return the suite that a study is made of. Raises DataError where there is none of that suite."""
    if not isinstance(getattr(opened, "SUITE", None), Suite) or name not in STUDIED:
        raise DataError(f"suite '{name}' has no studies; those of {', '.join(STUDIED)} have")
    return opened.SUITE


def mergers_of(asked: Study | Measured, how: Sequence[str] | None = None) -> dict[str, str]:
    """Return the merging sentences of a study, or ``how`` instead, by themselves without scales.

    Raises DataError where one adapts.
    """
    mergers = {str(split_scale(parse(text)).sentence): str(parse(text)) for text in how or asked.mergers}
    if adapting := [text for text in mergers if parse(text).adapt]:
        raise DataError(f"--how '{adapting[0]}': a study adapts by itself; give what comes after, such as ties")
    return mergers


def check_only(suite: Suite, data: str | Path, name: str, words: Words, only: Sequence[str]) -> None:
    """Raise DataError for a variation that a study on these tasks has not got, before any expert is made."""
    if not only:
        return
    asked = open_study(name)
    if isinstance(asked, Measured):
        raise DataError(f"--only '{only[0]}': study '{name}' is measured as a whole; leave it out")
    chosen_of(asked.groups(drafted(suite, data, asked.mergers, suite.tasks(data)), words), only)


def chosen_of(groups: Sequence[Group], only: Sequence[str]) -> list[Group]:
    """Return the groups with the variations named in ``only``, all where it is empty. Raises DataError for another name."""
    known = [label for group in groups for label in group.adapts]
    for label in only:
        if label not in known:
            raise DataError(
                f"--only '{label}': no such variation{did_you_mean(label, known)}; known: {', '.join(known)}"
            )
    left = [replace(g, adapts={k: v for k, v in g.adapts.items() if not only or k in only}) for g in groups]
    return [group for group in left if group.adapts]


def bench(
    suite: Suite,
    data: str | Path,
    to: str | Path,
    name: str,
    *,
    seeds: int = 3,
    how: Sequence[str] | None = None,
    ri: str | None = None,
    only: Sequence[str] = (),
    progress: Progress = silent,
) -> Path:
    """Run the study ``name`` on a suite; return ``study.json``, beside which lies its figure.

    ``how`` replaces the study's mergers, ``ri`` changes knobs of the suite's own ``ri``, ``only`` names the variations
    that are asked for. Runs that are done are read back. Raises DataError as `suite.bench` does.
    """
    from ..report.figure import study_figure

    asked, words = open_study(name), words_of(suite, ri)
    mergers = mergers_of(asked, how)
    check_only(suite, data, name, words, only)
    folder = Path(to)
    recipe = recipe_for(suite, data, list(mergers), progress=progress)
    of = Asked(recipe, words, folder, seeds, mergers, progress, only)
    if isinstance(asked, Measured):
        found = import_module(f".measured.{asked.module}", __package__).measure(of)
    else:
        found = {"variations": _varied(asked, of)}
    told = {
        "version": 1,
        "study": name,
        "question": asked.question,
        "axis": asked.axis,
        "title": f"{recipe.title.split(':')[0]}: {asked.question}",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"{recipe.command} --study {name} --seeds {seeds}"
        + (f" --ri '{ri}'" if ri else "")
        + "".join(f" --only '{label}'" for label in only),
        "seeds": seeds,
        "mergers": list(mergers),
        **found,
    }
    write_json(folder / "study.json", told)
    (folder / "study.svg").write_text(study_figure(told))
    return folder / "study.json"


def _varied(study: Study, asked: Asked) -> list[dict[str, Any]]:
    """Return what every variation of a study gave."""
    mergers, groups = asked.mergers, chosen_of(study.groups(asked.recipe, asked.ri), asked.only)
    found: dict[tuple[str, str], _Found] = {}
    seconds: dict[str, list[float]] = {}
    experts: dict[str, list[float]] = {}
    places: list[Path] = []
    for seed in range(asked.seeds):
        for group in groups:
            place = asked.folder / f"seed-{seed}" / slug(group.name)
            plain = asked.written
            words = [_asked_with(how, m) + f" | {plain[m]}" for how in group.adapts.values() for m in mergers]
            rows = _rows(asked, group.change(asked.recipe), [*plain.values(), *words], place, places, seed)
            best, untuned = _chosen(rows), _chosen([row for row in rows if not row.tuned])
            top = (read_json(place / "scores.json") or {})["experts"]["mean"]["score"]
            for label, adapt in group.adapts.items():
                experts.setdefault(label, []).append(top)
                by = {m: _adapt_of(_asked_with(adapt, m)) for m in mergers}
                seconds.setdefault(label, []).append(float(np.mean([_adapting(place, by[m]) for m in mergers])))
                for m in mergers:
                    one = found.setdefault((label, m), _Found())
                    one.pairs.append((best[None, m], best[by[m], m]))
                    one.written.append((untuned[None, m], untuned[by[m], m]))
    first = next(iter(experts))
    return [
        {
            "label": label,
            "adapt": adapt,
            "experts": float(np.mean(experts[label])),
            "seconds": float(np.mean(seconds[label])),
            "mergers": {m: found[label, m].told(experts[label], found[first, m]) for m in mergers},
        }
        for group in groups
        for label, adapt in group.adapts.items()
    ]


def paired(
    asked: Asked, recipe: Recipe, place: Path, places: list[Path], seed: int
) -> dict[str, tuple[Scores, Scores]]:
    """Return what each merger scores without and with the suite's ``ri``, on a recipe changed from the suite's."""
    how = asked.ri()
    plain = asked.written.values()
    rows = _chosen(_rows(asked, recipe, [*plain, *(f"{how} | {m}" for m in plain)], place, places, seed))
    return {m: (rows[None, m].scores, rows[_adapt_of(how), m].scores) for m in asked.mergers}


def _rows(
    asked: Asked, recipe: Recipe, sentences: Sequence[str], place: Path, places: list[Path], seed: int
) -> list[Row]:
    """Run a recipe in ``place``, with what was scored in the ``places`` before it, which it joins; return its rows."""
    for earlier in places:
        _share(earlier / "rows", place / "rows")
    places.append(place)
    run(_as(recipe, list(dict.fromkeys(sentences)), seed), place, progress=asked.progress)
    return rows_in(place)


def _share(first: Path, place: Path) -> None:
    """Copy what another run scored where this one has nothing yet: by its key a row tells whether it holds here too."""
    place.mkdir(parents=True, exist_ok=True)
    for file in first.glob("*.json"):
        if not (place / file.name).exists():
            shutil.copyfile(file, place / file.name)


def _as(recipe: Recipe, sentences: list[str], seed: int) -> Recipe:
    limits = recipe.limits.model_copy(update={"ensemble": False, "diagnose": 0})  # nobody looks at them there
    return recipe.model_copy(update={"sentences": sentences, "seed": seed, "limits": limits})


def _adapt_of(adapt: str) -> str:
    return " | ".join(map(str, parse(f"{adapt} | average").adapt))


def _chosen(rows: Sequence[Row]) -> dict[tuple[str | None, str], Row]:
    """Return one row a sentence, by its adapt words and merger: the tuned one where there is one."""
    chosen: dict[tuple[str | None, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.tuned):
        chosen[row.adapt, row.merging] = row
    return chosen


def _adapting(place: Path, how: str) -> float:
    """Return the seconds that adapting one expert took, the mean over experts."""
    total = 0.0
    for part, before in stages(adapt_steps(how)):
        place_of = place / "adapted" / slug(how_text([*before, *part]))
        cards = [read_card(folder) for folder in sorted(place_of.iterdir()) if folder.is_dir()]
        total += float(np.mean([card["seconds"] for card in cards if card]))
    return total
